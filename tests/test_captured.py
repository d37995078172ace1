"""Captured training steps, by graphs that are pretended (see pretended_graphs.py): the same code as on a GPU. What only a GPU
can show is in test_gpu.py."""

import numpy as np
import pytest
import torch
from pretended_device import CASES, prepare, two_rounds
from pretended_graphs import PretendedGraphs

from federated import algorithms, models
from federated.algorithms.fedavg import Fedavg
from federated.learning.captured import MAX_SHAPES, WARM_UPS, CapturedSteps, is_capturable, sizes_to_capture
from federated.learning.device_data import batch_sizes

OWN_LOSS = {"Moon", "Fedntd", "Fedlc", "Feddecorr"}


def captured(*, graphs=None, sizes=None, **case):
    """What prepare() gives, of a worker that captures, and its graphs."""
    worker, memory, updates = prepare("cpu", **case)
    graphs = graphs or PretendedGraphs()
    worker.backward = CapturedSteps(worker.model, worker.frequent_sizes() if sizes is None else sizes, graphs)
    return worker, memory, updates, graphs


def plainly(**case):
    return prepare("cpu", **case)


def assert_same(one, other):
    for name in one.shapes:
        assert np.array_equal(getattr(one, name), getattr(other, name)), name


@pytest.mark.parametrize("name", algorithms.REGISTRY)
def test_what_is_captured(name):
    assert is_capturable(prepare("cpu", name)[0].algorithm) == (name not in OWN_LOSS)


def test_statistics_of_batchnorm_move_once_a_step(monkeypatch):
    def build(*_):
        torch.manual_seed(0)
        return torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(64, 20), torch.nn.BatchNorm1d(20), torch.nn.Linear(20, 10)
        )

    monkeypatch.setattr(models, "build", build)
    case = {"algorithm": "Fedbn", "hparams": {"batch_size": 16}}
    plain, (*replayed, _) = plainly(**case), captured(**case)
    assert two_rounds(*plain) == two_rounds(*replayed)
    assert_same(plain[1], replayed[1])
    counters = [worker.model.module[2].num_batches_tracked.item() for worker, *_ in (plain, replayed)]
    assert counters == [2 * 2 * 3] * 2  # rounds, clients, batches


def test_an_algorithm_may_refuse():
    class Hooked(Fedavg):
        may_be_captured = False

    class WithFeatures(Fedavg):  # which the last forward pass leaves
        uses_features = True

    assert not is_capturable(Hooked({})) and not is_capturable(WithFeatures({}))


@pytest.mark.parametrize(
    "case",
    [each for each in CASES if each["algorithm"] not in OWN_LOSS and "resnet18" not in each.values()],
    ids=lambda case: "-".join(map(str, case.values())),
)
def test_replayed_steps_have_the_bits_of_others(case):
    """With dropout, augmentation, several models in a turn, a smaller last batch, and evaluation in between, for which some
    train."""
    torch.set_num_threads(1)
    several = {} if case["algorithm"] == "Fedsgd" else {"batch_size": 16}
    plain, (*replayed, graphs) = prepare("cpu", **case, hparams=several), captured(**case, hparams=several)
    assert two_rounds(*plain) == two_rounds(*replayed)
    assert_same(plain[1], replayed[1])
    shapes = {size for samples in plain[0].train_indices for size in batch_sizes(len(samples), plain[0].hparams)}
    assert graphs.captures == len(shapes) and graphs.replays > len(shapes) and graphs.recoveries == 0
    assert plain[0].progress == replayed[0].progress  # forward passes, by which the server knows that the work goes on


def test_each_shape_of_batch_is_captured_once():
    worker, *_, graphs = captured(algorithm="Fedavg", hparams={"batch_size": 5}, samples_per_client=40)
    worker.receive()
    passes = []
    plain = worker.model.backward
    worker.model.backward = lambda inputs, *rest: passes.append(len(inputs)) or plain(inputs, *rest)
    for round in range(3):
        worker.train(0, round)
    assert passes == [5] * (WARM_UPS + 1) + [6] * (WARM_UPS + 1)  # 36 samples: the last one joins the batch before
    assert graphs.captures == 2 and graphs.replays == 3 * 7 + 2  # and one to see that it is right


