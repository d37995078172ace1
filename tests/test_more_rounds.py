"""A sweep gets more rounds: its trials go on from the checkpoints that they kept, or are computed again, to the bits of a sweep
that had all rounds from the start."""

import contextlib
import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from helpers import STATEFUL, Sweep, events_of, kill_after, make_trial, results, trial_of

from federated.reporting.collect import collect
from federated.reporting.report import ignored
from federated.settings import Settings
from federated.trial import CHECKPOINT, EVENTS, KEPT, MODEL, Trial, rounds_done

pytestmark = pytest.mark.process

# With state on the server, with clients, in clients' models, in moments
STATES = ("Fedavg", "Fedadam", "Scaffold", "Feddyn", "Moon", "Ditto", "Fedrep", "Pfedme", "Apfl", "Centralized")
SMALL = ("--num_clients", 4, "--participation", 0.5, "--local_optimizer", "sgd", "--num_hparams", 1)
SPARSE = ("--eval_every", 3)  # which divides neither 4 nor 7: a sweep of those evaluates them only as the last
KEEP = "--keep_checkpoints"


def files_named(name, out):
    return sorted(out.rglob(name))


def first_lines(out):
    return [path.read_text().splitlines() for path in files_named("server.log", out)]


@pytest.mark.parametrize("kept", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["kept", "computed again"])
def test_more_rounds_are_those_of_a_sweep_that_had_them_from_the_start(launch_here, tmp_path, kept):
    """Of clients that are sampled and of models that only the end of a sweep evaluates, twice in a row."""
    out, options = tmp_path / "out", ("--algorithm", *STATES, *SMALL, *SPARSE, *([KEEP] if kept else []))
    assert launch_here(tmp_path / "whole", *options, "--rounds", 8).returncode == 0
    for before, rounds in ((0, 4), (4, 7), (7, 8)):
        launched = launch_here(out, *options, "--rounds", rounds)
        assert launched.returncode == 0, launched.stderr
        assert (f"resumes after round {before}" in first_lines(out)[0]) == (kept and before > 0)
        assert len(files_named(KEPT, out)) == len(STATES) * kept and not files_named(CHECKPOINT, out)
        said = f"{len(STATES) * kept} resume from kept checkpoints, {len(STATES) * (not kept)} start again"
        assert (said in launched.stderr) == (before > 0)
    assert results(out) == results(tmp_path / "whole") and len(results(out)) == len(STATES)
    runs = json.loads(files_named("results.json", out)[0].read_text())["provenance"]["runs"]
    assert [run["round"] for run in runs] == ([0, 4, 7] if kept else [0])


@pytest.mark.slow
def test_the_best_model_and_the_events_are_those_of_all_rounds(launch_here, tmp_path):
    """The best model of four rounds is the last, which a sweep of more rounds does not evaluate."""
    options = (*STATEFUL, *SPARSE, "--hparams", '{"learning_rate": 0.01}', "--save_model", "--tensorboard")
    assert launch_here(tmp_path / "whole", *options, "--rounds", 7).returncode == 0
    assert launch_here(tmp_path / "out", *options, "--rounds", 4, KEEP).returncode == 0
    trial = trial_of(tmp_path / "out")
    short = json.loads((trial / "results.json").read_text())["curves"]["val_acc"]
    assert max(short[2:3]) < short[3] and short.count(None) == 2
    without = shutil.copytree(tmp_path / "out", tmp_path / "without")

    assert launch_here(tmp_path / "out", *options, "--rounds", 7).returncode == 0
    assert "resumes after round 4" in (trial / "server.log").read_text()
    assert results(tmp_path / "out") == results(tmp_path / "whole")
    one, other = (torch.load(trial_of(tmp_path / name) / MODEL, weights_only=True) for name in ("out", "whole"))
    assert all(one[name].equal(other[name]) for name in one)
    assert events_of(trial) == events_of(trial_of(tmp_path / "whole"))

    launched = launch_here(without, *options[:-2], "--rounds", 7)
    assert "The files of --save_model for 1 of them are removed with their results" in launched.stderr
    assert results(without) == results(tmp_path / "whole") and not files_named(MODEL, without) + files_named(EVENTS, without)


