"""Halving: who goes on is a function of the study alone, and what goes on has the bits of a full sweep."""

import contextlib
import functools
import json
import math
import os
import random
import re
import signal

import numpy as np
import pandas
import pytest
from helpers import Sweep, call, kill_after, launch, make_trial, processes_of, results, wait_until

import command_launchers
from federated.halving import Candidate, Halving, Rung, Standing, cost, standings, write_plan
from federated.reporting import selection
from federated.settings import HALVING, Settings
from federated.trial import CHECKPOINT, KEPT, PREVIOUS, hparams_hash, rounds_done
from hparams_registry import random_hparams

pytestmark = pytest.mark.process

OPTIONS = (
    "--num_clients", "4", "--participation", "0.5", "--optimizer_state", "keep", "--samples_per_client", "60",
    "--rounds", "8", "--num_hparams", "6", "--num_trials", "2", "--client_processes", "2",
)  # fmt: skip
HALVED = ("--halving", "2", "--min_rounds", "2")
NAMES = "abcdefghij"


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """The results of the sweep that is not halved."""
    out = tmp_path_factory.mktemp("full")
    assert launch(functools.partial(call, out), out, *OPTIONS).returncode == 0
    return results(out)


@pytest.fixture(scope="module")
def halved(tmp_path_factory):
    """The results of the halved sweep, in one launch."""
    out = tmp_path_factory.mktemp("halved")
    assert launch(functools.partial(call, out), out, *OPTIONS, *HALVED).returncode == 0
    return results(out)


def finals(found):
    """Of what `results` gives, the trials that ran all rounds."""
    return {path: content for path, content in found.items() if content["settings"]["rounds"] == 8}


def rounds_of(out):
    """{trial's directory: the rounds that it has results of}"""
    return {path: rounds_done(path) for path in out.glob("*/*/trial_*")}


# The decision


@pytest.mark.parametrize(
    ("plan", "sets", "rounds", "eval_every", "ladder"),
    [
        (Halving(4, 3, 2), 20, 50, 1, [(3, 20), (12, 5), (50, 2)]),
        (Halving(2, 3, 2), 20, 50, 1, [(3, 20), (6, 10), (12, 5), (24, 3), (50, 2)]),
        (Halving(3, 6, 2), 20, 50, 1, [(6, 20), (18, 7), (50, 3)]),
        (Halving(2, 4, 3), 6, 50, 1, [(4, 6), (50, 3)]),  # no further rung would stop any
        (Halving(2, 4, 2), 20, 50, 3, [(6, 20), (12, 10), (24, 5), (50, 3)]),
        (Halving(2, 4, 5), 5, 50, 1, [(50, 5)]),
        (Halving(2, 40, 2), 20, 50, 1, [(50, 20)]),
    ],
)
def test_rungs_grow_by_eta_up_to_all_rounds(plan, sets, rounds, eval_every, ladder):
    assert plan.ladder(sets, rounds, eval_every) == ladder


def test_its_cost_is_what_its_trials_run():
    ladder = Halving(4, 3, 2).ladder(20, 50, 1)
    assert cost(ladder, 3) == 20 * 3 + 5 * (12 - 3) + 2 * (50 - 12) + 2 * 2 * 50


def test_a_rung_waits_for_all_its_sets_and_then_the_best_go_on():
    ladder = [Rung(2, 5), Rung(4, 2)]
    curves = [[0.1, 0.5], [0.6, 0.2], [0.3, math.nan], [0.6, 0.6], [0.4, 0.4]]
    whole = {name: Candidate(number, curve) for number, (name, curve) in enumerate(zip(NAMES, curves))}
    for name in whole:
        part = whole | {name: Candidate(whole[name].number)}
        assert set(standings(ladder, part).values()) == {Standing(0, 2)}
    found = standings(ladder, whole)
    assert [found[name].rank for name in "aec"] == [3, 4, 5] and all(found[name].among == 5 for name in "aec")
    assert found["b"] == found["d"] == Standing(1, 4)  # of equal best accuracies
    assert standings(ladder, dict(sorted(whole.items(), reverse=True))) == found
    longer = {name: Candidate(each.number, [*each.val_acc, 1.0, 1.0]) for name, each in whole.items()}
    assert standings(ladder, longer) == found  # what comes later changes nothing


