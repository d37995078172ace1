"""The average of user-level DP-FedAvg (McMahan et al., ICLR 2018, Algorithm 1)."""

import numpy as np
import torch

from federated.seeds import stream_seed
from federated.settings import Settings


def add(total: torch.Tensor, weights: torch.Tensor, start: torch.Tensor, clip: float) -> None:
    """Add to `total` [size] how much a client's `weights` differ from those of the round's `start`, clipped to the norm
    `clip`."""
    change = weights - start
    norm = torch.linalg.vector_norm(change, dtype=torch.float64).item()
    total.add_(change, alpha=clip / max(norm, clip))


def finish(total: torch.Tensor, start: torch.Tensor, settings: Settings, trial_seed: int, round: int) -> None:
    """Make the sum of clipped changes `total` [size] the average of weights, with noise on the sum. The denominator is the
    number of updates that are expected to arrive, so that one client moves the average by no more than clip over it."""
    rng = np.random.default_rng(stream_seed(trial_seed, round, "privacy"))
    noise = torch.from_numpy(rng.standard_normal(len(total), dtype=np.float32))
    expected = settings.participants * (1 - settings.dropout_fraction)
    total.add_(noise, alpha=settings.dp_noise_multiplier * settings.dp_clip).div_(expected).add_(start)
