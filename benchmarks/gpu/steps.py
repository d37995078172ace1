"""The part `steps`: the time, launches and memory of a training step."""

import collections
import functools
import gc
import math
import statistics
import time
from unittest import mock

import numpy as np
import torch
from common import cifar, megabytes, synchronize
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.plain import optimizer_of
from federated import algorithms, models
from federated.algorithms.fedavg import Fedavg
from federated.data.partition import ClientSplit, test_set
from federated.learning.captured import CapturedSteps
from federated.learning.client_row import RowLayout
from federated.learning.device_data import DeviceData
from federated.learning.evaluation import BLOCK, EvaluationPlan
from federated.learning.flat import Flat
from federated.learning.memory import SharedMatrices
from federated.learning.worker import Worker
from federated.settings import Settings
from hparams_registry import default_hparams

MODELS = ("mlp", "lenet", "cnn", "resnet18")
PLAIN, EAGER, CAPTURED = "plain loop", "eager", "captured"
TURNS = 5  # that are timed
LAUNCHES = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")


def worker_of(settings, hparams, data, splits, is_captured=True) -> Worker:
    """A worker with the clients of `splits`, and the initial weights received."""
    algorithm = algorithms.load(settings.algorithm)
    model = models.build(settings.model_arch, data.spec, hparams["dropout_rate"], 0)
    flat = Flat(model)
    shapes = {
        "broadcast": (algorithm.broadcasts, flat.size),
        "updates": (1, algorithm.uploads * flat.size),
        "clients": (len(splits), RowLayout.of(settings, hparams, flat).length),
        "evaluation": (len(EvaluationPlan(splits, test_set(data, settings, splits), algorithm.personal).blocks), 2 * BLOCK),
    }
    memory = SharedMatrices(shapes, shared=True)
    memory.broadcast[0] = flat.weights.numpy()
    with mock.patch.object(Fedavg, "may_be_captured", is_captured):
        worker = Worker(settings, hparams, 0, data, splits, memory)
    worker.receive()
    return worker


def plain_turn(settings, hparams, data, device):
    """A function that makes a turn's steps as a plain PyTorch loop does, with the samples on the device."""
    model = models.build(settings.model_arch, data.spec, hparams["dropout_rate"], 0).to(device)
    optimizer = optimizer_of(settings, hparams, model)
    images, labels = DeviceData(data, settings, torch.device(device)).gather(False, torch.arange(len(data.train_labels)))
    images = images.contiguous()

    def turn(round):
        model.train()
        for batch in torch.randperm(len(labels), device=device).split(hparams["batch_size"]):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()

    return turn


class Counting(TorchDispatchMode):
    """Counts operations: a CPU has these in place of launches."""

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += 1
        return operation(*args, **(kwargs or {}))


def launches(turn, device):
    """How many launches a turn makes; None if the profiler cannot count them."""
    if device == "cpu":
        with Counting() as counting:
            turn(0)
        return counting.count
    try:
        with torch.profiler.profile() as seen:
            turn(0)
            torch.cuda.synchronize()
        return sum(event.count for event in seen.key_averages() if event.key.startswith(LAUNCHES)) or None
    except RuntimeError:  # no access to the device's counters
        return None


def timed(turn, device, steps):
    """The time and the memory of a step. `turn` makes `steps` steps."""
    for round in range(2):  # for captures, and the one-time set-up of libraries
        turn(round)
    synchronize(device)
    times = []
    for round in range(TURNS):
        start = time.perf_counter()
        turn(round)
        synchronize(device)
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_reserved() if device == "cuda" else None
    return {"ms_a_step": 1000 * statistics.median(times) / steps, "peak_mb": megabytes(peak)}


