"""Every hyper-parameter: its default and its seeded random draw, by algorithm, data set and local optimizer.

Set 0 of a sweep holds the defaults, set k > 0 the draw of seed k. Each hyper-parameter has a random stream of its own,
so that adding one leaves the draws of the others as they were.
"""

import dataclasses
import json
from collections.abc import Callable

import numpy as np

from federated import algorithms
from federated.data import datasets
from federated.options import MAX_INTEGER, UsageError, shortened, shown
from federated.seeds import seed_hash

MAX_FLOAT32 = 1e38
_STREAM = np.random.RandomState(0)  # seeded anew for each draw, which is 70 times as fast as making one


@dataclasses.dataclass(frozen=True)
class Hparam:
    """One hyper-parameter: its default, its draw, and the bounds that a value given by hand has to keep."""

    default: float
    draw: float
    low: float
    high: float


def _hparams(algorithm: str, dataset: str, local_optimizer: str | None, seed: int) -> dict[str, Hparam]:
    """{name: Hparam} of every hyper-parameter that applies."""
    algorithm = algorithms.canonical(algorithm)
    local_optimizer = local_optimizer or algorithms.load(algorithm).local_optimizers[0]
    if dataset not in datasets.REGISTRY:
        raise KeyError(f"unknown dataset {dataset!r}: the datasets are {', '.join(datasets.REGISTRY)}")
    hparams = {}

    def add(
        name: str, default: float, draw: Callable[[np.random.RandomState], float], low: float, high: float = MAX_FLOAT32
    ) -> None:
        _STREAM.seed(seed_hash(seed, name))
        hparams[name] = Hparam(default, draw(_STREAM), low, high)

    if algorithm != "Fedsgd":
        add("batch_size", 64, lambda r: int(2 ** r.uniform(5, 10)), low=1, high=MAX_INTEGER)
    add("dropout_rate", 0.5, lambda r: float(r.choice([0.0, 0.5])), low=0.0, high=1.0)

    if local_optimizer == "adam":
        if dataset == "heart_disease":  # a few steps a round and a convex loss
            add("learning_rate", 1e-2, lambda r: float(10 ** r.uniform(-3, -1)), low=0.0)
        else:
            add("learning_rate", 3e-4, lambda r: float(10 ** r.uniform(-5, -3)), low=0.0)
    if local_optimizer == "sgd":  # the space of FedHPO-B (Wang et al., 2022) for FedAvg
        if algorithm == "Pfedme":  # the published ones are about 0.01; the outer steps diverge from 2 / lambda on
            add("learning_rate", 0.01, lambda r: float(10 ** r.uniform(-3, -1)), low=0.0)
        else:
            add("learning_rate", 0.1, lambda r: float(10 ** r.uniform(-2, 0)), low=0.0)
        if algorithms.load(algorithm).takes_momentum:
            add("momentum", 0.0, lambda r: float(r.choice([0.0, 0.9])), low=0.0, high=0.999)
        add("weight_decay", 0.0, lambda r: float(r.choice([0.0, 0.001, 0.01, 0.1])), low=0.0)

    # The spaces of the papers
    if algorithm == "Fedavgm":
        add("server_momentum", 0.9, lambda r: float(r.choice([0.7, 0.9, 0.97, 0.99, 0.997])), low=0.0, high=0.9999)
        add("server_learning_rate", 1.0, lambda r: float(10 ** r.uniform(-1, 0)), low=0.0)
    if algorithm in ("Fedadagrad", "Fedadam", "Fedyogi"):
        best = 0.1 if algorithm == "Fedadagrad" else 10**-2.5
        add("server_learning_rate", best, lambda r: float(10 ** r.uniform(-3, 0)), low=0.0)
        add("tau", 1e-3, lambda r: float(10 ** r.uniform(-4, -2)), low=1e-12)
    if algorithm in ("Fedadam", "Fedyogi"):
        add("beta1", 0.9, lambda r: 0.9, low=0.0, high=0.9999)
        add("beta2", 0.99, lambda r: 0.99, low=0.0, high=0.9999)
    if algorithm == "Fedprox":
        add("mu", 0.01, lambda r: float(r.choice([0.001, 0.01, 0.1, 1.0])), low=0.0)
    if algorithm == "Scaffold":
        add("server_learning_rate", 1.0, lambda r: 1.0, low=0.0)
    if algorithm == "Feddyn":
        add("alpha", 0.01, lambda r: float(r.choice([0.1, 0.01, 0.001])), low=1e-12)
    if algorithm == "Moon":
        add("mu", 1.0, lambda r: float(r.choice([0.1, 1.0, 5.0, 10.0])), low=0.0)
        add("temperature", 0.5, lambda r: 0.5, low=1e-3)
    if algorithm == "Fedrep":
        add("head_epochs", 5, lambda r: int(r.choice([1, 5, 10])), low=1, high=MAX_INTEGER)
    if algorithm == "Ditto":
        add("lambda", 0.1, lambda r: float(r.choice([0.01, 0.1, 1.0])), low=0.0)
    if algorithm == "Pfedme":
        add("lambda", 15.0, lambda r: float(r.choice([5.0, 15.0, 30.0])), low=0.0)
        add("inner_steps", 5, lambda r: int(r.choice([1, 5, 10])), low=1, high=MAX_INTEGER)
        add("personal_learning_rate", 0.01, lambda r: float(10 ** r.uniform(-2.5, -1.5)), low=0.0)
        add("beta", 1.0, lambda r: float(r.choice([1.0, 2.0])), low=0.0)
    if algorithm == "Apfl":
        add("alpha", 0.5, lambda r: float(r.choice([0.25, 0.5, 0.75])), low=0.0, high=1.0)

    return hparams


def default_hparams(algorithm: str, dataset: str, local_optimizer: str | None = None) -> dict:
    """The defaults. Raises KeyError with the valid names if one is unknown."""
    return {name: hparam.default for name, hparam in _hparams(algorithm, dataset, local_optimizer, 0).items()}


def random_hparams(algorithm: str, dataset: str, seed: int, local_optimizer: str | None = None) -> dict:
    """The random draw of `seed`. Raises KeyError with the valid names if one is unknown."""
    return {name: hparam.draw for name, hparam in _hparams(algorithm, dataset, local_optimizer, seed).items()}


def check_hparams(values: dict, algorithm: str, dataset: str, local_optimizer: str | None = None) -> dict:
    """`values` given by hand, as they will be used. Raises UsageError that names a wrong one and what is valid."""
    known = _hparams(algorithm, dataset, local_optimizer, 0)
    checked = {}
    for name, value in values.items():
        if name not in known:
            raise UsageError(f"--hparams: unknown hyper-parameter {shown(name)}: {algorithm} has {', '.join(known)}")
        hparam = known[name]
        kind = type(hparam.default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (is_number and hparam.low <= value <= hparam.high and kind(value) == value):
            what = "a whole number" if kind is int else "a number"
            raise UsageError(
                f"--hparams: {name} {shortened(json.dumps(value))} is not {what} of at least {hparam.low:g} and at most "
                f"{hparam.high:g}"
            )
        checked[name] = kind(value) + kind(0)  # -0.0 is 0.0, also in the name of the set's directory
    return checked
