"""Training steps on a GPU as captured graphs.

A step of a small model is dozens of small kernels, and launching a kernel takes longer than running it. A graph launches
forward, loss and backward at once. It reads and writes fixed addresses: the weights and the gradient are in the model's flat
vectors anyway, and each batch is copied into inputs and labels of its shape.
"""

import collections
import contextlib
import functools
import typing
from collections.abc import Callable, Collection, Iterable, Iterator

import torch

from federated.algorithms.fedavg import Fedavg
from federated.learning.local_model import LocalModel, Loss
from federated.options import say

# The most batch shapes that a process captures. Capturing one takes the time of about ten steps, and some memory.
MAX_SHAPES = 64
# Steps before a shape is captured, in which libraries do their one-time set-up
WARM_UPS = 3
# The largest relative distance of a replayed gradient from one without a graph: libraries may choose kernels that round
# differently. A graph that misses an operation is off by much more.
TOLERANCE = 1e-2


def is_capturable(algorithm: Fedavg) -> bool:
    """True if a batch's gradient depends only on the weights, the batch and dropout's draws, all at fixed addresses."""
    return type(algorithm).loss is Fedavg.loss and not algorithm.uses_features and algorithm.may_be_captured


def sizes_to_capture(sizes: Iterable[int]) -> set[int]:
    """Return the most frequent of a trial's batch `sizes`, at most MAX_SHAPES: a function of the trial alone, so that each of
    its processes computes a batch the same way."""
    return {size for size, _ in collections.Counter(sizes).most_common(MAX_SHAPES)}


class Graphs(typing.Protocol):
    """Captures work on a device, where dropout draws from `generator`."""

    generator: torch.Generator

    def aside(self) -> contextlib.AbstractContextManager:
        """Return a context in which work is warmed up and captured."""

    def capture(self, work: Callable[[], typing.Any]) -> tuple[Callable[[], object], typing.Any]:
        """Return a function that replays `work`, and the tensors that each replay fills with the results of `work`. Raises
        RuntimeError if `work` cannot be captured."""

    def recover(self) -> None:
        """Let the device compute without graphs after a failed capture. Earlier graphs can no longer be replayed."""


class CudaGraphs:
    """CUDA's graphs, by the rules of "CUDA Graphs" in torch's notes on CUDA semantics."""

    def __init__(self, device: torch.device) -> None:
        torch.cuda.init()
        self._device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        # torch registers it with each graph: a replay draws from its current seed and offset, and moves the offset as the
        # same work without a graph does. register_generator_state is for other generators.
        self.generator = torch.cuda.default_generators[self._device.index]
        # One stream for warm-up and capture, as libraries set themselves up by stream. The default one cannot be captured.
        self._stream = torch.cuda.Stream(self._device)
        # Graphs share their scratch memory: only one runs at a time, and its results are copied before the next one runs.
        self._pool = torch.cuda.graph_pool_handle()

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Context in which the capture stream is current. It waits for the stream before, which afterwards waits for it. That
        one is current again however the context ends: torch.cuda.graph itself restores it only if nothing fails."""
        before = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(before)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            before.wait_stream(self._stream)

    def capture(self, work: Callable[[], typing.Any]) -> tuple[Callable[[], object], typing.Any]:
        graph = torch.cuda.CUDAGraph()
        # thread_local: work of other threads on the device is neither captured nor breaks the capture
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            results = work()
        return graph.replay, results

    def recover(self) -> None:
        # After a failed capture torch 2.11 takes the generator's state for still capturing, and dropout raises an error
        self.generator.graphsafe_set_state(torch.Generator(self._device))


class CapturedStep(typing.NamedTuple):
    """One shape of batch. `replay` fills the model's gradient, `logits` and `loss` from `inputs` and `labels`."""

    inputs: torch.Tensor
    labels: torch.Tensor
    replay: Callable[[], object]
    logits: torch.Tensor
    loss: torch.Tensor


class CapturedSteps:
    """LocalModel.backward for an algorithm that is_capturable. Captures each batch shape once, and then replays it. If
    capturing fails, prints why, once, and computes as LocalModel.backward does."""

    def __init__(self, model: LocalModel, sizes: Collection[int], graphs: Graphs) -> None:
        """Capture batches of these `sizes` only."""
        self._model, self._sizes = model, sizes
        self._graphs: Graphs | None = graphs
        self._modules, self._parameters = list(model.module.modules()), list(model.module.parameters())
        # Training changes these besides the gradient: weights with BatchNorm's statistics, and its counters
        self._changed = [model.flat.weights, *(each for each in model.module.buffers() if not each.is_floating_point())]
        self._steps: dict[tuple, CapturedStep] = {}

    @property
    def is_capturing(self) -> bool:
        """False once capturing has failed."""
        return self._graphs is not None

    def __call__(self, inputs: torch.Tensor, labels: torch.Tensor, loss: Loss) -> tuple[torch.Tensor, torch.Tensor]:
        """Set the gradient to that of a batch's loss at the weights. Returns the logits and the loss."""
        if self._graphs is None or len(labels) not in self._sizes or inputs.requires_grad:
            return self._model.backward(inputs, labels, loss)
        key = (
            inputs.shape,
            labels.shape,
            tuple(module.training for module in self._modules),
            tuple(parameter.requires_grad for parameter in self._parameters),
        )
        if key not in self._steps:
            try:
                self._steps[key] = self._captured(self._graphs, inputs, labels, loss)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                say(f"training steps run without CUDA graphs, as capturing one failed: {' '.join(str(error).split())}")
                self._graphs = None
                self._steps.clear()
                return self._model.backward(inputs, labels, loss)
        step = self._steps[key]
        step.inputs.copy_(inputs)
        step.labels.copy_(labels)
        step.replay()
        self._model.passes += 1
        return step.logits.clone(), step.loss.clone()

    def _captured(self, graphs: Graphs, inputs: torch.Tensor, labels: torch.Tensor, loss: Loss) -> CapturedStep:
        """Capture the step of such a batch. Changes nothing but the gradient. Raises RuntimeError if it cannot be captured."""
        inputs, labels = inputs.clone(), labels.clone()
        work = functools.partial(self._model.backward, inputs, labels, loss)
        passes, draws, values = self._model.passes, graphs.generator.get_state(), [each.clone() for each in self._changed]

        def restore() -> None:
            graphs.generator.set_state(draws)
            for each, value in zip(self._changed, values):
                each.copy_(value)

        try:
            with graphs.aside():
                for _ in range(WARM_UPS):
                    restore()
                    work()
                expected = self._model.flat.gradient.clone()
                restore()
                replay, (logits, value) = graphs.capture(work)
                restore()
                replay()
                difference = (self._model.flat.gradient - expected).norm() / expected.norm()
        except BaseException:
            graphs.recover()
            raise
        finally:
            restore()
            self._model.passes = passes
        if difference > TOLERANCE:  # waits for the device, once for each shape; false for NaN, from diverged weights
            graphs.recover()
            restore()
            raise RuntimeError(f"the replayed gradient differs from what was captured by {difference:.1e} of its length")
        return CapturedStep(inputs, labels, replay, logits, value)