def forget(device) -> None:
    """Free the memory of earlier measurements."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def ways_of(model, batch, device):
    """The ways to make a step of this size. A CPU captures nothing; tests/test_captured.py simulates it."""
    more = ("captured, no TF32", "captured, bf16") if (model, batch) == ("resnet18", 64) else ()
    return (PLAIN, EAGER, CAPTURED, *more) if device == "cuda" else (PLAIN, EAGER)


class Turn:
    """Called with a round, it makes `steps` steps of a model in one of the ways."""

    def __init__(self, model, batch, way, steps, device):
        data = cifar(steps * batch, 10)
        precision = "bf16" if "bf16" in way else "fp32"
        settings = Settings(model_arch=model, dataset="cifar10", num_clients=1, device=device, precision=precision)
        hparams = default_hparams("Fedavg", "cifar10") | {"batch_size": batch}
        torch.backends.cudnn.allow_tf32 = "no TF32" not in way
        if way == PLAIN:
            self.worker, self._turn = None, plain_turn(settings, hparams, data, device)
        else:
            self.worker = worker_of(settings, hparams, data, one_client(data), is_captured=way.startswith(CAPTURED))
            self._turn = functools.partial(self.worker.train, 0)

    def __call__(self, round):
        self._turn(round)

    @property
    def has_failed_to_capture(self):
        return (
            self.worker is not None
            and isinstance(self.worker.backward, CapturedSteps)
            and not self.worker.backward.is_capturing
        )


def rows(device, tiny):
    sizes = [("mlp", 10), ("lenet", 64)] if tiny else [(model, batch) for model in MODELS for batch in (10, 64)]
    for model, batch in sizes:
        for way in ways_of(model, batch, device):
            forget(device)
            steps = 2 if tiny else 40
            turn = Turn(model, batch, way, steps, device)
            row = {"model": model, "batch": batch, "way": way} | timed(turn, device, steps)
            if turn.has_failed_to_capture:
                row["way"] += " (failed)"
            if way == EAGER:
                reached = turn.worker.train(0, 0).weights.clone()
            elif way == CAPTURED:
                difference = turn.worker.train(0, 0).weights - reached
                row["differs_by"] = (difference.norm() / reached.norm()).item()
            yield row
    for model, batch in sizes:  # once all is timed: a profiler that has run may slow what follows
        for way in ways_of(model, batch, device)[:3]:
            turn = Turn(model, batch, way, 5, device)
            turn(0)
            counted = launches(turn, device)
            yield {"model": model, "batch": batch, "way": way, "launches_a_step": counted and counted / 5}
    torch.backends.cudnn.allow_tf32 = True
    if device == "cuda":
        yield from transfers()


def one_client(data):
    """One client with all samples, which holds out none."""
    nothing = np.empty(0, int)
    return [ClientSplit(np.arange(len(data.train_labels)), nothing, nothing)]


def transfers():
    """How fast an update is copied from the GPU into shared memory, as it is and registered with CUDA."""
    megabyte = 1 << 20
    matrix = SharedMatrices({"updates": (1, 2 * megabyte)}, shared=True).updates
    home, there = torch.from_numpy(matrix), torch.zeros(1, 2 * megabyte, device="cuda")
    for way in ("as it is", "registered"):
        if way == "registered" and int(torch.cuda.cudart().cudaHostRegister(home.data_ptr(), matrix.nbytes, 0)):
            return  # no such permission
        home.copy_(there)
        start = time.perf_counter()
        for _ in range(20):
            home.copy_(there)
        yield {"model": "8 MB update", "way": way, "GB_a_second": 20 * matrix.nbytes / (time.perf_counter() - start) / 1e9}


def decisions(rows):
    by_size = collections.defaultdict(dict)
    for row in rows:
        if "ms_a_step" in row:
            by_size[row["model"], row["batch"]][row["way"]] = row
    pairs = {size: (ways[EAGER], ways[CAPTURED]) for size, ways in by_size.items() if {EAGER, CAPTURED} <= ways.keys()}
    if not pairs:
        yield "nothing was captured, so nothing follows"
        return
    shares = {size: captured["ms_a_step"] / eager["ms_a_step"] for size, (eager, captured) in pairs.items()}
    mean = math.exp(statistics.mean(map(math.log, shares.values())))
    slower = [f"{model} at {batch}" for (model, batch), share in shares.items() if share > 1]
    yield f"a captured step takes {mean:.2f} of another (geometric mean): " + ("keep it" if mean < 1 else "remove it")
    if slower:
        yield f"captured is slower for {', '.join(slower)}: capture only what is launch-bound, by the size of the batch"
    if ("lenet", 10) in shares:
        share = shares["lenet", 10]
        yield f"lenet at batch 10: {share:.2f} of today's, wanted at most 0.20: {'met' if share <= 0.2 else 'not met'}"
    unlike = [f"{model} at {batch}" for (model, batch), (_, captured) in pairs.items() if captured["differs_by"]]
    if unlike:
        yield f"captured steps give other last bits than others for {', '.join(unlike)}: say so in docs/gpu.md"
    else:
        yield "captured steps give the bits of others"
    speeds = {row["way"]: row["GB_a_second"] for row in rows if "GB_a_second" in row}
    if len(speeds) == 2:
        gain = speeds["registered"] / speeds["as it is"]
        yield f"updates are copied {gain:.1f} times as fast into registered memory: " + (
            "register the rows of updates" if gain > 1.5 else "leave it as it is"
        )