def test_equal_sets_go_on_by_their_numbers():
    candidates = {name: Candidate(number, [0.5]) for name, number in zip("abcd", (3, 0, 2, 1))}
    found = standings([Rung(1, 4), Rung(2, 2)], candidates)
    assert {name for name, each in found.items() if not each.is_stopped} == {"b", "d"}
    assert (found["c"].rank, found["a"].rank) == (3, 4)
    assert {name: each.tied_with for name, each in found.items()} == {"a": 2, "b": 0, "c": 2, "d": 0}
    better = standings([Rung(1, 4), Rung(2, 2)], candidates | {"d": Candidate(1, [0.6]), "b": Candidate(0, [0.6])})
    assert not any(each.tied_with for each in better.values()) and better["c"].is_stopped


def test_sets_that_diverged_are_out():
    ladder = [Rung(1, 4), Rung(2, 2), Rung(3, 1)]
    candidates = {"a": Candidate(0, [0.9, 0.9, 0.9], True), "b": Candidate(1, [], True), "c": Candidate(2, [0.8, 0.8, 0.8])}
    found = standings(ladder, candidates | {"d": Candidate(3, [0.85], True)})
    assert found["b"] == Standing(0, 1, True, None, 4) and found["d"] == Standing(1, 2, True, None, 2)
    assert found["c"].rank == 3
    assert found["a"] == Standing(2, 3, True, None, 1)  # in another trial, of the last rung


@pytest.mark.parametrize("seed", range(20))
def test_who_goes_on_does_not_depend_on_what_ran_first(seed):
    """Trials end in any order, sets come in two launches: the finalists are those of one launch."""
    stream = random.Random(seed)
    curves = {name: [stream.choice((0.1, 0.2, 0.3, 0.4)) for _ in range(8)] for name in NAMES}
    plan, known = Halving(2, 1, 2), dict.fromkeys(NAMES, 0)
    ladder = plan.ladder(len(NAMES), 8, 1)
    while True:
        candidates = {name: Candidate(NAMES.index(name), curves[name][: known[name]]) for name in NAMES}
        found = standings(ladder, candidates)
        short = [name for name in NAMES if not found[name].is_stopped and known[name] < found[name].rounds]
        if not short:
            break
        name = stream.choice(short)
        known[name] = found[name].rounds
    assert found == standings(ladder, {name: Candidate(NAMES.index(name), curves[name]) for name in NAMES})
    assert sum(known.values()) == cost(ladder, 1)


# Launches


def test_finalists_have_the_bits_of_a_full_sweep(launch_here, call, tmp_path, full):
    out = tmp_path / "out"
    launched = launch_here(out, *OPTIONS, *HALVED)
    assert launched.returncode == 0, launched.stderr
    plan = "6 sets x 2 rounds, 3 sets x 4 rounds, 2 sets x 8 rounds x 2 trials, 42 of 96 rounds (43.8%)"
    assert plan in launched.stderr
    there = finals(results(out))
    assert len(there) == 4 and there.items() <= full.items()
    assert sorted(rounds_of(out).values()) == [2, 2, 2, 4, 8, 8, 8, 8] and not list(out.rglob(KEPT))

    shown = call("sweep.py", "status", "--output_dir", out, "--num_hparams", 6, "--num_trials", 2)
    assert "6 jobs: 2 done, 0 incomplete, 0 not launched, 4 stopped." in shown.stdout
    assert shown.stdout.count(", stopped after 2 of 8 rounds, rank ") == 3
    assert "0/2 trials done, stopped after 4 of 8 rounds, rank 3 of 3, " in shown.stdout
    listed = json.loads(call("sweep.py", "status", "--output_dir", out, "--json").stdout)
    assert sorted(job["halving"]["rank"] or 0 for job in listed) == [0, 0, 3, 4, 5, 6]

    again = launch_here(out, *OPTIONS, *HALVED)
    assert again.returncode == 0 and "Exiting...All rungs are done." in again.stderr
    assert "0 jobs" in call("sweep.py", "delete_incomplete", "--output_dir", out, "--skip_confirmation").stderr
    plain = launch_here(out, *OPTIONS)
    assert plain.returncode == 0 and results(out) == full
    call("sweep.py", "delete_all", "--output_dir", out, "--skip_confirmation")
    assert not list(out.iterdir())


