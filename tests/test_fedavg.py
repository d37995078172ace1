"""The trial computes what a plain loop of federated averaging computes."""

import pathlib
import sys

import pytest
import torch
from helpers import HUNG, PROJECT
from torch import nn

from benchmarks import plain
from federated import models
from federated.data import datasets
from federated.learning.device import resolve_device
from federated.options import UsageError
from federated.running import rounds
from federated.running.listener import Listener
from federated.running.processes import ForkedProcess, preload
from federated.seeds import stream_seed
from federated.settings import ServerOptions, Settings
from federated.trial import Trial


def trial_weights(settings, hparams, directory, data_dir, processes):
    """The global weights after a trial with real client processes, and the Trial."""
    directory.mkdir()  # for checkpoints, which a slow machine makes
    this = Trial(settings, hparams, 0, 5, directory)
    listener = Listener(None)
    preload([])
    command = [sys.executable, str(PROJECT / "client_benchmark.py"), "--host", listener.address, "--data_dir", str(data_dir)]
    clients = [ForkedProcess(command, directory / f"{number}.log", {}) for number in range(processes)]
    try:
        weights = rounds.serve(this, listener, processes, ServerOptions(data_dir=data_dir, timeout=HUNG))
        assert [client.exitcode for client in clients] == [0] * processes
    finally:
        for client in clients:
            client.kill()
            client.close()
        listener.close()
    return weights[0].clone(), this


ADAM = {"batch_size": 32, "dropout_rate": 0.5, "learning_rate": 3e-4}
SGD = {"batch_size": 32, "dropout_rate": 0.5, "learning_rate": 0.05, "momentum": 0.9, "weight_decay": 1e-3}


@pytest.mark.process
@pytest.mark.parametrize(
    ("settings", "hparams"),
    [
        pytest.param(
            Settings(model_arch="cnn", dataset="fashion_mnist", rounds=2, samples_per_client=150),
            ADAM,
            marks=pytest.mark.slow,
        ),
        (Settings(rounds=2, local_optimizer="sgd", local_epochs=2), SGD),
        (Settings(rounds=2, num_clients=3, partition="quantity", samples_per_client=None), ADAM),
        (Settings(rounds=3, num_clients=3, optimizer_state="reset"), ADAM),
        pytest.param(
            Settings(model_arch="resnet18", rounds=2, samples_per_client=60, local_optimizer="sgd"),
            SGD | {"learning_rate": 0.01},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["cnn", "mlp-sgd", "unbalanced", "reset", "resnet18"],
)
def test_weights_equal_those_of_a_plain_loop(settings, hparams, tmp_path, request):
    data_dir = request.getfixturevalue("shared_data") if settings.dataset != "digits" else pathlib.Path("data")
    torch.set_num_threads(1)
    weights, _ = trial_weights(settings, hparams, tmp_path / "trial", data_dir, processes=2)
    data = datasets.load(settings.dataset, data_dir)
    # The product's memory format: a rounding that pushes a ReLU over zero moves weights of resnet18 by 1e-3
    model, _ = plain.fedavg(settings, hparams, 5, data, evaluate=False, memory_format=torch.channels_last)
    floats = [*model.parameters(), *(buffer for buffer in model.buffers() if buffer.is_floating_point())]
    reference = torch.cat([tensor.detach().flatten() for tensor in floats])
    start = models.build(settings.model_arch, datasets.REGISTRY[settings.dataset], 0.5, stream_seed(5, "model"))
    moved = (reference[: sum(p.numel() for p in start.parameters())] - nn.utils.parameters_to_vector(start.parameters())).norm()
    assert moved > 0.01 * reference.norm()  # the comparison says something
    assert (weights - reference).norm() <= 1e-5 * reference.norm()


def test_bf16_is_refused_where_the_processor_has_none(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    with pytest.raises(UsageError, match="no bf16 arithmetic"):
        resolve_device(Settings(precision="bf16", device="cpu"))
