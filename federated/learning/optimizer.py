"""The optimizers of local training."""

import torch
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from federated.learning.flat import Flat
from federated.settings import Settings


class LocalOptimizer:
    """Adam (Kingma and Ba, ICLR 2015) or SGD over the flat weights.

    The caller keeps the moments, one vector a client, so that any process can train any client. torch's functional optimizers
    are used because they take the moments as arguments, and because importing the classes costs 0.8 s.
    """

    def __init__(self, settings: Settings, hparams: dict, flat: Flat) -> None:
        self._weights, self._gradient = flat.weights[: flat.num_parameters], flat.gradient
        self.num_moments = self.num_moments_of(settings, hparams, flat.num_parameters)
        if settings.local_optimizer == "adam":
            self._arguments = {
                "lr": hparams["learning_rate"],
                "beta1": 0.9,
                "beta2": 0.999,
                "eps": 1e-8,
                "weight_decay": 0.0,
                "amsgrad": False,
            }
            self._step = self._adam
        else:
            self._arguments = {
                "lr": hparams["learning_rate"],
                "momentum": hparams.get("momentum", 0.0),
                "weight_decay": hparams["weight_decay"],
                "dampening": 0.0,
                "nesterov": False,
            }
            self._step = self._sgd

    @staticmethod
    def num_moments_of(settings: Settings, hparams: dict, num_parameters: int) -> int:
        """Return the number of float32 values in a client's moments."""
        if settings.local_optimizer == "adam":
            return 2 * num_parameters + 1  # two moments, and the count of steps
        return num_parameters if hparams.get("momentum") else 0

    def step(self, moments: torch.Tensor) -> None:
        """Make a step along the gradient and update `moments` [num_moments] in place. Start with moments of zeros."""
        self._step(moments)

    def _adam(self, moments) -> None:
        size = len(self._gradient)
        first, second, steps = moments[:size], moments[size:-1], moments[-1]
        adam([self._weights], [self._gradient], [first], [second], [], [steps], fused=True, maximize=False, **self._arguments)

    def _sgd(self, moments) -> None:
        momentum = moments if self.num_moments else None
        sgd([self._weights], [self._gradient], [momentum], fused=True, maximize=False, **self._arguments)