@pytest.mark.parametrize("launcher", [pytest.param("local_sequential", marks=pytest.mark.slow), "ignores what follows"])
def test_every_launcher_gives_the_same(launch_here, tmp_path, monkeypatch, launcher):
    class Ignores(command_launchers.LocalParallel):
        def launch(self, trials, output_dir, run, report):
            super().launch(trials, output_dir, run, lambda trial, outcome: (report(trial, outcome), None)[1])

    monkeypatch.setitem(command_launchers.REGISTRY, "ignores what follows", Ignores)
    trials = 1 if launcher == "local_sequential" else 2  # it imports torch anew in each process
    options = (*OPTIONS, *HALVED, "--num_hparams", 3, "--num_trials", trials, "--client_processes", 1)
    assert launch_here(tmp_path / "one", *options).returncode == 0
    assert launch_here(tmp_path / "other", *options, "--command_launcher", launcher).returncode == 0
    assert results(tmp_path / "one") == results(tmp_path / "other") and len(results(tmp_path / "one")) == 1 + 2 * trials


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_kills_in_any_rung_change_nothing(launch_here, tmp_path, full, halved, seed):
    out, stream = tmp_path / "out", random.Random(seed)
    for ended in (2, 6, 8, 9):  # trials and more rounds of them
        sweep = Sweep(out, *OPTIONS, *HALVED, "--checkpoint_seconds", "0")

        def steps(sweep=sweep, least=ended):
            assert sweep.process.poll() is None or sum(map(bool, rounds_of(out).values())) >= 8
            return sum((2, 4, 8).index(each) + 1 for each in rounds_of(out).values() if each) >= least

        wait_until(steps)
        for pid in [pid for trial in out.glob("*/*/trial_*") for pid in processes_of(trial).values()]:
            if stream.random() < 0.5:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        sweep.process.kill()
        sweep.wait()
    assert launch_here(out, *OPTIONS, *HALVED).returncode == 0
    assert results(out) == halved and finals(results(out)).items() <= full.items()


@pytest.mark.slow
def test_more_sets_are_judged_with_those_that_are_there(launch_here, tmp_path, halved):
    out = tmp_path / "out"
    assert launch_here(out, *OPTIONS, *HALVED, "--num_hparams", 3).returncode == 0
    grown = launch_here(out, *OPTIONS, *HALVED)
    assert grown.returncode == 0 and "6 sets x 2 rounds" in grown.stderr
    before = finals(results(out))
    assert launch_here(out, *OPTIONS, *HALVED, "--num_hparams", 1).returncode == 0  # asks for no fewer than there are
    assert finals(results(out)) == before
    assert finals(halved).items() <= before.items()


def test_a_set_that_diverged_is_out(launch_here, call, tmp_path):
    out, diverges = tmp_path / "out", '{"learning_rate": [1e30, 0.1, 0.2]}'
    launched = launch_here(
        out, "--samples_per_client", 60, "--rounds", 8, "--num_trials", 2, "--local_optimizer", "sgd", *HALVED,
        "--hparams", diverges, "--num_hparams", 8,
    )  # fmt: skip
    assert launched.returncode == 1 and "diverged" in launched.stderr
    shown = call("sweep.py", "status", "--output_dir", out, "--num_hparams", 1, "--num_trials", 2).stdout
    failed, stopped = shown.count("\nFailed: "), shown.count("\nStopped: ")
    assert failed > 0 and shown.count("Done: ") == 2 and failed + stopped == len(list(out.glob("*/*/"))) - 2
    again = launch_here(out, *HALVED, "--again")
    assert again.returncode == 2 and "--halving leaves out sets that diverged" in again.stderr


