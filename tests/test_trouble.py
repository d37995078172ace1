"""Stragglers and lost updates: who they are, what they did, and what they leave."""

import collections
import functools
import json

import numpy as np
import pytest
import torch
from helpers import STATEFUL, Sweep, call, kill_after, launch, results
from in_process import SEED

from federated.running import participants
from federated.settings import Settings
from federated.trial import CLIENTS, RESULTS

TEN = {"num_clients": 20, "participation": 0.5}  # participants


def draws(rounds=200, **settings):
    return [participants.draw(Settings(**TEN, **settings), SEED, round) for round in range(rounds)]


def test_a_fraction_of_each_rounds_participants_straggle_and_drop_out():
    everybody = draws()
    assert {len(each) for each in everybody} == {10} and {part for each in everybody for part in each.values()} == {1.0}
    stragglers, arrived = draws(straggler_fraction=0.3), draws(straggler_fraction=0.3, dropout_fraction=0.4)
    assert [list(each) for each in stragglers] == [list(each) for each in everybody]
    assert {sum(part < 1 for part in each.values()) for each in stragglers} == {3}
    assert {len(each) for each in arrived} == {6}
    for each, all_of_them in zip(arrived, stragglers):  # whose work is a function of nothing else
        assert each.items() <= all_of_them.items() and list(each) == sorted(each)
    assert len({client for each in arrived for client in each}) == 20


@pytest.mark.parametrize("fraction", [0.03, 0.25, 0.97])
def test_a_fraction_that_is_no_whole_number_holds_on_average(fraction):
    counts = [sum(part < 1 for part in each.values()) for each in draws(4000, straggler_fraction=fraction)]
    assert set(counts) == {int(10 * fraction), int(10 * fraction) + 1}
    assert np.mean(counts) == pytest.approx(10 * fraction, abs=0.05)


def test_a_straggler_does_each_number_of_epochs_equally_often():
    """Whole ones, from one to all; of a single epoch each number of batches."""
    parts = [part for each in draws(2000, straggler_fraction=0.5) for part in each.values() if part < 1]
    for epochs, batches, expected in ((4, 7, [7, 14, 21, 28]), (1, 5, [1, 2, 3, 4, 5]), (3, 1, [1, 2, 3]), (1, 1, [1])):
        counts = collections.Counter(participants.batches_of(part, epochs, batches) for part in parts)
        assert sorted(counts) == expected
        assert max(counts.values()) / min(counts.values()) < 1.1
        assert participants.batches_of(1.0, epochs, batches) == epochs * batches


def test_a_straggler_begins_as_it_would_have_gone_on(train, monkeypatch):
    """One that does one of three epochs does what it does if there is one only; with one batch an epoch and one epoch there
    is nothing less."""
    hparams = {"momentum": 0.9}
    alone = train("Fedavg", hparams, rounds=1)
    monkeypatch.setattr(participants, "draw", lambda settings, *_: dict.fromkeys(range(settings.num_clients), 0.0))
    assert torch.equal(train("Fedavg", hparams, rounds=1, local_epochs=3).broadcast, alone.broadcast)
    monkeypatch.undo()
    full = {"batch_size": 1000}
    straggling = train("Fedavg", full, straggler_fraction=1.0)
    assert torch.equal(straggling.broadcast, train("Fedavg", full).broadcast)


ALGORITHMS = ("Fedavg", "Scaffold", "Feddyn", "Feddc", "Moon", "Ditto", "Fedrep", "Pfedme", "Fedala", "Local", "Fednova")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_client_whose_update_is_lost_keeps_what_it_had(train, algorithm):
    """What it keeps between rounds is that of its last round that arrived, for each way to keep something."""
    state = {} if algorithm == "Fednova" else {"optimizer_state": "keep"}
    run = train(algorithm, num_clients=5, rounds=6, dropout_fraction=0.5, straggler_fraction=0.5, local_epochs=2, **state)
    before, moved = {}, 0
    for round in range(6):
        rows = {name: row for name, row in run.rounds[round].items() if name.startswith("client_")}
        arrived = {f"client_{client}" for client in participants.draw(run.settings, SEED, round)}
        assert 2 <= len(arrived) <= 3
        assert {int(name.removeprefix("client_")) for name in arrived} == set(
            np.flatnonzero(np.isfinite(run.rounds[-1]["train"][round, 0]))
        )
        for name in rows.keys() | before.keys():
            same = name in rows and name in before and np.array_equal(rows[name], before[name])
            assert same == (name not in arrived)
            moved += not same
        before = rows
    assert moved or algorithm in ("Fedavg", "Fednova")


