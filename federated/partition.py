"""Which client holds which training samples: the partitions of NIID-Bench (Li et al., ICDE 2022, section 4).

Every process of a trial computes the partition anew from the trial's seed instead of sending it around.
"""

import dataclasses

import numpy as np

from federated.options import UsageError
from federated.seeds import stream_seed

MIN_SAMPLES = 10  # a draw that leaves a client with fewer is drawn again, as in NIID-Bench
MAX_DRAWS = 1000


@dataclasses.dataclass(frozen=True)
class Part:
    """One client's samples, as sorted indices into the training set: what it trains on and what it holds out."""

    train: np.ndarray
    val: np.ndarray


def iid(labels, settings, rng):
    return np.array_split(rng.permutation(len(labels)), settings.num_clients)


def dirichlet(labels, settings, rng):
    """Each label's samples go to the clients in proportions drawn from Dirichlet(alpha); full clients get no more."""
    clients, fair_share = settings.num_clients, len(labels) / settings.num_clients
    of_label = [np.flatnonzero(labels == label) for label in np.unique(labels)]

    def draw():
        shares = [[] for _ in range(clients)]
        sizes = np.zeros(clients)
        for indices in of_label:
            proportions = rng.dirichlet(np.full(clients, settings.partition_alpha)) * (sizes < fair_share)
            if not proportions.sum() > 0:  # all the mass fell on full clients, or underflowed at a tiny alpha
                return None
            cuts = (np.cumsum(proportions / proportions.sum())[:-1] * len(indices)).astype(int)
            for client, share in enumerate(np.split(rng.permutation(indices), cuts)):
                shares[client].append(share)
                sizes[client] += len(share)
        return [np.concatenate(share) for share in shares]

    return _draw_until_large_enough(draw, settings)


def by_labels(labels, settings, rng):
    """Each client holds `labels_per_client` labels; a label's samples are split evenly among its holders."""
    known = np.unique(labels)
    if settings.labels_per_client > len(known):
        raise UsageError(f"--labels_per_client {settings.labels_per_client} is more than the {len(known)} labels there are")
    holders = [[] for _ in known]
    for client in range(settings.num_clients):
        first = client % len(known)
        others = rng.choice(np.delete(np.arange(len(known)), first), settings.labels_per_client - 1, replace=False)
        for label in (first, *others):
            holders[label].append(client)
    shares = [[] for _ in range(settings.num_clients)]
    for label, clients in zip(known, holders):
        indices = rng.permutation(np.flatnonzero(labels == label))
        for client, share in zip(clients, np.array_split(indices, max(1, len(clients)))):
            shares[client].append(share)
    return [np.concatenate(share) for share in shares]


def quantity(labels, settings, rng):
    """Labels as in iid, sizes in proportions drawn from Dirichlet(alpha)."""
    order = rng.permutation(len(labels))

    def draw():
        proportions = rng.dirichlet(np.full(settings.num_clients, settings.partition_alpha))
        return np.split(order, (np.cumsum(proportions)[:-1] * len(order)).astype(int))

    return _draw_until_large_enough(draw, settings)


REGISTRY = {"iid": iid, "dirichlet": dirichlet, "labels": by_labels, "quantity": quantity}


def _draw_until_large_enough(draw, settings):
    for _ in range(MAX_DRAWS):
        shares = draw()
        if shares is not None and min(map(len, shares)) >= MIN_SAMPLES:
            return shares
    raise UsageError(
        f"--partition {settings.partition} left one of {settings.num_clients} clients with fewer than {MIN_SAMPLES} samples "
        f"in each of {MAX_DRAWS} draws: raise --partition_alpha {settings.partition_alpha} or lower --num_clients"
    )


def split(labels: np.ndarray, settings, trial_seed: int) -> list[Part]:
    """The part of each client, by the partition, sizes and holdout of `settings`, a function of them and the seed.

    Raises UsageError where the samples do not suffice.
    """
    rng = np.random.default_rng(stream_seed(trial_seed, "partition"))
    wanted = settings.samples_per_client
    if wanted is not None and wanted * settings.num_clients > len(labels):
        raise UsageError(
            f"--samples_per_client {wanted} x --num_clients {settings.num_clients} is more than the "
            f"{len(labels)} training samples of {settings.dataset}"
        )
    parts = []
    for client, share in enumerate(REGISTRY[settings.partition](labels, settings, rng)):
        share = rng.permutation(share)[:wanted]
        held_out = max(1, round(len(share) * settings.holdout_fraction))
        if held_out >= len(share):
            raise UsageError(
                f"client {client} has {len(share)} samples, of which --holdout_fraction {settings.holdout_fraction} leaves "
                f"none to train on: lower --num_clients {settings.num_clients} or raise --samples_per_client"
            )
        parts.append(Part(np.sort(share[held_out:]), np.sort(share[:held_out])))
    return parts