@pytest.mark.parametrize(("low", "high", "is_told"), [(1e-12, 1e-9, True), (0.02, 1, False)])
def test_a_launch_says_if_a_rung_could_not_tell_sets_apart(launch_here, tmp_path, low, high, is_told):
    """Learning rates of nearly zero leave all models as they began, so that all sets are equal."""
    hparams = json.dumps({"batch_size": 32, "learning_rate": {"low": low, "high": high, "log": True}})
    options = ("--samples_per_client", 300, "--local_optimizer", "sgd", "--hparams", hparams, "--num_hparams", 4, "--rounds", 6)
    launched = launch_here(tmp_path / "out", *options, *HALVED)
    assert launched.returncode == 0, launched.stderr
    told = "2 of the 2 sets that went on after 2 rounds had the validation accuracy of one that was stopped"
    assert (told in launched.stderr) == is_told == ("tell them apart" in launched.stderr), launched.stderr


@pytest.mark.slow
def test_a_rung_waits_for_a_trial_that_failed(launch_here, tmp_path, full):
    """Its sweep alone: another one goes on."""
    out = tmp_path / "out"
    name = hparams_hash(random_hparams("Fedavg", "digits", 1))
    sweep_dir = out / f"{next(iter(full)).partition('/')[0]}"
    (sweep_dir / name).mkdir(parents=True)
    (sweep_dir / name / "trial_0").write_text("a file in place of a directory")
    launched = launch_here(out, *OPTIONS, *HALVED, "--algorithm", "Fedavg", "Local")
    assert launched.returncode == 1
    assert f"waits at 2 rounds for {sweep_dir / name / 'trial_0'}: launch again." in launched.stderr
    assert sorted(rounds_of(sweep_dir.parent).values()) == [0, *[2] * 8, 4, *[8] * 4]
    (sweep_dir / name / "trial_0").unlink()
    assert launch_here(out, *OPTIONS, *HALVED).returncode == 0
    there = {path: each for path, each in finals(results(out)).items() if path.startswith(sweep_dir.name)}
    assert len(there) == 4 and there.items() <= full.items()


def test_checkpoints_are_kept_if_asked_and_no_longer_needed_if_not(launch_here, tmp_path, full):
    out = tmp_path / "out"
    assert launch_here(out, *OPTIONS, *HALVED, "--keep_checkpoints").returncode == 0
    kept = list(out.rglob(KEPT))
    assert len(kept) == 8
    for path in kept:
        path.unlink()
    launched = launch_here(out, *OPTIONS, *HALVED, "--finalists", 4)  # two more of them, from the start
    assert launched.returncode == 0 and not list(out.rglob(KEPT))
    assert len(finals(results(out))) == 8 and finals(results(out)).items() <= full.items()


@pytest.mark.slow
@pytest.mark.parametrize("between_renames", [False, True])
def test_a_trial_that_was_begun_with_all_rounds_runs_them(launch_here, tmp_path, full, between_renames):
    out = tmp_path / "out"
    trial = kill_after(Sweep(out, *OPTIONS, "--rounds", "8", "--jobs", "1", "--checkpoint_seconds", "0"), 1)
    if between_renames and (trial / CHECKPOINT).exists():
        (trial / CHECKPOINT).rename(trial / PREVIOUS)
    had_begun = (trial / CHECKPOINT).exists() or (trial / PREVIOUS).exists()  # else the kill came before the first checkpoint
    assert launch_here(out, *OPTIONS, *HALVED).returncode == 0
    assert rounds_done(trial) in ((8,) if had_begun else (2, 4, 8)) and finals(results(out)).items() <= full.items()


