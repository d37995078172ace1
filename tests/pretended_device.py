"""Trains and evaluates on a device that torch only pretends to have, whose tensors have shapes but no values: to mix devices in
an operation, or to ask for a value, is an error there. Prints as JSON for each of CASES, by the numbers that are its arguments,
what an error says, or the tensors that went from one device to the other. test_device.py runs it, in a process of its own:
torch takes devices in before it first computes a gradient."""

import json
import sys
from unittest import mock

import numpy as np
import torch
from torch._subclasses import FakeTensorMode, fake_tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from federated import algorithms, models
from federated.data import datasets, partition
from federated.learning import worker as workers
from federated.learning.client_row import RowLayout
from federated.learning.evaluation import BLOCK, EvaluationPlan
from federated.learning.flat import Flat
from federated.learning.memory import SharedMatrices
from federated.settings import Settings
from hparams_registry import default_hparams

NAME = "pretended"
CASES = [
    *({"algorithm": name} for name in algorithms.REGISTRY),
    {"algorithm": "Fedbn", "model_arch": "resnet18", "samples_per_client": 16},
    {"algorithm": "Fedavg", "model_arch": "cnn", "local_optimizer": "sgd"},
    {"algorithm": "Fedprox", "augmentation": "crop_flip", "optimizer_state": "reset"},
    {"algorithm": "Fedavg", "compression": "topk"},
    {"algorithm": "Fedbabu", "compression": "quantize"},
]


def prepare(device, algorithm, hparams=(), **settings):
    """A worker on `device`, the memory it shares with a server, and what clients upload to, [clients, uploads, size]."""
    settings = Settings(algorithm=algorithm, **{"num_clients": 2, "samples_per_client": 40, **settings})
    hparams = default_hparams(algorithm, settings.dataset, settings.local_optimizer) | dict(hparams)
    data = datasets.load(settings.dataset, "data")
    splits = partition.split(data, settings, 0)
    loaded = algorithms.load(algorithm)(hparams)
    flat = Flat(models.build(settings.model_arch, data.spec, 0.5, 0))
    memory = SharedMatrices(
        {
            "broadcast": (loaded.broadcasts, flat.size),
            "updates": (2, loaded.uploads * flat.size),
            "clients": (2, RowLayout.of(settings, hparams, flat).length),
            "evaluation": (
                len(EvaluationPlan(splits, partition.test_set(data, settings, splits), loaded.personal).blocks),
                2 * BLOCK,
            ),
        }
    )
    with mock.patch.object(workers, "resolve_device", lambda settings: torch.device(device)):
        worker = workers.Worker(settings, hparams, 0, data, splits, memory)
    return worker, memory, torch.from_numpy(memory.updates).view(2, loaded.uploads, flat.size)


def two_rounds(worker, memory, updates):
    """Evaluate and train all clients twice, the second time from other weights. Returns what the clients reported."""
    memory.broadcast[:] = np.random.RandomState(0).normal(0, 0.01, memory.broadcast.shape)
    memory.broadcast[0] = worker.model.flat.weights.cpu()
    reported = []
    for round in range(2):
        worker.receive()
        worker.evaluate(range(len(memory.evaluation)), round)
        for number in range(len(worker.train_indices)):
            client = worker.train(number, round)
            reported.append(client.metrics())
            worker.upload(client, updates[number])
        memory.broadcast[0] += memory.updates[0, : memory.broadcast.shape[1]] / 2
    return reported


class Watched(TorchDispatchMode):
    """Within it, `results` gets what each operation gives or fills: type and shape, the device, and whether it came from
    another one."""

    def __enter__(self):
        self.results = []
        return super().__enter__()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        given = [each.device.type for each in tree_leaves(args) if isinstance(each, torch.Tensor)]
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                device = tensor.device.type
                self.results.append((f"{tensor.dtype} {list(tensor.shape)}", device, any(each != device for each in given)))
        return result


def module_to(model, device):
    """nn.Module.to, which does not know how to move what has no values."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=device))
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(torch.empty(parameter.shape, device=device)))
    return model


def observe_case(case):
    """{work: results of Watched}: training of a client in few steps and in many, its upload, and evaluation; and how many
    numbers an update and a client's row have."""
    several_steps = {} if case["algorithm"] == "Fedsgd" else {"batch_size": 12}
    seen = {}
    with FakeTensorMode(allow_fallback_kernels=False):
        for work, hparams in (("training", {}), ("training_in_more_steps", several_steps)):
            worker, memory, updates = prepare(NAME, **case, hparams=hparams)
            worker.receive()
            with Watched() as watched:
                client = worker.train(0, 0)
            seen[work] = watched.results
            with Watched() as watched:
                worker.upload(client, updates[0])
            seen["upload"] = watched.results
        on_device = memory.clients.shape[1] - len(client.row.memory)
        seen["sizes"] = [updates[0].numel(), on_device]
        with Watched() as watched:
            worker.evaluate(range(len(memory.evaluation)), 0)
        seen["evaluation"] = watched.results
    return seen


def main():
    backend_registration._setup_privateuseone_for_python_backend(NAME)
    fake_tensor.CONSTANT_NUMEL_LIMIT = -1  # else single numbers do have values
    torch.nn.Module.to = module_to
    meta = torch.library.Library("aten", "IMPL", "Meta")
    meta.impl("_fused_sgd_", lambda *args, **kwargs: None)  # it has no form without values
    for number in map(int, sys.argv[1:]):
        try:
            print(json.dumps(observe_case(CASES[number])))
        except RuntimeError as error:
            print(json.dumps({"error": str(error)}))


if __name__ == "__main__":
    sys.exit(main())
