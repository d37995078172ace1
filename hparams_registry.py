"""Every hyper-parameter: its default, its domain and its bounds, by algorithm, data set and local optimizer.

Set 0 of a sweep holds the defaults, set k > 0 the draw of seed k. Each hyper-parameter has a random stream of its own,
so adding one does not change the draws of the others.
"""

import dataclasses
import functools
import json
import typing

from federated import algorithms, domains
from federated.data import datasets
from federated.domains import Fixed, Hparam, LogUniform, Uniform, one_of
from federated.options import MAX_INTEGER, UsageError, shortened, shown
from federated.search import GRID, Space, draw

BATCH_SIZE = Hparam(64, LogUniform(32, 1024, base=2, whole=True), low=1, high=MAX_INTEGER)  # for all but Fedsgd
DROPOUT_RATE = Hparam(0.5, one_of(0.0, 0.5), high=1.0)

# The learning rate by local optimizer
LEARNING_RATE = {
    "adam": Hparam(3e-4, LogUniform(1e-5, 1e-3)),
    "sgd": Hparam(0.1, LogUniform(0.01, 1)),  # the space of FedHPO-B (Wang et al., 2022) for FedAvg, also below
}
MOMENTUM = Hparam(0.0, one_of(0.0, 0.9), high=0.999)  # of sgd, if the algorithm takes it
WEIGHT_DECAY = Hparam(0.0, one_of(0.0, 0.001, 0.01, 0.1))  # of sgd

# Learning rates that replace these, by data set or algorithm, and local optimizer
OVERRIDES = {
    ("heart_disease", "adam"): Hparam(1e-2, LogUniform(1e-3, 1e-1)),  # a few steps a round and a convex loss
    ("Pfedme", "sgd"): Hparam(0.01, LogUniform(1e-3, 1e-1)),  # published: about 0.01; outer steps diverge from 2 / lambda on
}

# By algorithm, with the search spaces of the papers
SERVER_LEARNING_RATE = LogUniform(1e-3, 1)
TAU = Hparam(1e-3, LogUniform(1e-4, 1e-2), low=1e-12)
BETAS = {"beta1": Hparam(0.9, Fixed(0.9), high=0.9999), "beta2": Hparam(0.99, Fixed(0.99), high=0.9999)}
FINETUNE_EPOCHS = Hparam(1, one_of(1, 5, 10), low=1, high=MAX_INTEGER)
OF_ALGORITHM: dict[str, dict[str, Hparam]] = {
    "Fedavgm": {
        "server_momentum": Hparam(0.9, one_of(0.7, 0.9, 0.97, 0.99, 0.997), high=0.9999),
        "server_learning_rate": Hparam(1.0, LogUniform(0.1, 1)),
    },
    "Fedadagrad": {"server_learning_rate": Hparam(0.1, SERVER_LEARNING_RATE), "tau": TAU},
    "Fedadam": {"server_learning_rate": Hparam(10**-2.5, SERVER_LEARNING_RATE), "tau": TAU, **BETAS},
    "Fedyogi": {"server_learning_rate": Hparam(10**-2.5, SERVER_LEARNING_RATE), "tau": TAU, **BETAS},
    "Fedprox": {"mu": Hparam(0.01, one_of(0.001, 0.01, 0.1, 1.0))},
    "Scaffold": {"server_learning_rate": Hparam(1.0, Fixed(1.0))},
    "Feddyn": {"alpha": Hparam(0.01, one_of(0.1, 0.01, 0.001), low=1e-12)},
    "Moon": {"mu": Hparam(1.0, one_of(0.1, 1.0, 5.0, 10.0)), "temperature": Hparam(0.5, Fixed(0.5), low=1e-3)},
    "Fedexp": {"epsilon": Hparam(1e-3, one_of(1e-3, 10**-2.5, 1e-2, 10**-1.5, 0.1), low=1e-12)},
    "Fedsam": {"rho": Hparam(0.05, one_of(0.01, 0.05, 0.1, 0.5))},
    "Fedcm": {"alpha": Hparam(0.1, one_of(0.05, 0.1, 0.2, 0.5), high=1.0)},
    "Fedntd": {"beta": Hparam(1.0, one_of(0.1, 0.3, 1.0, 3.0)), "tau": Hparam(1.0, one_of(1.0, 3.0), low=1e-3)},
    "Fedlc": {"tau": Hparam(1.0, one_of(0.1, 0.5, 1.0))},
    "Feddecorr": {"beta": Hparam(0.1, one_of(0.01, 0.05, 0.1, 0.2, 0.3))},
    "Feddc": {"alpha": Hparam(0.1, one_of(0.1, 0.01))},
    "Fedrep": {"head_epochs": Hparam(5, one_of(1, 5, 10), low=1, high=MAX_INTEGER)},
    "Lgfedavg": {"global_layers": Hparam(2, one_of(1, 2, 3), low=1, high=MAX_INTEGER)},
    "Ditto": {"lambda": Hparam(0.1, one_of(0.01, 0.1, 1.0))},
    "Pfedme": {
        "lambda": Hparam(15.0, one_of(5.0, 15.0, 30.0)),
        "inner_steps": Hparam(5, one_of(1, 5, 10), low=1, high=MAX_INTEGER),
        "personal_learning_rate": Hparam(0.01, LogUniform(10**-2.5, 10**-1.5)),
        "beta": Hparam(1.0, one_of(1.0, 2.0)),
    },
    "Apfl": {"alpha": Hparam(0.5, one_of(0.25, 0.5, 0.75), high=1.0)},
    "Fedbabu": {"finetune_epochs": dataclasses.replace(FINETUNE_EPOCHS, default=5)},
    "Perfedavg": {"alpha": Hparam(0.01, one_of(0.001, 0.01, 0.1))},
    "Fedala": {
        "weight_learning_rate": Hparam(1.0, one_of(0.1, 1.0, 10.0)),
        "weight_layers": Hparam(1, one_of(1, 2, 3), low=1, high=MAX_INTEGER),
        "weight_share": Hparam(0.8, Fixed(0.8), low=1e-3, high=1.0),
    },
    "Finetune": {"finetune_epochs": FINETUNE_EPOCHS},
}