def test_nothing_is_made_before_it_is_known_that_trials_can_run(launch_here, call, tmp_path):
    out = tmp_path / "out"
    for options, message in (
        ((*HALVED, "--command_launcher", "slurm"), "Slurm does not answer"),
        ((*HALVED, "--min_rounds", 6), "6 sets of 8 rounds from 6 with 2 finalists leave no rung to stop at"),
        (("--min_rounds", 2), "--min_rounds applies only to --halving"),
        (("--finalists", 2), "--finalists applies only to --halving"),
    ):
        launched = launch_here(out, *OPTIONS, *options)
        assert launched.returncode == 2 and message in launched.stderr.splitlines()[-1]
        assert not out.exists() or not list(out.iterdir())
    printed = launch_here(out, *OPTIONS, *HALVED, "--command_launcher", "dry_run")
    assert printed.returncode == 0 and printed.stdout.count("server_benchmark.py") == 6
    assert "launch again to run the next rungs" in printed.stderr
    assert printed.stdout.count("--rounds=2") == 6 and not list(tmp_path.glob("out/*"))


def test_a_plan_that_cannot_be_read_is_named(launch_here, call, tmp_path):
    out = tmp_path / "out"
    assert launch_here(out, *OPTIONS, *HALVED).returncode == 0
    (plan,) = out.glob(f"*/{HALVING}")
    for text in ("", "[]", '{"eta": 1, "min_rounds": 2, "finalists": 2}', '{"eta": 2}', "[" * 100_000):
        plan.write_text(text)
        shown = call("sweep.py", "status", "--output_dir", out)
        assert shown.returncode == 2 and "cannot be read as a plan of halving" in shown.stderr.splitlines()[-1]


# What tables say


def make_halved(out):
    """Four sets, of which the better two went on after two of four rounds."""
    for number, val in enumerate((0.5, 0.9, 0.3, 0.7)):
        trial = make_trial(out, number, 0, [[0.1, val]] * 2, [0.2, val - 0.1])
    for number, val in ((1, 0.7), (3, 0.8)):
        for seed in range(2):
            make_trial(out, number, seed, [[0.1, 0.9, 0.2, val + 0.15], [0.1, 0.9, 0.2, val + 0.15]], [0.2, 0.4, 0.5, val])
    write_plan(trial.parents[1], Halving(2, 2, 2))


def test_tables_rank_finalists_and_show_the_stopped_below(call, tmp_path):
    make_halved(tmp_path)
    printed = call("collect_results.py", "--output_dir", tmp_path, "--top", 9)
    assert printed.returncode == 0 and "not done" not in printed.stderr
    assert "halving stopped 2 of 4 hyper-parameter sets after 2 of 4 rounds of one trial." in printed.stdout
    assert "Number of hyperparameter sets: 4" in printed.stdout
    assert "Training time: 10.0 s in total" in printed.stdout  # 4 trials of 4 rounds, and 2 of 2
    ranks = [line.split("|") for line in printed.stdout.splitlines() if line.startswith(("| 1 ", "| 2 ", "| 3 ", "| 4 "))][:4]
    shown = [[cell.strip() for cell in row[-6:-1]] for row in ranks]
    assert [row[0] for row in shown] == ["0.9500", "0.9000", "0.5000", "0.3000"]
    assert [row[2:4] for row in shown] == [["2", "4"], ["2", "4"], ["1", "2"], ["1", "2"]]
    assert [row[4] for row in shown] == ["100.0%", "0.0%", "–", "–"]
    assert printed.stdout.count("4 settings, by trial 0 after 2 rounds, which all have.") == 1
    assert "Of 3 random draws, without the defaults (Dodge et al., EMNLP 2019), by trial 0 after 2 rounds" in printed.stdout
    rows = json.loads(call("collect_results.py", "--output_dir", tmp_path, "--format", "json", "--top", 9).stdout)["results"]
    assert [(row["hparams_seed"], row["rank"], row["rounds_run"]) for row in rows] == [
        (3, 1, 4),
        (1, 2, 4),
        (0, 3, 2),
        (2, 4, 2),
    ]


