"""Which client holds which samples: the partitions of NIID-Bench (Li et al., ICDE 2022, section 4), and the data's own.

Every process of a trial computes the partition from the trial's seed, so that no message needs to carry it.
"""

import collections
import dataclasses
import typing
from collections.abc import Callable

import numpy as np

from federated.data import datasets
from federated.data.datasets import Dataset
from federated.extension import Registry
from federated.options import UsageError
from federated.seeds import stream_seed

if typing.TYPE_CHECKING:
    from federated.settings import Settings

MIN_SAMPLES = 10  # a draw that leaves a client with fewer is drawn again, as in NIID-Bench
MAX_DRAWS = 1000


@dataclasses.dataclass(frozen=True)
class ClientSplit:
    """One client's samples, as sorted indices: into the training set what it trains on and what it holds out, and into the test
    set those of its own distribution, of which it may have none."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray


Share = Callable[[Dataset, "Settings", np.random.Generator], list[np.ndarray]]
REGISTRY: Registry[Share] = Registry("partition")


def register(name: str) -> Callable[[Share], Share]:
    """A decorator that lets options name a partition: a function of the data, the settings and the generator that it has to
    draw from, which returns the indices of each client's training samples. Raises UsageError if the name exists."""

    def decorate(share: Share) -> Share:
        REGISTRY.require(callable(share), name, "a function of data, settings and a generator")
        REGISTRY.add(name, share)
        return share

    return decorate


@register("iid")
def iid(data: Dataset, settings: "Settings", rng: np.random.Generator) -> list[np.ndarray]:
    return np.array_split(rng.permutation(len(data.train_labels)), settings.num_clients)


@register("dirichlet")
def dirichlet(data: Dataset, settings: "Settings", rng: np.random.Generator) -> list[np.ndarray]:
    """Each label's samples go to the clients in proportions drawn from Dirichlet(alpha); full clients get no more."""
    labels, clients = data.train_labels, settings.num_clients
    fair_share = len(labels) / clients
    of_label = [np.flatnonzero(labels == label) for label in np.unique(labels)]

    def draw():
        shares: list[list] = [[] for _ in range(clients)]
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

    return _draw_until_large_enough(draw, settings, len(labels))


@register("labels")
def by_labels(data: Dataset, settings: "Settings", rng: np.random.Generator) -> list[np.ndarray]:
    """Client i holds label i, counted round, and `labels_per_client` - 1 others; a label's samples are split evenly among its
    holders."""
    labels = data.train_labels
    known = np.unique(labels)
    if settings.labels_per_client > len(known):
        raise UsageError(f"--labels_per_client {settings.labels_per_client} is more than the {len(known)} labels there are")
    holders: list[list] = [[] for _ in known]
    for client in range(settings.num_clients):
        first = client % len(known)
        others = rng.choice(np.delete(np.arange(len(known)), first), settings.labels_per_client - 1, replace=False)
        for label in (first, *others):
            holders[label].append(client)
    shares: list[list] = [[] for _ in range(settings.num_clients)]
    for label, clients in zip(known, holders):
        indices = rng.permutation(np.flatnonzero(labels == label))
        for client, share in zip(clients, np.array_split(indices, max(1, len(clients)))):
            shares[client].append(share)
    return [np.concatenate(share) for share in shares]


@register("quantity")
def quantity(data: Dataset, settings: "Settings", rng: np.random.Generator) -> list[np.ndarray]:
    """Labels as in iid, sizes in proportions drawn from Dirichlet(alpha)."""
    order = rng.permutation(len(data.train_labels))

    def draw():
        proportions = rng.dirichlet(np.full(settings.num_clients, settings.partition_alpha))
        return np.split(order, (np.cumsum(proportions)[:-1] * len(order)).astype(int))

    return _draw_until_large_enough(draw, settings, len(order))