@pytest.mark.slow
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "computed again"])
def test_the_results_stay_until_those_of_all_rounds_take_their_place(launch_here, call, tmp_path, kept):
    """Also if the launch is killed, and killed again."""
    options = (*STATEFUL, "--eval_every", 7, *([KEEP] if kept else []))
    out = tmp_path / "out"
    assert launch_here(tmp_path / "whole", *options, "--rounds", 80).returncode == 0
    assert launch_here(out, *options, "--rounds", 20).returncode == 0
    before = results(out)
    for round in (40, 60):
        trial = kill_after(Sweep(out, *map(str, options), "--rounds", "80"), round)
        assert results(out) == before and (trial / KEPT).exists() == kept
        shown = call("sweep.py", "status", "--output_dir", out, "--num_hparams", 1, "--num_trials", 1).stdout
        assert "Incomplete: " in shown and "0/1 trials done (1 with 20 of 80 rounds), " in shown
        found = collect([out])
        assert len(found.rounds) == 20 and [each.rounds for each in found.settings.values()] == [20]
        assert "is to have 80 rounds, and all of its trials here have 20" in ignored(found)[0]
    assert launch_here(out, *options, "--rounds", 80).returncode == 0
    assert results(out) == results(tmp_path / "whole")
    runs = json.loads((trial / "results.json").read_text())["provenance"]["runs"]
    assert (runs[1]["round"] == 20) == kept and runs[-1]["round"] >= 60
    assert ignored(collect([out])) == []


class KilledError(BaseException):
    """In place of a kill, which cannot be timed to fall between two renames."""


@pytest.mark.parametrize("renames", range(4))
def test_a_kill_between_two_renames_leaves_results_that_can_be_read(tmp_path, monkeypatch, renames):
    """Killed twice after so many renames, the trial has its old results or the new ones, whole; the next attempt ends it."""
    out, replace = tmp_path / "out", os.replace
    short, long = (
        make_trial(directory, 0, 0, [[0.1] * rounds] * 2, [0.1] * rounds)
        for directory, rounds in ((out, 2), (tmp_path / "long", 4))
    )
    shutil.copy(long.parents[1] / "sweep.json", short.parents[1])
    this, content = Trial(Settings(rounds=4), {}, 0, 0, short), json.loads((long / "results.json").read_text())
    with np.load(long / "clients.npz") as members:
        clients = dict(members)

    def replace_or_die(*paths):
        calls.append(paths)
        if len(calls) > renames:
            raise KilledError
        replace(*paths)

    for _ in range(2):
        calls = []
        with monkeypatch.context() as patch, contextlib.suppress(KilledError):
            patch.setattr(os, "replace", replace_or_die)
            this.write_results(content, clients)
        found = collect([out])
        assert found.broken == [] and len(found.rounds) == this.rounds_done() and this.rounds_done() in (2, 4)
    this.write_results(content, clients)
    this.forget_attempts()
    assert sorted(path.name for path in short.iterdir()) == ["clients.npz", "done", "results.json"]
    assert results(out) == results(tmp_path / "long")


def test_rounds_grow_only_as_asked_and_confirmed(launch_here, call, finished_copy):
    out = finished_copy
    (sweep_file,) = out.glob("*/sweep.json")
    before = results(out), sweep_file.read_text()
    sweep = ("--output_dir", out, "--samples_per_client", 40, "--num_hparams", 2, "--num_trials", 1)
    for options, message in (
        (("--rounds", 1), "--rounds is 1 here and 2 in the sweep that"),
        ((), "give --rounds=2 to resume it, --rounds=50 to extend it, or another --output_dir for a new one"),
        (("--rounds", 3, 4), "--rounds 3 4: it takes one value"),
        (("--rounds", 3), "there is no terminal to ask for confirmation"),
    ):
        refused = call("sweep.py", "launch", *sweep, *options)
        assert refused.returncode == 2 and message in refused.stderr.splitlines()[-1]
    assert "trials left: 2, rounds left: 6." in refused.stderr
    assert "0 resume from kept checkpoints, 2 start again" in refused.stderr
    assert (results(out), sweep_file.read_text()) == before
    assert "2 jobs: 2 done" in call("sweep.py", "status", "--output_dir", out, *sweep[4:]).stdout

    assert launch_here(out, "--rounds", 3, "--num_hparams", 1).returncode == 0  # one set of two
    assert json.loads(sweep_file.read_text())["settings"]["rounds"] == 3
    shown = call("sweep.py", "status", "--output_dir", out, *sweep[4:], "--json").stdout
    assert [(job["state"], job["trials"][0]["rounds_done"]) for job in json.loads(shown)] == [("Done", 3), ("Incomplete", 2)]
    found = collect([out])
    assert found.rounds["round"].tolist() == [1, 2, 3] and len(found.not_done) == len(found.shorter) == 1
    assert "1 trials that are not done, 1 of them with results of fewer rounds" in ignored(found)[0]
    longer = next(path.parent for path in out.rglob("results.json") if rounds_done(path.parent) == 3)
    by_hand = call("server_benchmark.py", "--output_dir", longer, "--samples_per_client", 40, "--rounds", 2)
    assert by_hand.returncode == 2 and "holds results of 3 rounds: give --rounds=3" in by_hand.stderr.splitlines()[-1]
    deleted = call("sweep.py", "delete_incomplete", "--output_dir", out, "--skip_confirmation")
    assert "1 of their trials have results of fewer rounds, which are deleted, too" in deleted.stderr
    assert trial_of(out) == longer