def test_the_page_shows_all_sets_by_the_rung_that_all_have(call, tmp_path):
    """As the tables and the pictures for papers do."""
    make_halved(tmp_path)
    printed = call("collect_results.py", "--output_dir", tmp_path, "--top", 9, "--html", tmp_path / "page.html")
    assert printed.returncode == 0, printed.stderr
    table = printed.stdout.partition("Expected Best Validation Accuracy")[2].splitlines()[2:]
    worth = [float(line.split("|")[2]) for line in table if line.startswith("| ")][:3]
    data = re.findall(r'<script type="application/json">(.*?)</script>', (tmp_path / "page.html").read_text())
    pictures = [json.loads(each) for each in data]
    (draws,) = (each for each in pictures if each.get("x") == "random draws")
    assert np.allclose(draws["curves"][0]["y"], worth) and len(worth) == 3
    (sets,) = (each for each in pictures if "axes" in each)
    assert sorted(each["y"][-1] for each in sets["curves"]) == ["0.3000", "0.5000", "0.9000", "0.9000"]
    rates = [each["y"][sets["axes"].index("learning_rate")] for each in sets["curves"]]
    assert rates[-1] == f"{random_hparams('Fedavg', 'digits', 3)['learning_rate']:.6g}"  # of the best, on top
    assert "its validation accuracy after 2 rounds" in (tmp_path / "page.html").read_text()


def test_sweeps_that_were_halved_otherwise_are_not_compared(call, tmp_path):
    make_halved(tmp_path)
    for number in range(4):
        for seed in range(2):
            make_trial(tmp_path, number, seed, [[0.5] * 4] * 2, [0.5] * 4, Settings(algorithm="Fedprox"))
    printed = call("collect_results.py", "--output_dir", tmp_path).stdout
    assert "settings or budgets differ: Fedprox (halving none instead of from 2 rounds)" in printed


def certainty_of(val_acc):
    """The certainty of sets, the best first, by their accuracies [sets, seeds, clients], of clients with 10 and 30 samples."""
    sets = [f"set {number}" for number in range(len(val_acc))]
    held_out = {
        ("s", name, seed): (np.array(clients)[:, None], np.array([10, 30]))
        for name, seeds in zip(sets, val_acc)
        for seed, clients in enumerate(seeds)
    }
    rows = pandas.DataFrame([{"sweep": s, "hash": name, "trial_seed": seed, "round": 1} for s, name, seed in held_out])
    return selection.certainty(pandas.DataFrame({"hash": sets}), rows, held_out)


def test_the_bootstrap_draws_seeds_and_clients_the_same_for_all_sets():
    sure = certainty_of([[[0.9, 0.9]] * 3, [[0.8, 0.8]] * 3])
    assert sure["best"].tolist() == [1, 0] and sure["as_good"].tolist() == [1, 0]
    equal = certainty_of([[[0.5, 0.1]] * 3, [[0.5, 0.1]] * 3])
    assert equal["best"].tolist() == [1, 0] and equal["as_good"].tolist() == [1, 1]
    by_seed = certainty_of([[[0.9, 0.9], [0.5, 0.5]], [[0.5, 0.5], [0.9, 0.9]]])
    assert np.allclose(by_seed["best"], [0.75, 0.25], atol=0.05) and np.isclose(by_seed["as_good"][1], 0.75, atol=0.05)
    by_client = certainty_of([[[0.0, 0.9]] * 2, [[0.9, 0.0]] * 2])  # the second client has three times the samples
    # in each of two seeds both clients are drawn in half of the cases, and each alone, twice, in a quarter
    difference = np.add.outer(*[[-0.9, 0.45, 0.45, 0.9]] * 2)
    assert np.isclose(by_client["best"][0], (difference >= 0).mean(), atol=0.05)
    assert certainty_of([[[0.9, 0.9]], [[0.8, 0.8]]]).isna().all(axis=None)