@register("natural")
def natural(data: Dataset, settings: "Settings", rng: np.random.Generator) -> list[np.ndarray]:
    """A client holds what one of the data's owners has, who is drawn if there are more, or an equal share of it. Owners with
    too few samples to train and validate on do not take part."""
    if data.train_owners is None:
        have = [name for name, spec in datasets.REGISTRY.items() if spec.has_owners]
        raise UsageError(
            f"--partition natural: the samples of {settings.dataset} have no owners; those of {', '.join(have)} do"
        )
    clients = settings.num_clients
    owned = [each for each in _by_owner(data.train_owners, data.spec) if _held_out(len(each), settings) < len(each)]
    if clients < len(owned):
        return [owned[owner] for owner in np.sort(rng.choice(len(owned), clients, replace=False))]
    if not owned or clients % len(owned):
        raise UsageError(
            f"--num_clients {clients}: under --partition natural {len(owned)} owners of {settings.dataset} have enough samples "
            "to train on: give as many clients, fewer, or a multiple"
        )
    if clients == len(owned):
        return owned
    return [share for each in owned for share in np.array_split(rng.permutation(each), clients // len(owned))]


def _by_owner(owners: np.ndarray, spec: datasets.Spec) -> list[np.ndarray]:
    """The sorted indices of each owner's samples, by number. `owners` [samples] says whose each is."""
    counts = np.bincount(owners, minlength=spec.num_owners or 0)
    return np.split(np.argsort(owners, kind="stable"), np.cumsum(counts)[:-1])


def _draw_until_large_enough(draw: Callable[[], list[np.ndarray] | None], settings: "Settings", samples: int):
    if MIN_SAMPLES * settings.num_clients > samples:  # no further draw can change that
        raise UsageError(
            f"--num_clients {settings.num_clients}: under --partition {settings.partition} each has at least {MIN_SAMPLES} "
            f"samples, and {settings.dataset} has {samples}"
        )
    for _ in range(MAX_DRAWS):
        shares = draw()
        if shares is not None and min(map(len, shares)) >= MIN_SAMPLES:
            return shares
    raise UsageError(
        f"--partition {settings.partition} left one of {settings.num_clients} clients with fewer than {MIN_SAMPLES} samples "
        f"in each of {MAX_DRAWS} draws: raise --partition_alpha {settings.partition_alpha} or lower --num_clients"
    )


# The settings of which a split is a function, beside the data and the seed
SPLIT_BY = (
    "dataset", "num_clients", "samples_per_client", "partition", "partition_alpha", "labels_per_client", "holdout_fraction",
)  # fmt: skip


def split(data: datasets.Dataset, settings: "Settings", trial_seed: int) -> list[ClientSplit]:
    """The split of each client, by the partition, sizes and holdout of `settings`, a function of them and the seed.

    The test set goes to the clients as their training samples do: see `_test_shares` and, under natural, `_tests_of_owners`.
    Raises UsageError if the samples do not suffice.
    """
    rng = np.random.default_rng(stream_seed(trial_seed, "partition"))
    labels, wanted = data.train_labels, settings.samples_per_client
    if wanted is not None and wanted * settings.num_clients > len(labels):
        raise UsageError(
            f"--samples_per_client {wanted} x --num_clients {settings.num_clients} is more than the "
            f"{len(labels)} training samples of {settings.dataset}"
        )
    given = REGISTRY[settings.partition](data, settings, rng)
    if settings.partition in REGISTRY.owners:
        _check_own(given, settings, len(labels))
    shares = [rng.permutation(share)[:wanted] for share in given]
    divide = _tests_of_owners if settings.partition == "natural" else _test_shares
    tests = divide(data, shares, np.random.default_rng(stream_seed(trial_seed, "test_partition")))
    splits = []
    for client, (share, test) in enumerate(zip(shares, tests)):
        held_out = _held_out(len(share), settings)
        if held_out >= len(share):
            mend = "lower it" if len(share) > 1 else f"lower --num_clients {settings.num_clients}"
            raise UsageError(
                f"client {client} has {len(share)} samples, of which --holdout_fraction {settings.holdout_fraction} leaves "
                f"none to train on: {mend}"
            )
        splits.append(ClientSplit(np.sort(share[held_out:]), np.sort(share[:held_out]), np.sort(test)))
    return splits


def _check_own(shares: typing.Any, settings: "Settings", samples: int) -> None:
    """Raises UsageError if what a partition of one's own returned is none."""
    name = f"--partition {settings.partition}"
    if not isinstance(shares, list) or len(shares) != settings.num_clients:
        raise UsageError(f"{name} did not return a list of {settings.num_clients} arrays, one a client")
    for client, share in enumerate(shares):
        is_array = isinstance(share, np.ndarray) and share.ndim == 1 and share.dtype.kind in "iu"
        if not is_array or (len(share) and not (share.min() >= 0 and share.max() < samples)):
            raise UsageError(f"{name}: what client {client} has is not an array of indices from 0 to {samples - 1}")
        if not len(share):
            raise UsageError(f"{name} leaves client {client} without samples")
    together = np.concatenate(shares)
    if len(np.unique(together)) < len(together):
        raise UsageError(f"{name} gives a sample to more than one client, or twice to one")


def _held_out(samples: int, settings: "Settings") -> int:
    """How many of its samples a client validates on."""
    return max(1, round(samples * settings.holdout_fraction))


def test_set(data: datasets.Dataset, settings: "Settings", splits: list[ClientSplit]) -> np.ndarray:
    """The sorted indices of the samples that the global model is tested on: all, or those of the clients under natural, where
    the data may have more owners than the federation."""
    if settings.partition != "natural":
        return np.arange(len(data.test_labels))
    return np.sort(np.concatenate([each.test for each in splits]))


def _tests_of_owners(data: Dataset, shares: list[np.ndarray], rng: np.random.Generator) -> list[np.ndarray]:
    """The test samples of each client: those of its owner, or an equal share of them. Raises UsageError if there are none."""
    assert data.train_owners is not None and data.test_owners is not None
    known, owners = _by_owner(data.test_owners, data.spec), [int(data.train_owners[share[0]]) for share in shares]
    sharing = collections.Counter(owners)
    tests = {owner: iter(np.array_split(rng.permutation(known[owner]), count)) for owner, count in sharing.items()}
    found = [next(tests[owner]) for owner in owners]
    if not any(map(len, found)):
        raise UsageError("--partition natural: none of the owners that train has test samples; give another --partition")
    return found


def _test_shares(data: Dataset, shares: list[np.ndarray], rng: np.random.Generator):
    """The test samples of each client: of every label in proportion to how much of it each client's share of the training set
    holds, by largest remainders, equal ones in random order. A sample goes to one client, to none if nobody holds its label."""
    held = np.array([np.bincount(data.train_labels[share], minlength=data.spec.num_classes) for share in shares])
    tests: list[list] = [[] for _ in shares]
    for label in range(data.spec.num_classes):
        indices, order = rng.permutation(np.flatnonzero(data.test_labels == label)), rng.permutation(len(shares))
        total = held[:, label].sum()
        if total == 0:
            continue
        sizes, remainders = np.divmod(len(indices) * held[:, label], total)
        sizes[np.lexsort((order, -remainders))[: len(indices) - sizes.sum()]] += 1
        for test, some in zip(tests, np.split(indices, np.cumsum(sizes)[:-1])):
            test.append(some)
    return [np.concatenate(test) for test in tests]
