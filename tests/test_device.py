"""What a GPU asks of the code, shown on machines without one: see pretended_device.py. What only a GPU can show is in
test_gpu.py."""

import functools
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import PROJECT
from pretended_device import CASES, NAME, prepare, two_rounds

from federated import algorithms, models
from federated.data import datasets
from federated.learning.client import TrainingClient

# Tensors keep no number of their CPU, so that .to() always copies to this one, as it does to a GPU.
APART = torch.device("cpu:0")

SLOW = {number for number, case in enumerate(CASES) if "resnet18" in case.values()}
each_case = pytest.mark.parametrize(
    "number",
    [
        pytest.param(number, id="-".join(map(str, case.values())), marks=[pytest.mark.slow] * (number in SLOW))
        for number, case in enumerate(CASES)
    ],
)


@each_case
def test_a_device_with_memory_of_its_own_gives_the_same_bits(number):
    torch.set_num_threads(1)
    tensor = torch.zeros(1)
    assert tensor.to("cpu") is tensor
    assert tensor.to(APART).data_ptr() != tensor.data_ptr()
    shared, apart = (prepare(device, **CASES[number]) for device in ("cpu", APART))
    assert two_rounds(*shared) == two_rounds(*apart)
    for name in shared[1].shapes:
        assert np.array_equal(getattr(shared[1], name), getattr(apart[1], name)), name
    assert shared[1].clients[0, :1].all()


@functools.cache
def observed(are_slow):
    """{number: what pretended_device.py prints of that one of CASES} of the slow ones or of the others."""
    numbers = [number for number in range(len(CASES)) if (number in SLOW) == are_slow]
    done = subprocess.run(
        [sys.executable, PROJECT / "tests" / "pretended_device.py", *map(str, numbers)],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
    )
    return dict(zip(numbers, map(json.loads, done.stdout.splitlines()), strict=True))


def moved(results, device):
    return [what for what, where, is_moved in results if is_moved and where == device]


@pytest.mark.process
@each_case
def test_training_never_waits_for_the_device(number):
    """A turn begins with what the client keeps and the order of its samples going there, however many its steps; the samples
    are there, and nothing comes back."""
    seen = observed(number in SLOW)[number]
    assert "error" not in seen
    few, many = seen["training"], seen["training_in_more_steps"]
    assert len(many) > len(few) or CASES[number]["algorithm"] == "Fedsgd"
    assert moved(few, NAME) == moved(many, NAME)
    assert not moved(few, "cpu")
    assert not [what for what in moved(few, NAME) if "uint8" in what]


@pytest.mark.process
@each_case
def test_an_upload_brings_home_the_update_and_the_row_once_and_takes_nothing_there(number):
    """So what the row of updates still holds, the update of another client, is not copied to be overwritten."""
    seen = observed(number in SLOW)[number]
    update, row = seen["sizes"]
    assert not moved(seen["upload"], NAME)
    brought = [math.prod(json.loads(what.partition(" ")[2])) for what in moved(seen["upload"], "cpu")]
    assert brought == [update, row]


@each_case
def test_a_row_changes_when_it_is_stored(number):
    worker, memory, updates = prepare(APART, **CASES[number])
    worker.receive()
    before = memory.clients.copy()
    client = worker.train(0, 0)
    assert np.array_equal(memory.clients, before)
    assert client.is_new and worker.row_of(0).rounds == 0
    worker.upload(client, updates[0])
    keeps = memory.clients.shape[1] > 0
    assert worker.row_of(0).rounds == keeps
    assert np.array_equal(memory.clients[0, 1:], torch.cat([client.row._row, client.row.memory])[1:])
    assert np.array_equal(memory.clients[1:], before[1:])


@each_case
def test_evaluation_leaves_no_trace(number):
    """Neither in the memory, but for its own rows, nor in the training that follows."""
    runs = [prepare(device, **CASES[number]) for device in ("cpu", "cpu", APART)]
    for worker, memory, updates in runs:
        memory.broadcast[0] = worker.model.flat.weights
        worker.receive()
        worker.upload(worker.train(0, 0), updates[0])
    for worker, memory, _ in runs[1:]:
        before = {name: getattr(memory, name).copy() for name in memory.shapes}
        worker.evaluate(range(len(memory.evaluation)), 0)
        for name in before.keys() - {"evaluation"}:
            assert np.array_equal(getattr(memory, name), before[name]), name
        assert not np.array_equal(memory.evaluation, before["evaluation"])
    for worker, _, updates in runs:
        worker.upload(worker.train(0, 1), updates[0])
    for _, memory, _ in runs[1:]:
        for name in ("updates", "clients"):
            assert np.array_equal(getattr(memory, name), getattr(runs[0][1], name)), name


CLASSES = {name: algorithms.load(name) for name in algorithms.REGISTRY}
STORE_MODELS = [name for name, of in CLASSES.items() if of.personal and not of.trains_to_personalize]


@pytest.mark.parametrize("algorithm", STORE_MODELS)
def test_evaluation_starts_no_turn_of_training(algorithm, monkeypatch):
    """Personal models that are there are evaluated without the order of samples and the moments that training takes."""
    worker, memory, updates = prepare("cpu", algorithm)
    worker.receive()
    worker.upload(worker.train(0, 0), updates[0])
    monkeypatch.setattr(TrainingClient, "__init__", lambda *_: pytest.fail("evaluation starts a turn of training"))
    worker.evaluate(range(len(memory.evaluation)), 0)


@pytest.mark.process
@each_case
def test_evaluation_waits_for_the_device_at_its_end(number):
    seen = observed(number in SLOW)[number]["evaluation"]
    waits = [position for position, (_, where, is_moved) in enumerate(seen) if is_moved and where == "cpu"]
    assert waits
    assert not [what for what, where, _ in seen[waits[0] :] if where == NAME]


def test_building_a_model_leaves_the_generators_of_gpus(monkeypatch):
    """Moon builds models in a client's turn, which would draw its dropout anew."""
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("the GPU's generator was seeded"))
    models.build("mlp", datasets.REGISTRY["digits"], 0.5, 0)
