"""The model of a process, which the clients that it hosts use in turn."""

import contextlib
from collections.abc import Callable

import torch
from torch import nn

from federated.learning.flat import Flat
from federated.options import UsageError

# From inputs to the logits and, if the algorithm uses features, the inputs of the classifier
Frozen = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]
# From inputs, logits and labels to the loss, a scalar
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
# LocalModel.backward
Backward = Callable[[torch.Tensor, torch.Tensor, Loss], tuple[torch.Tensor, torch.Tensor]]


class LocalModel:
    """A model on its device, and frozen copies of it.

    module    the torch module
    flat      its weights and its gradient as vectors
    features  {classifier: its inputs in the last forward pass}, for models that record their features
    passes    how many forward passes `module` has made
    """

    def __init__(self, build: Callable[[], nn.Module], device: torch.device, precision: str, uses_features: bool) -> None:
        """`build` returns a new model of the same kind on `device`. If `uses_features`, models record their features."""
        self._build, self._device, self._precision, self._uses_features = build, device, precision, uses_features
        self.module = build()
        self.flat = Flat(self.module)
        self.features: dict[nn.Module, torch.Tensor] = {}
        self.passes = 0
        self._copies: list[tuple[nn.Module, Flat]] = []
        self._copies_in_use = 0
        if uses_features:
            self._record_features(self.module)

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the logits of `inputs`."""
        self.passes += 1
        return self.module(inputs)

    def backward(self, inputs: torch.Tensor, labels: torch.Tensor, loss: Loss) -> tuple[torch.Tensor, torch.Tensor]:
        """Set the gradient to that of a batch's `loss` at the weights. Returns the logits and the loss."""
        self.flat.gradient.zero_()
        with self.autocast():
            logits = self(inputs)
            value = loss(inputs, logits, labels)
        value.backward()
        return logits.detach(), value.detach()

    def autocast(self) -> contextlib.AbstractContextManager:
        """Return a context within which torch computes in the settings' precision."""
        if self._precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, torch.bfloat16)

    def frozen(self, weights: torch.Tensor) -> Frozen:
        """Return a copy of the model with `weights` [size], in evaluation mode and without gradient. It is valid until
        `release_copies`."""
        if self._copies_in_use == len(self._copies):
            copy = self._build().eval()
            if self._uses_features:
                self._record_features(copy)
            self._copies.append((copy, Flat(copy)))
        model, flat = self._copies[self._copies_in_use]
        self._copies_in_use += 1
        flat.weights.copy_(weights)

        def outputs(inputs):
            with torch.no_grad(), self.autocast():
                logits = model(inputs)
            return logits, self.features[classifier_of(model)] if self._uses_features else None

        return outputs

    def release_copies(self) -> None:
        """Let `frozen` use all copies again."""
        self._copies_in_use = 0

    def _record_features(self, model) -> None:
        classifier_of(model).register_forward_pre_hook(lambda module, inputs: self.features.update({module: inputs[0]}))


def classifier_of(model: nn.Module) -> nn.Linear:
    """Return the model's last linear layer. Raises UsageError if it has none."""
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise UsageError("the algorithm needs a model that ends in a linear layer, and this one has none")
    return linear[-1]
