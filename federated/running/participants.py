"""Who trains in a round, and how much: a function of the settings, the trial's seed and the round."""

import numpy as np

from federated.seeds import stream_seed
from federated.settings import Settings


def draw(settings: Settings, trial_seed: int, round: int) -> dict[int, float]:
    """{client: the part of its local epochs that it does, 1 or less}, by number, of the participants of `round` whose update
    arrives; of none if all are lost.

    Stragglers are those of FedProx (Li et al., MLSys 2020, section 5.2). Where a fraction of the participants is no whole
    number, one more is drawn as often as makes it right on average.
    """

    def stream(purpose: str) -> np.random.Generator:
        return np.random.default_rng(stream_seed(trial_seed, round, purpose))

    clients, count = np.arange(settings.num_clients), settings.participants
    if count < len(clients):
        clients = np.sort(stream("participants").choice(len(clients), count, replace=False))
    parts = dict.fromkeys(clients.tolist(), 1.0)
    if settings.straggler_fraction:
        rng = stream("stragglers")
        for client in _some(clients, settings.straggler_fraction, rng):
            parts[client] = rng.random()
    if settings.dropout_fraction:
        for client in _some(clients, settings.dropout_fraction, stream("dropouts")):
            del parts[client]
    return parts


def _some(clients: np.ndarray, fraction: float, rng: np.random.Generator) -> list[int]:
    count = int(fraction * len(clients) + rng.random())
    return rng.choice(clients, count, replace=False).tolist()


def batches_of(part: float, epochs: int, batches: int) -> int:
    """How many batches a client trains on that does a `part` of its `epochs`, each of so many `batches`: whole epochs, from 1
    to all with equal chance if `part` is drawn evenly; if there is one epoch, batches of it, of which FedProx's code knows,
    too."""
    unit, units = (batches, epochs) if epochs > 1 else (1, batches)
    return unit * min(units, 1 + int(part * units))