def test_what_a_batch_left_in_fixed_places_is_not_kept():
    """Metrics are of all batches, not of the last one that was replayed; a client's tensors outlive the next client's turn."""
    plain, (*replayed, _) = (each(algorithm="Fedavg", hparams={"batch_size": 8}) for each in (plainly, captured))
    reports = []
    for worker, *_ in (plain, replayed):
        worker.receive()
        clients = [worker.train(number, 0) for number in (0, 1)]
        reports.append([client.metrics() for client in clients])
    assert reports[0] == reports[1]


def test_two_models_alive_replay_their_own():
    runs = []
    for make in (plainly, captured):
        several = [make(algorithm="Fedavg"), make(algorithm="Fedprox", model_arch="2nn")]
        for round in range(2):
            for worker, memory, updates, *_ in several:
                memory.broadcast[:] = 0.01
                worker.receive()
                for number in (0, 1):
                    worker.upload(worker.train(number, round), updates[number])
        runs.append([memory for _, memory, *_ in several])
    for one, other in zip(*runs):
        assert_same(one, other)


@pytest.mark.parametrize("fails_after", [0, 1])
def test_if_capturing_fails_steps_run_without_as_if_it_had_not_been_tried(fails_after, capsys):
    case = {"algorithm": "Fedavg", "hparams": {"batch_size": 16}}
    plain, (*replayed, graphs) = plainly(**case), captured(**case, graphs=PretendedGraphs(fails_after))
    assert two_rounds(*plain) == two_rounds(*replayed)
    assert_same(plain[1], replayed[1])
    assert graphs.captures == fails_after and graphs.recoveries == 1
    line = "training steps run without CUDA graphs, as capturing one failed: CUDA error: operation not permitted"
    assert capsys.readouterr().err.count(line) == 1


def test_memory_that_runs_out_is_no_reason_to_go_on_without(monkeypatch):
    """It would run out again, and which processes have room must not decide what is computed how."""
    worker, *_, graphs = captured(algorithm="Fedavg")
    monkeypatch.setattr(graphs, "capture", lambda work: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory.")))
    worker.receive()
    with pytest.raises(torch.OutOfMemoryError):
        worker.train(0, 0)
    assert graphs.recoveries == 1


class Counting(torch.nn.Module):
    """A model that does not do the same each time, for a reason that no graph sees."""

    def __init__(self):
        super().__init__()
        self.linear, self.calls = torch.nn.Linear(64, 10), 0

    def forward(self, inputs):
        self.calls += 1
        return self.linear(inputs.flatten(1)) * (1 + self.calls % 2)


def test_a_graph_that_misses_what_the_model_does_is_not_used(monkeypatch, capsys):
    monkeypatch.setattr(models, "build", lambda *_: Counting())
    worker, *_, graphs = captured(algorithm="Fedavg")
    worker.receive()
    worker.broadcast.normal_(generator=torch.Generator().manual_seed(0))
    worker.train(0, 0)
    assert "the replayed gradient differs from what was captured by" in capsys.readouterr().err
    assert graphs.replays == 1 and graphs.recoveries == 1


def test_what_a_graph_takes_as_given_has_a_graph_of_its_own():
    """Modes of modules, and which parameters have a gradient."""
    worker, *_, graphs = captured(algorithm="Fedavg", hparams={"batch_size": 64})
    worker.receive()
    worker.broadcast.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    client = worker.train(0, 0)
    (batch,) = client.batches(1)
    assert graphs.captures == 1
    worker.model.module.eval()
    client.backward(batch)
    without_dropout = client.gradient.clone()
    worker.model.module[1].weight.requires_grad_(False)
    client.backward(batch)
    assert graphs.captures == 3
    size = worker.model.module[1].weight.numel()
    assert not client.gradient[:size].any() and without_dropout[:size].any()
    assert torch.equal(client.gradient[size:], without_dropout[size:])
    batch.inputs.requires_grad_(True)  # as an adversary does
    client.backward(batch)
    assert graphs.captures == 3 and batch.inputs.grad.any()


def test_rare_sizes_are_not_captured():
    sizes = [7] * 3 + [2] * 2 + list(range(100, 300))
    assert {2, 7} < sizes_to_capture(sizes) and len(sizes_to_capture(sizes)) == MAX_SHAPES
    case = {"algorithm": "Fedavg", "hparams": {"batch_size": 16}}
    plain, (*replayed, graphs) = plainly(**case), captured(**case, sizes={16})
    assert two_rounds(*plain) == two_rounds(*replayed)
    assert_same(plain[1], replayed[1])
    assert graphs.captures == 1
