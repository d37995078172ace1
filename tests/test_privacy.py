"""User-level DP-FedAvg: what the server makes of updates, and the epsilon that results and tables say."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from helpers import make_trial, results
from scipy.stats import norm

import collect_results
from federated import algorithms, privacy
from federated.running import participants, private_average
from federated.settings import Settings

SIZE = 26_122  # parameters of the mlp on digits


def exact_delta(epsilon, noise_multiplier, rounds):
    """That of `rounds` Gaussian mechanisms on the same sum (Balle and Wang, ICML 2018, theorem 8)."""
    mean = math.sqrt(rounds) / noise_multiplier
    return norm.cdf(mean / 2 - epsilon / mean) - math.exp(epsilon) * norm.cdf(-mean / 2 - epsilon / mean)


@pytest.mark.parametrize(("noise_multiplier", "rounds"), [(1.0, 1), (4.0, 10), (10.0, 300)])
def test_epsilon_is_a_bound_near_the_exact_one_if_all_clients_take_part(noise_multiplier, rounds):
    settings = Settings(num_clients=10, rounds=rounds, dp_clip=3.0, dp_noise_multiplier=noise_multiplier)
    epsilon = privacy.epsilon(settings, 1e-5)
    assert exact_delta(epsilon, noise_multiplier, rounds) <= 1e-5 <= exact_delta(0.8 * epsilon, noise_multiplier, rounds)


def test_epsilon_is_less_with_sampling_and_grows_with_the_rounds_as_published():
    """Table 1 of McMahan et al. (ICLR 2018) has bounds that are a little larger, of an older accountant."""
    common = {"num_clients": 100_000, "participation": 0.001, "dp_clip": 1.0}
    published = {1: 0.97, 100: 1.00, 10_000: 1.18, 100_000: 2.21, 1_000_000: 7.50}
    for rounds, bound in published.items():
        assert 0.7 * bound < privacy.epsilon(Settings(**common, rounds=rounds), 1e5**-1.1) < bound
    assert privacy.epsilon(Settings(num_clients=100_000, dp_clip=1.0, rounds=100), 1e-5) > 50
    assert privacy.default_delta(Settings(**common)) == 1e5**-1.1 < privacy.default_delta(Settings()) == 1e-5


def test_changes_are_clipped_and_the_noise_is_that_of_the_sum():
    start = torch.linspace(-1, 1, 100_000)
    settings = Settings(num_clients=40, participation=0.25, dp_clip=2.0, dp_noise_multiplier=1.5)
    total = torch.zeros_like(start)
    short, long = torch.zeros_like(start), torch.zeros_like(start)
    short[7], long[8], long[9] = -0.5, 30, 40
    for change in (short, long):
        private_average.add(total, start + change, start, settings.dp_clip)
    assert total[7] == pytest.approx(-0.5) and total[8:10].tolist() == pytest.approx([1.2, 1.6])
    noiseless = total / 10 + start  # ten clients are expected, whatever came
    private_average.finish(total, start, settings, 0, 3)
    noise = (total - noiseless) * 10
    assert noise.std().item() == pytest.approx(3.0, rel=0.02) and abs(noise.mean().item()) < 0.05
    again, other = torch.zeros_like(start), torch.zeros_like(start)
    private_average.finish(again, start, settings, 0, 3)
    private_average.finish(other, start, settings, 0, 4)
    torch.testing.assert_close((again - start) * 10, noise, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(again, other, atol=0.1)


def test_each_client_takes_part_independently_with_the_chance_that_is_accounted_for():
    settings = Settings(num_clients=50, participation=0.1, dp_clip=1.0)
    rounds = [participants.receivers(settings, 0, round).tolist() for round in range(2000)]
    counts = np.array([len(chosen) for chosen in rounds])
    assert counts.min() == 0 and counts.mean() == pytest.approx(5, abs=0.2) and counts.var() == pytest.approx(4.5, abs=0.6)
    assert np.bincount([client for chosen in rounds for client in chosen], minlength=50).min() > 140
    assert all(chosen == sorted(set(chosen)) for chosen in rounds)


def test_nobody_straggles_or_is_lost_because_of_another_client():
    """Else adding a client would change the updates of others."""
    trouble = {"num_clients": 40, "straggler_fraction": 0.5, "dropout_fraction": 0.3, "dp_clip": 1.0}
    few, all_of_them = (Settings(**trouble, participation=participation) for participation in (0.3, 1.0))
    stragglers = lost = asked = 0
    for round in range(300):
        chosen, some = participants.receivers(few, 0, round).tolist(), participants.draw(few, 0, round)
        everybody = participants.draw(all_of_them, 0, round)
        assert some == {client: part for client, part in everybody.items() if client in chosen}
        asked, lost = asked + len(chosen), lost + len(chosen) - len(some)
        stragglers += sum(part < 1 for part in some.values())
    assert lost / asked == pytest.approx(0.3, abs=0.03) and stragglers / (asked - lost) == pytest.approx(0.5, abs=0.03)


def test_the_sum_is_divided_by_the_updates_that_are_expected_to_arrive():
    settings = Settings(num_clients=40, participation=0.25, dropout_fraction=0.2, dp_clip=2.0, dp_noise_multiplier=0.0)
    total, start = torch.full((5,), 4.0), torch.ones(5)
    private_average.finish(total, start, settings, 0, 0)
    assert total.tolist() == [1.5] * 5


@pytest.mark.parametrize(
    "algorithm", [name for name in algorithms.REGISTRY if algorithms.can_be_private(algorithms.load(name))]
)
def test_without_noise_and_with_a_large_norm_it_is_the_average_with_equal_weights(train, algorithm):
    """Of clients with equally many samples, whom the algorithms themselves weigh the same; but for rounding."""
    plain = train(algorithm, rounds=1)
    private = train(algorithm, rounds=1, dp_clip=1e6, dp_noise_multiplier=0.0)
    torch.testing.assert_close(private.broadcast, plain.broadcast, rtol=1e-4, atol=1e-6)


def test_clients_of_unequal_size_count_the_same(train):
    options = {"partition": "quantity", "samples_per_client": None, "rounds": 1, "dp_clip": 1e6, "dp_noise_multiplier": 0.0}
    run = train("Fedavg", {"dropout_rate": 0.0}, **options)
    plain = train("Fedavg", {"dropout_rate": 0.0}, **{**options, "dp_clip": None, "dp_noise_multiplier": None})
    assert not torch.allclose(run.broadcast, plain.broadcast, rtol=1e-2, atol=1e-3)
    clipped = train("Fedavg", {"dropout_rate": 0.0}, **{**options, "dp_clip": 1e-3})
    start = train("Fedavg", {"dropout_rate": 0.0, "learning_rate": 0.0}, **options).broadcast
    assert (clipped.broadcast - start).norm() == pytest.approx(1e-3, rel=0.2)  # three changes of that norm, much alike


def test_a_round_in_which_nobody_takes_part_adds_noise_alone(train):
    """As its emptiness must not show; nor that all updates are lost."""
    options = {"num_clients": 4, "participation": 0.25, "rounds": 8, "samples_per_client": 40, "dropout_fraction": 0.6}
    run = train("Fedavgm", dp_clip=0.01, **options)
    sent, taking = (
        [list(each(run.settings, run.trial.trial_seed, round)) for round in range(8)]
        for each in (participants.receivers, participants.draw)
    )
    assert [] in sent and any(ours and not arrived for ours, arrived in zip(sent, taking))
    weights = [arrays["broadcast"][0] for arrays in run.rounds]
    assert all(not np.array_equal(one, other) for one, other in itertools.pairwise(weights))
    curves = json.loads((run.trial.directory / "results.json").read_text())["curves"]
    assert curves["bytes_sent"] == [(len(ours) + len(arrived)) * 4 * SIZE for ours, arrived in zip(sent, taking)]
    assert [value is None for value in curves["train_loss"]] == [not chosen for chosen in taking]


@pytest.mark.slow
def test_results_are_the_same_for_any_processes_and_after_a_break(launch_here, tmp_path, capsys):
    options = (
        "--algorithm", "Fedavg", "Ditto", "--dp_clip", 0.5, "--dp_noise_multiplier", 0.3, "--num_clients", 5, "--participation",
        0.4, "--samples_per_client", 60, "--compression", "topk", "--num_hparams", 1, "--num_trials", 1, "--rounds", 4,
    )  # fmt: skip
    for processes in (1, 3):
        launched = launch_here(tmp_path / str(processes), *options, "--client_processes", processes)
        assert launched.returncode == 0, launched.stderr
    for rounds in (2, 4):
        assert launch_here(tmp_path / "more", *options, "--rounds", rounds, "--keep_checkpoints").returncode == 0
    found = results(tmp_path / "1")
    assert len(found) == 2 and found == results(tmp_path / "3") == results(tmp_path / "more")
    for record in found.values():
        said = record["privacy"]
        assert said["epsilon"] == privacy.epsilon(Settings(**record["settings"]), 1e-5) and said["delta"] == 1e-5
        assert said["accountant"].startswith("dp-accounting ") and "Poisson" in said["sampling"]
    assert collect_results.main(["--output_dir", str(tmp_path / "1")]) == 0
    assert f"| {said['epsilon']:.2f} " in capsys.readouterr().out


def test_the_table_says_epsilon_and_what_it_takes_for_granted(tmp_path, capsys):
    common = {"num_clients": 2, "rounds": 2}
    kinds = ({}, {"dp_clip": 1.0}, {"dp_clip": 1.0, "dp_noise_multiplier": 0.0}, {"dp_clip": 2.0, "dp_noise_multiplier": 5.0})
    for kind in kinds:
        make_trial(tmp_path, 0, 0, [[0.5, 0.6]] * 2, [0.5, 0.6], Settings(**common, **kind))

    def collected(*options):
        assert collect_results.main(["--output_dir", str(tmp_path), *options]) == 0
        return capsys.readouterr().out

    out = collected()
    head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("|")]
    expected = {row[head.index("dp_clip")] + row[head.index("dp_noise_multiplier")]: row[head.index("Epsilon")] for row in rows}
    one, five = (privacy.epsilon(Settings(**common, **kind), 1e-5) for kind in (kinds[1], kinds[3]))
    assert expected == {"––": "∞", "1.01.0": f"{one:.2f}", "1.00.0": "∞", "2.05.0": f"{five:.2f}"}
    assert "Epsilon at delta 1e-05" in out and "(Poisson)" in out and "one client more or less" in out
    found = json.loads(collected("--format", "json", "--delta", "0.01"))
    weaker = privacy.epsilon(Settings(**common, **kinds[3]), 0.01)
    assert [best["delta"] for best in found["results"]] == [0.01] * 4 and weaker < five
    assert [best["epsilon"] for best in found["results"]][-1] == pytest.approx(weaker)
    assert f"dp_clip=2.0, dp_noise_multiplier=5.0 {five:.2f}" in collected("--columns", "dp_clip", "dp_noise_multiplier")
    assert r"$\infty$" in collected("--format", "latex")


def test_without_the_accountant_the_table_says_what_to_install(run_without, tmp_path):
    make_trial(tmp_path, 0, 0, [[0.5]] * 2, [0.5], Settings(dp_clip=1.0))
    done = run_without("dp_accounting", "collect_results", "--output_dir", tmp_path)
    assert done.returncode == 0 and "No epsilon, as dp-accounting is not installed: pip install dp-accounting" in done.stdout


def test_a_table_without_private_trials_says_nothing_of_it(tmp_path, capsys):
    make_trial(tmp_path, 0, 0, [[0.5]] * 2, [0.5])
    assert collect_results.main(["--output_dir", str(tmp_path)]) == 0
    assert "psilon" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--dp_noise_multiplier", "1"), "--dp_noise_multiplier 1.0 has no effect without --dp_clip"),
        (("--dp_clip", "1", "--algorithm", "fednova"), "fednova is not among the algorithms whose server takes no more"),
        (("--dp_clip", "1", "--model_arch", "resnet18"), "--dp_clip: --model_arch resnet18 keeps statistics"),
    ],
)
def test_what_makes_no_sense_is_one_line(call, tmp_path, options, message):
    refused = call("sweep.py", "launch", "--skip_confirmation", "--output_dir", tmp_path / "out", *options)
    assert refused.returncode == 2 and not (tmp_path / "out").exists()
    assert message in refused.stderr.splitlines()[-1]
