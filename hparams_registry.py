"""Every hyper-parameter: its default and its seeded random draw, by algorithm, data set and local optimizer.

Set 0 of a sweep holds the defaults, set k > 0 the draw of seed k. Each hyper-parameter has a random stream of its own,
so that adding one leaves the draws of the others as they were.
"""

import dataclasses
import json

import numpy as np

from federated import algorithms, datasets
from federated.options import MOST, UsageError, shortened, shown
from federated.seeds import seed_hash

FLOAT32_MOST = 1e38


@dataclasses.dataclass(frozen=True)
class Hparam:
    """One hyper-parameter: its default, its draw, and the bounds that a value given by hand has to keep."""

    default: float
    draw: float
    low: float
    high: float


def _hparams(algorithm, dataset, local_optimizer, seed):
    """{name: Hparam} of every hyper-parameter that applies."""
    algorithm = algorithms.canonical(algorithm)
    if dataset not in datasets.REGISTRY:
        raise KeyError(f"unknown dataset {dataset!r}: the datasets are {', '.join(datasets.REGISTRY)}")
    hparams = {}

    def add(name, default, draw, low, high=FLOAT32_MOST):
        hparams[name] = Hparam(default, draw(np.random.RandomState(seed_hash(seed, name))), low, high)

    add("batch_size", 64, lambda r: int(2 ** r.uniform(5, 10)), low=1, high=MOST)
    add("dropout_rate", 0.5, lambda r: float(r.choice([0.0, 0.5])), low=0.0, high=1.0)

    if local_optimizer == "adam":
        add("learning_rate", 3e-4, lambda r: float(10 ** r.uniform(-5, -3)), low=0.0)
    if local_optimizer == "sgd":  # the space of FedHPO-B (Wang et al., 2022) for FedAvg
        add("learning_rate", 0.1, lambda r: float(10 ** r.uniform(-2, 0)), low=0.0)
        add("momentum", 0.0, lambda r: float(r.choice([0.0, 0.9])), low=0.0, high=1.0)
        add("weight_decay", 0.0, lambda r: float(r.choice([0.0, 0.001, 0.01, 0.1])), low=0.0)

    return hparams


def default_hparams(algorithm: str, dataset: str, local_optimizer: str = "adam") -> dict:
    """The defaults. Raises KeyError with the valid names where one is unknown."""
    return {name: hparam.default for name, hparam in _hparams(algorithm, dataset, local_optimizer, 0).items()}


def random_hparams(algorithm: str, dataset: str, seed: int, local_optimizer: str = "adam") -> dict:
    """The random draw of `seed`. Raises KeyError with the valid names where one is unknown."""
    return {name: hparam.draw for name, hparam in _hparams(algorithm, dataset, local_optimizer, seed).items()}


def check_hparams(values: dict, algorithm: str, dataset: str, local_optimizer: str = "adam") -> dict:
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
        checked[name] = kind(value)
    return checked
