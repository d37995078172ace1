"""What arrives of uploads that are compressed, what is left for later, and what they count."""

import json

import numpy as np
import pytest
import torch
from helpers import results
from pretended_device import prepare

from federated import algorithms, models
from federated.data import datasets
from federated.learning import compression
from federated.learning.flat import Flat
from federated.settings import Settings
from federated.study import combinations, sweeps_of
from federated.trial import RESULTS

SIZE = 26_122  # parameters of the mlp on digits
ONE_VECTOR = [name for name in algorithms.REGISTRY if algorithms.load(name).uploads == 1]


def test_topk_sends_the_largest_magnitudes():
    update = torch.tensor([0.5, -3.0, 0.0, 2.0, -1.0])
    for ratio, sent in ((0.4, [0, -3, 0, 2, 0]), (0.6, [0, -3, 0, 2, -1]), (1e-9, [0, -3, 0, 0, 0])):
        assert compression.topk(update, ratio).tolist() == sent


def test_topk_sends_in_time_all_that_was_there():
    """What was sent and what is left are the updates together; in whole numbers to the bit."""
    settings, generator = Settings(compression="topk", compression_ratio=0.2), torch.Generator().manual_seed(0)
    memory = torch.zeros(50)
    updates = torch.randint(-100, 100, (30, 50), generator=generator).float()
    for number, update in enumerate(updates.clone()):
        compression.compress(update, memory, settings, generator)
        assert update.count_nonzero() == 10
        updates[number] -= update
    assert torch.equal(updates.sum(0), memory) and memory.abs().max() < 1000


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_quantize_is_right_on_average_and_its_variance_is_known(bits):
    """Exactly, over all chances of a grid that the entries lie on."""
    levels = 2 ** (bits - 1) - 1
    places = torch.tensor([0.0, 0.25, -0.25, 0.75, -0.5, 1.0, -1.0]) * levels  # between -levels and levels, in levels
    places = (places * 8).round() / 8
    update = 3.5 * places / levels
    sent = torch.stack(
        [compression.quantize(update, bits, torch.full_like(update, (step + 0.5) / 8)) for step in range(8)]
    ).double()
    fraction = (places - places.floor()).double()
    torch.testing.assert_close(sent.mean(0), update.double(), rtol=1e-6, atol=1e-7)
    variance = (3.5 / levels) ** 2 * fraction * (1 - fraction)
    torch.testing.assert_close(sent.var(0, correction=0), variance, rtol=1e-5, atol=1e-7)
    assert len(sent.div(3.5 / levels).round().unique()) <= 2 * levels + 1
    torch.testing.assert_close(sent.div(3.5 / levels), sent.div(3.5 / levels).round(), rtol=1e-6, atol=1e-6)


