"""What a client keeps between rounds: one row of the trial's memory, so that any process can host any client."""

import dataclasses

import numpy as np
import torch

from federated import algorithms
from federated.learning import compression
from federated.learning.flat import Flat
from federated.learning.optimizer import LocalOptimizer
from federated.settings import Settings


@dataclasses.dataclass(frozen=True)
class RowLayout:
    """A row is the number of rounds in which the client has trained, then its state, then its moments, then what
    compression has left of its updates."""

    client_vectors: int  # of the state
    size: int  # of each
    optimizers: int
    num_moments: int  # of each optimizer; 0 if the client keeps none
    memory: int  # numbers that are left of its updates; 0 if none are

    @classmethod
    def of(cls, settings: Settings, hparams: dict, flat: Flat) -> "RowLayout":
        algorithm = algorithms.load(settings.algorithm)
        keeps_moments = settings.optimizer_state == "keep"
        moments = LocalOptimizer.num_moments_of(settings, hparams, flat.num_parameters) if keeps_moments else 0
        memory = compression.memory_size(settings, flat.num_parameters)
        return cls(algorithm.client_vectors, flat.size, algorithm.optimizers, moments, memory)

    @property
    def length(self) -> int:
        """How many float32 numbers a row has: 0 if the client keeps nothing, so that nothing is counted either."""
        kept = self.client_vectors * self.size + self.optimizers * self.num_moments + self.memory
        return kept + 1 if kept else 0


class ClientRow:
    """The row of one client on the device of this process.

    rounds   in how many the client has trained; always 0 if it keeps nothing
    state    [client_vectors, size]: the algorithm's vectors, zeros if the client is new
    moments  [optimizers, num_moments]: those of its local optimizers, zeros if the client is new
    memory   [layout.memory]: what is left of its updates, zeros if the client is new; always on the CPU

    On the CPU `state` and `moments` are the memory itself. On a GPU they are a copy of it, which `store` brings back.
    """

    def __init__(self, kept: np.ndarray, layout: RowLayout, device: torch.device) -> None:
        """Load the row from `kept` [layout.length], a row of the trial's memory."""
        self._rounds = kept[:1]
        self._kept, self.memory = torch.from_numpy(kept).split([len(kept) - layout.memory, layout.memory])
        self.rounds = int(kept[0]) if len(kept) else 0
        self._row = self._kept.to(device)
        end = 1 + layout.client_vectors * layout.size
        self.state = self._row[1:end].view(layout.client_vectors, layout.size)
        self.moments = self._row[end:].view(layout.optimizers, layout.num_moments)

    def store(self) -> None:
        """Bring the row back to the trial's memory, as that of a client that has trained once more."""
        if self._row is not self._kept:
            self._kept.copy_(self._row)
        self._rounds += 1
