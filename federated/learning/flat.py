"""A model as one flat vector.

Aggregation, messages and optimizers then work on one row of memory instead of dozens of tensors. That is also faster: a step
of the digits MLP takes about three quarters of the time.
"""

import torch
from torch import nn


class Flat:
    """Lays a model's parameters and float buffers into one vector and its gradients into another.

    weights  float32 [size], the parameters first, then the float buffers (BatchNorm's statistics)
    gradient float32 [num_parameters]

    Integer buffers (BatchNorm's num_batches_tracked) stay outside: an average of counters means nothing.
    """

    def __init__(self, model: nn.Module) -> None:
        parameters = list(model.parameters())
        buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        self.num_parameters = sum(tensor.numel() for tensor in parameters)
        self.weights = torch.cat([tensor.detach().flatten() for tensor in parameters + buffers])
        self.size = len(self.weights)
        self.gradient = torch.zeros_like(self.weights[: self.num_parameters])
        self._slices = {}
        start = 0
        for tensor in parameters + buffers:
            end = start + tensor.numel()
            self._slices[tensor] = slice(start, end)
            tensor.data = self.weights[start:end].view_as(tensor)
            if end <= self.num_parameters:
                tensor.grad = self.gradient[start:end].view_as(tensor)
            start = end

    def mask_of(self, modules: list[nn.Module]) -> torch.Tensor:
        """Return which entries of the weights belong to `modules`, bool [size]."""
        mask = torch.zeros_like(self.weights, dtype=torch.bool)
        for module in modules:
            for tensor in (*module.parameters(), *module.buffers()):
                if tensor in self._slices:
                    mask[self._slices[tensor]] = True
        return mask