def test_each_bucket_has_a_scale_of_its_own_and_zeros_stay():
    update = torch.cat([torch.full((compression.BUCKET,), 1e-3), torch.zeros(compression.BUCKET), torch.tensor([-7.0, 0.0])])
    sent = compression.quantize(update, 2, torch.rand(len(update), generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(sent, update)


def test_ratio_1_and_32_bits_are_no_compression(train):
    plain = train()
    for settings in ({"compression": "topk", "compression_ratio": 1.0}, {"compression": "quantize", "bits": 32}):
        run = train(**settings)
        assert torch.equal(run.broadcast, plain.broadcast)
        assert run.rounds[-1].keys() == plain.rounds[-1].keys()  # clients keep no more
    for settings in ({"compression": "topk"}, {"compression": "quantize", "bits": 2}):
        assert not torch.allclose(train(**settings).broadcast, plain.broadcast)


def test_pooled_data_are_not_sent(train):
    plain, compressed = train("Centralized"), train("Centralized", compression="topk")
    assert torch.equal(compressed.broadcast, plain.broadcast)
    sent = [json.loads((run.trial.directory / RESULTS).read_text())["curves"]["bytes_sent"] for run in (plain, compressed)]
    assert sent[0] == sent[1]


def test_many_bits_are_near_no_compression(train):
    torch.testing.assert_close(train(compression="quantize", bits=20).broadcast, train().broadcast, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("algorithm", ["Fedavg", "Fedbabu", "Fedper"])
def test_the_server_moves_by_what_was_sent_and_clients_keep_the_rest(train, monkeypatch, algorithm):
    """Over rounds in which two of three clients train, whose state beside is where it was."""
    seen, seeds = [], set()
    compress = compression.compress

    def watched(update, memory, settings, generator):
        before = update.clone()
        compress(update, memory, settings, generator)
        seen.append((before, update.clone(), memory.clone()))
        seeds.add(generator.initial_seed())

    monkeypatch.setattr(compression, "compress", watched)
    settings = {"participation": 0.67, "optimizer_state": "keep", "rounds": 5}
    run = train(algorithm, {"momentum": 0.9}, compression="topk", compression_ratio=0.05, **settings)
    assert len(seen) == len(seeds) == 10 and all(sent.count_nonzero() == round(0.05 * SIZE) for _, sent, _ in seen)
    starts = [torch.from_numpy(arrays["broadcast"][0]) for arrays in run.rounds]
    for number in range(1, 5):
        step = (seen[2 * number][1] + seen[2 * number + 1][1]) / 2  # of clients with equally many samples
        torch.testing.assert_close(starts[number] - starts[number - 1], step, rtol=1e-4, atol=1e-6)
    kept = [torch.from_numpy(run.rounds[-1][f"client_{client}"][-SIZE:]) for client in range(3)]
    left = sum(before.double() - sent.double() for before, sent, _ in seen)
    torch.testing.assert_close(sum(each.double() for each in kept), left, rtol=1e-5, atol=1e-6)
    assert all(any(torch.equal(each, memory) for _, _, memory in seen) for each in kept)
    if algorithm == "Fedper":  # what never leaves a client is not sent
        head = slice(-1290, None)
        assert all(not sent[head].any() for _, sent, _ in seen)


def test_batchnorms_statistics_are_sent_as_they_are():
    """With noise from few bits a variance could be negative."""
    settings = {"model_arch": "resnet18", "compression": "quantize", "bits": 2, "samples_per_client": 10}
    worker, memory, updates = prepare("cpu", "Fedavg", **settings)
    memory.broadcast[0] = worker.model.flat.weights
    worker.receive()
    client = worker.train(0, 0)
    worker.upload(client, updates[0])
    flat = worker.model.flat
    assert flat.size > flat.num_parameters
    assert torch.equal(updates[0, 0, flat.num_parameters :], client.weights[flat.num_parameters :])
    assert not torch.allclose(updates[0, 0], client.weights)


@pytest.mark.parametrize(
    ("settings", "sent"),
    [
        ({}, 4 * SIZE),
        ({"compression": "topk"}, 15_346),  # 2,612 values of 32 bits, with indices of 15
        ({"compression": "topk", "compression_ratio": 0.9}, 4 * SIZE),  # all entries take less
        ({"compression": "quantize"}, SIZE + 52 * 4),  # 52 buckets
        ({"compression": "quantize", "bits": 3}, 10_004),
        ({"compression": "quantize", "bits": 32}, 4 * SIZE),
    ],
)
def test_bytes_sent_are_those_of_the_encoded_message(settings, sent):
    flat = Flat(models.build("mlp", datasets.REGISTRY["digits"], 0.0, 0))
    assert compression.message_bytes(Settings(**settings), flat) == sent


@pytest.mark.slow
@pytest.mark.parametrize("names", [["Fedavg", "Fedbabu", "Ditto"], pytest.param(ONE_VECTOR, id="all")])
def test_results_are_the_same_for_any_processes_and_after_a_break(launch_here, tmp_path, names):
    options = (
        "--algorithm", *names, "--compression", "topk", "quantize", "--bits", 4, "--num_clients", 4, "--participation", 0.5,
        "--samples_per_client", 100, "--num_hparams", 1, "--num_trials", 1, "--rounds", 4,
    )  # fmt: skip
    for processes in (1, 3):
        launched = launch_here(tmp_path / str(processes), *options, "--client_processes", processes)
        assert launched.returncode == 0, launched.stderr
    for rounds in (2, 4):
        more = ("--rounds", rounds, "--keep_checkpoints")
        assert launch_here(tmp_path / "more", *options, *more).returncode == 0
    found = results(tmp_path / "1")
    assert len(found) == 2 * len(names) and found == results(tmp_path / "3") == results(tmp_path / "more")
    topk = json.loads((tmp_path / "1" / next(path for path in found if "Fedavg,n" in path and "topk" in path)).read_text())
    assert topk["curves"]["bytes_sent"] == [2 * (4 * SIZE + 15_346)] * 4


def test_a_setting_without_effect_makes_no_sweep_of_its_own(tmp_path):
    axes = {"compression": ["none", "topk", "quantize"], "compression_ratio": [0.1, 0.01], "bits": [4]}
    sweeps = sweeps_of(combinations(axes), tmp_path)
    names = [each.name.removeprefix("mlp_digits_Fedavg") for each in sweeps]
    topk = ["compression=topk", "compression=topk,compression_ratio=0.01"]
    assert names == ["", *(f",{each}" for each in topk), ",compression=quantize,bits=4"]
    assert {(each.compression_ratio, each.bits) for each in sweeps} == {(None, None), (0.1, None), (0.01, None), (None, 4)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--compression", "topk", "--algorithm", "scaffold"),
            "scaffold sends 2 vectors; it is for those that send one: Fedavg",
        ),
        (("--bits", "4"), "--bits 4 has no effect under --compression none, only under quantize"),
        (
            ("--compression", "quantize", "--compression_ratio", "0.1"),
            "no effect under --compression quantize, only under topk",
        ),
    ],
)
def test_what_makes_no_sense_is_one_line(call, tmp_path, options, message):
    refused = call("sweep.py", "launch", "--skip_confirmation", "--output_dir", tmp_path / "out", *options)
    assert refused.returncode == 2 and not (tmp_path / "out").exists()
    assert message in refused.stderr.splitlines()[-1]


@pytest.mark.slow
def test_compression_reaches_the_accuracy_of_none_with_fewer_bytes(train):
    """So that error feedback and rounding are worth something: a tenth of the entries, or four bits of each."""
    runs = {
        name: train("Fedavg", {"dropout_rate": 0.0}, rounds=30, samples_per_client=None, **settings)
        for name, settings in {
            "none": {}, "topk": {"compression": "topk"}, "quantize": {"compression": "quantize", "bits": 4},
        }.items()
    }  # fmt: skip
    accuracy = {name: run.rounds[-1]["val"][-2, 1] for name, run in runs.items()}
    assert all(np.nanmean(accuracy[name]) > np.nanmean(accuracy["none"]) - 0.03 for name in runs), accuracy
