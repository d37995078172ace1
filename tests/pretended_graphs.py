"""CUDA graphs that torch only pretends to have: on the CPU, operations are recorded and done again on the same tensors."""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def tensors_of(result):
    return [each for each in tree_leaves(result) if isinstance(each, torch.Tensor)]


class Recorder(TorchDispatchMode):
    """Within it operations are recorded. `replay` does them again, and leaves results where they were."""

    def __init__(self):
        super().__init__()
        self._done = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        is_alias = any(each.alias_info is not None for each in operation._schema.returns)  # a view, or changed in place
        self._done.append((operation, args, kwargs or {}, [] if is_alias else tensors_of(result)))
        return result

    def forget_results(self):
        """As a capture computes nothing, nothing may be taken from it."""
        for *_, results in self._done:
            for each in results:
                each.fill_(torch.nan if each.is_floating_point() else 0)

    def replay(self):
        with torch.no_grad():
            for operation, args, kwargs, results in self._done:
                new = operation(*args, **kwargs)
                for old, each in zip(results, tensors_of(new)):
                    old.copy_(each)


class PretendedGraphs:
    """See federated.learning.captured.Graphs. `fails` makes it refuse all but the first so many captures."""

    generator = torch.default_generator

    def __init__(self, fails_after=None):
        self.captures, self.replays, self.recoveries, self._fails_after = 0, 0, 0, fails_after

    aside = staticmethod(contextlib.nullcontext)

    def capture(self, work):
        if self.captures == self._fails_after:
            work()  # a trace is left: statistics, draws
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nCompile with …")
        self.captures += 1
        with Recorder() as recorder:
            results = work()
        with torch.no_grad():
            recorder.forget_results()

        def replay():
            self.replays += 1
            recorder.replay()

        return replay, results

    def recover(self):
        self.recoveries += 1