def hparams_of(algorithm: str, dataset: str, local_optimizer: str | None = None) -> dict[str, Hparam]:
    """{name: Hparam} of every hyper-parameter that applies. An extension's algorithm has those of the built-in one that it
    derives from, and those in its classes. Raises KeyError with the valid names if a name is unknown."""
    kind = algorithms.load(algorithm)
    base = algorithms.nearest_built_in(kind)
    local_optimizer = local_optimizer or kind.local_optimizers[0]
    if dataset not in datasets.REGISTRY:
        raise KeyError(f"unknown dataset {dataset!r}: the datasets are {', '.join(datasets.REGISTRY)}")
    found = {} if base == "Fedsgd" else {"batch_size": BATCH_SIZE}
    found["dropout_rate"] = DROPOUT_RATE
    found["learning_rate"] = OVERRIDES.get(
        (dataset, local_optimizer), OVERRIDES.get((base, local_optimizer), LEARNING_RATE[local_optimizer])
    )
    if local_optimizer == "sgd":
        if kind.takes_momentum:
            found["momentum"] = MOMENTUM
        found["weight_decay"] = WEIGHT_DECAY
    found |= OF_ALGORITHM.get(base, {})
    for each in reversed(kind.__mro__):
        found |= vars(each).get("hyperparameters", {})
    return found


def default_hparams(algorithm: str, dataset: str, local_optimizer: str | None = None) -> dict:
    """The defaults. Raises KeyError with the valid names if one is unknown."""
    return {name: hparam.default for name, hparam in hparams_of(algorithm, dataset, local_optimizer).items()}


def random_hparams(algorithm: str, dataset: str, seed: int, local_optimizer: str | None = None) -> dict:
    """The random draw of `seed`. Raises KeyError with the valid names if one is unknown."""
    return {name: draw(hparam.domain, name, seed) for name, hparam in hparams_of(algorithm, dataset, local_optimizer).items()}


def space_of(kind: str, values: dict, algorithm: str, dataset: str, local_optimizer: str) -> Space:
    """The registry's search space, in which `values`, {name: domain as in JSON}, replace its own domains. A grid combines the
    lists in `values`; all other hyper-parameters have their defaults. Raises UsageError, which names the wrong one."""
    known = hparams_of(algorithm, dataset, local_optimizer)
    given = {}
    for name, value in values.items():
        if name not in known:
            raise UsageError(f"--hparams: unknown hyper-parameter {shown(name)}: {algorithm} has {', '.join(known)}")
        parse = functools.partial(_checked, name, known[name])
        try:
            given[name] = domains.from_json(value, parse, whole=isinstance(known[name].default, int))
        except ValueError as error:
            raise UsageError(f"--hparams: {name} {error}") from error
        if kind == GRID and isinstance(given[name], Uniform | LogUniform):
            raise UsageError(f"--search grid: {name} has the range {json.dumps(value)}: give a list of values")
    others = {name: Fixed(hparam.default) if kind == GRID else hparam.domain for name, hparam in known.items()}
    defaults = {name: hparam.default for name, hparam in known.items()}
    return Space(kind, others | given, defaults)


def check_hparams(values: dict, algorithm: str, dataset: str, local_optimizer: str | None = None) -> dict:
    """Check the user's `values` and return them with their defaults' types. Raises UsageError, which says what is valid."""
    known = hparams_of(algorithm, dataset, local_optimizer)
    if unknown := values.keys() - known.keys():
        name = next(name for name in values if name in unknown)
        raise UsageError(f"--hparams: unknown hyper-parameter {shown(name)}: {algorithm} has {', '.join(known)}")
    return {name: _checked(name, known[name], value) for name, value in values.items()}


def _checked(name: str, hparam: Hparam, value: typing.Any) -> float:
    kind = type(hparam.default)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and hparam.low <= value <= hparam.high and kind(value) == value):
        what = "a whole number" if kind is int else "a number"
        raise UsageError(
            f"--hparams: {name} {shortened(json.dumps(value))} is not {what} of at least {hparam.low:g} and at most "
            f"{hparam.high:g}"
        )
    return kind(value) + kind(0)  # -0.0 becomes 0.0, also in the name of the set's directory
