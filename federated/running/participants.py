"""Who trains in a round, and how much: a function of the settings, the trial's seed and the round."""

import numpy as np

from federated.seeds import stream_seed
from federated.settings import Settings


def draw(settings: Settings, trial_seed: int, round: int) -> dict[int, float]:
    """{client: the part of its local epochs that it does, 1 or less}, by number, of the participants of `round` whose update
    arrives; of none if all are lost, or there are none.

    Stragglers are those of FedProx (Li et al., MLSys 2020, section 5.2). Where a fraction of the participants is no whole
    number, one more is drawn as often as makes it right on average. With privacy each client straggles and is lost
    independently, too: if another one's presence had an influence, adding a client would change more than one update.
    """
    clients = receivers(settings, trial_seed, round)
    parts = dict.fromkeys(clients.tolist(), 1.0)
    if settings.straggler_fraction:
        rng = _stream(trial_seed, round, "stragglers")
        stragglers = _some(clients, settings.straggler_fraction, settings, rng)
        of_all = rng.random(settings.num_clients)
        parts |= {client: float(of_all[client]) for client in stragglers}
    if settings.dropout_fraction:
        for client in _some(clients, settings.dropout_fraction, settings, _stream(trial_seed, round, "dropouts")):
            del parts[client]
    return parts


def receivers(settings: Settings, trial_seed: int, round: int) -> np.ndarray:
    """The participants of `round`, who are sent the weights, by number [participants]. With privacy each client is one with
    equal chance, independently of the others, so that there may be none."""
    everybody, count = np.arange(settings.num_clients), settings.participants
    if count == len(everybody):
        return everybody
    rng = _stream(trial_seed, round, "participants")
    if settings.dp_clip is not None:
        return np.flatnonzero(rng.random(len(everybody)) < count / len(everybody))
    return np.sort(rng.choice(len(everybody), count, replace=False))


def _some(clients: np.ndarray, fraction: float, settings: Settings, rng: np.random.Generator) -> list[int]:
    if settings.dp_clip is not None:
        return clients[rng.random(settings.num_clients)[clients] < fraction].tolist()
    count = int(fraction * len(clients) + rng.random())
    return rng.choice(clients, count, replace=False).tolist()


def _stream(trial_seed: int, round: int, purpose: str) -> np.random.Generator:
    return np.random.default_rng(stream_seed(trial_seed, round, purpose))


def batches_of(part: float, epochs: int, batches: int) -> int:
    """How many batches a client trains on that does a `part` of its `epochs`, each of so many `batches`: whole epochs, from 1
    to all with equal chance if `part` is drawn evenly; if there is one epoch, batches of it, of which FedProx's code knows,
    too."""
    unit, units = (batches, epochs) if epochs > 1 else (1, batches)
    return unit * min(units, 1 + int(part * units))