def test_a_round_whose_updates_are_all_lost_leaves_the_model_as_it_is(train):
    """And the server's momentum. What it sent is counted."""
    run = train("Fedavgm", num_clients=1, rounds=8, dropout_fraction=0.5)
    arrived = [len(participants.draw(run.settings, SEED, round)) for round in range(8)]
    assert set(arrived) == {0, 1}
    vector = 4 * run.broadcast.shape[1]
    for round in range(1, 8):
        for name in ("broadcast", "server_state"):
            same = np.array_equal(run.rounds[round][name], run.rounds[round - 1][name])
            assert same == (arrived[round] == 0)
    curves = json.loads((run.trial.directory / RESULTS).read_text())["curves"]
    assert [loss is None for loss in curves["train_loss"]] == [count == 0 for count in arrived]
    assert curves["bytes_sent"] == [vector * (1 + count) for count in arrived]
    assert None not in curves["val_acc"]


def test_pooled_data_have_neither(train):
    trouble = {"straggler_fraction": 0.9, "dropout_fraction": 0.9}
    assert torch.equal(train("Centralized", **trouble).broadcast, train("Centralized").broadcast)


@pytest.mark.parametrize("algorithm", ["Fedavg", "Finetune"])
def test_moments_start_at_zero_if_updates_may_be_lost(algorithm):
    assert Settings(algorithm=algorithm).optimizer_state == "keep"
    assert Settings(algorithm=algorithm, straggler_fraction=0.5).optimizer_state == "keep"
    assert Settings(algorithm=algorithm, dropout_fraction=0.5).optimizer_state == "reset"


TROUBLE = ("--straggler_fraction", "0.5", "--dropout_fraction", "0.7", "--local_epochs", "2")


@pytest.mark.slow
@pytest.mark.process
def test_the_same_bits_for_any_number_of_processes_and_after_a_kill(tmp_path):
    """A study over both, of which one trial loses all updates of some rounds; its results are read."""
    options = (*STATEFUL, "--algorithm", "Fedavg", "Ditto", *TROUBLE[:3], "0", *TROUBLE[3:], "--rounds", "40")
    start = functools.partial(call, tmp_path)
    for name, processes in (("one", 1), ("three", 3)):
        launched = launch(start, tmp_path / name, *options, "--client_processes", processes)
        assert launched.returncode == 0, launched.stderr
    undisturbed = results(tmp_path / "one")
    assert len(undisturbed) == 4 and undisturbed == results(tmp_path / "three")
    trials = [path.parent for path in (tmp_path / "one").rglob(RESULTS)]
    lost = [None in json.loads((trial / RESULTS).read_text())["curves"]["train_loss"] for trial in trials]
    assert sorted(lost) == [False, False, True, True]
    killed = (*STATEFUL, "--algorithm", "Ditto", *TROUBLE, "--rounds", "40")
    kill_after(Sweep(tmp_path / "killed", *killed), 10)
    launched = launch(start, tmp_path / "killed", *killed)
    assert launched.returncode == 0, launched.stderr
    ((path, content),) = results(tmp_path / "killed").items()
    assert "straggler_fraction=0.5,dropout_fraction=0.7" in path and undisturbed[path] == content
    table = call(tmp_path, "collect_results.py", "--output_dir", "one", "--columns", "dropout_fraction")
    assert table.returncode == 0 and "dropout_fraction=0.7" in table.stdout, table.stderr
    with np.load(trials[0] / CLIENTS) as clients:
        assert clients["train_loss"].shape == (4, 40)