@pytest.mark.slow
def test_kept_checkpoints_are_told_kept_used_and_deleted(launch_here, call, tmp_path):
    out, options = tmp_path / "out", ("--algorithm", "Scaffold", "Fedavg", "Ditto", "--num_clients", 5, "--num_hparams", 1)
    launched = launch_here(out, *options, "--local_optimizer", "sgd", KEEP, "--save_model", "--algorithm", "Scaffold", "Ditto")
    kept = files_named(KEPT, out)
    told = re.search(r"The checkpoints of 2 trials are kept: about ([0-9.]+) MB, of [0-9]+ MB free", launched.stderr)
    # one vector is 0.1 MB
    assert len(kept) == 2 and abs(sum(path.stat().st_size for path in kept) / 1e6 - float(told[1])) < 0.06

    again = launch_here(out, *options, "--local_optimizer", "sgd", "--num_trials", 2)  # keeps no more of them, and loses none
    assert again.returncode == 0 and files_named(KEPT, out) == kept
    longer = launch_here(out, *options, "--local_optimizer", "sgd", "--num_trials", 2, "--rounds", 3)
    assert "These checkpoints are removed as their trials end: --keep_checkpoints keeps new ones." in longer.stderr
    assert "2 resume from kept checkpoints, 4 start again" in longer.stderr and not files_named(KEPT, out)
    assert launch_here(out, *options, "--local_optimizer", "sgd", "--num_trials", 2, "--rounds", 4, KEEP).returncode == 0
    assert len(files_named(KEPT, out)) == 6
    call("sweep.py", "delete_all", "--output_dir", out, "--skip_confirmation")
    assert not list(out.iterdir())


def test_a_trial_that_resumes_after_its_last_round_keeps_it(launch_here, tmp_path):
    out = tmp_path / "out"
    assert launch_here(out, *STATEFUL, KEEP).returncode == 0
    trial, before = trial_of(out), results(out)
    content = (trial / KEPT).read_bytes()
    (trial / KEPT).rename(trial / CHECKPOINT)
    (trial / "done").unlink()
    assert launch_here(out, *STATEFUL, KEEP).returncode == 0
    assert "resumes after round 2" in (trial / "server.log").read_text()
    assert results(out) == before and not (trial / CHECKPOINT).exists()
    assert len((trial / KEPT).read_bytes()) > len(content)  # one more run


def test_a_damaged_kept_checkpoint_is_as_good_as_none(launch_here, tmp_path):
    assert launch_here(tmp_path / "whole", *STATEFUL, "--rounds", 4).returncode == 0
    assert launch_here(tmp_path / "out", *STATEFUL, KEEP).returncode == 0
    trial = trial_of(tmp_path / "out")
    (trial / KEPT).write_bytes(b"PK\3\4")
    assert launch_here(tmp_path / "out", *STATEFUL, "--rounds", 4).returncode == 0
    assert f"{KEPT} is damaged" in (trial / "server.log").read_text()
    assert results(tmp_path / "out") == results(tmp_path / "whole")
