"""The federated algorithms. One file holds one algorithm, its client half and its server half side by side.

None imports torch when it is loaded, so that looking up an algorithm's properties costs nothing.
"""

import importlib
import typing

from federated.algorithms.fedavg import Fedavg
from federated.domains import Hparam
from federated.extension import Registry

REGISTRY: Registry[type[Fedavg]] = Registry("algorithm")
Algorithm = typing.TypeVar("Algorithm", bound=type[Fedavg])


def register(algorithm: Algorithm) -> Algorithm:
    """Let options name an algorithm, a class that derives from Fedavg. Returns it, so that this may stand above the class as
    @register. Raises UsageError if the class lacks what is needed, or its name exists."""
    name = getattr(algorithm, "__name__", algorithm)
    REGISTRY.require(isinstance(algorithm, type) and issubclass(algorithm, Fedavg), name, "a class that derives from Fedavg")

    def require(attribute: str, holds: typing.Callable[[typing.Any], bool], what: str) -> None:
        value = getattr(algorithm, attribute)
        REGISTRY.require(holds(value), name, f"right: its {attribute} is {value!r} and has to be {what}")

    for attribute in ("broadcasts", "uploads", "optimizers"):
        require(attribute, lambda value: type(value) is int and value > 0, "a whole number of at least 1")
    for attribute in ("client_vectors", "server_vectors"):
        require(attribute, lambda value: type(value) is int and value >= 0, "a whole number of at least 0")
    for attribute in _FLAGS:
        require(attribute, lambda value: isinstance(value, bool), "True or False")
    optimizers = Fedavg.local_optimizers
    require("local_optimizers", lambda value: value and set(value) <= set(optimizers), f"a tuple of some of {optimizers}")
    require("hyperparameters", _are_hparams, "a dict of names and Hparams whose defaults lie within their bounds")
    REGISTRY.add(algorithm.__name__, algorithm)
    return algorithm


_FLAGS = ("takes_momentum", "keeps_moments", "personal", "has_global_model", "pooled", "uses_features")


def _are_hparams(values: typing.Any) -> bool:
    return isinstance(values, dict) and all(
        isinstance(name, str) and name and isinstance(hparam, Hparam) and hparam.low <= hparam.default <= hparam.high
        for name, hparam in values.items()
    )


# name: module of this package; the class has the name
_BUILT_IN = {
    name: name.lower()
    for name in (
        "Fedavg",
        "Fedsgd",
        "Fedavgm",
        "Fedadagrad",
        "Fedadam",
        "Fedyogi",
        "Fedprox",
        "Scaffold",
        "Fednova",
        "Feddyn",
        "Moon",
        "Fedexp",
        "Fedsam",
        "Fedcm",
        "Fedntd",
        "Fedlc",
        "Feddecorr",
        "Feddc",
        "Fedbn",
        "Fedper",
        "Fedrep",
        "Lgfedavg",
        "Ditto",
        "Pfedme",
        "Apfl",
        "Fedbabu",
        "Perfedavg",
        "Fedala",
        "Finetune",
        "Local",
        "Centralized",
    )
}


for _name, _module in _BUILT_IN.items():
    register(getattr(importlib.import_module(f"{__name__}.{_module}"), _name))


def canonical(name: str) -> str:
    """The registered spelling of `name`, which may come in any case. Raises KeyError with the valid names."""
    for known in REGISTRY:
        if known.lower() == name.lower():
            return known
    raise KeyError(f"unknown algorithm {name!r}: the algorithms are {', '.join(REGISTRY)}")


def load(name: str) -> type[Fedavg]:
    """The class of the algorithm called `name`."""
    return REGISTRY[canonical(name)]


def nearest_built_in(algorithm: type[Fedavg]) -> str:
    """The built-in algorithm that a class is, or derives from by the fewest steps."""
    return next(base.__name__ for base in algorithm.__mro__ if base.__name__ in _BUILT_IN and REGISTRY[base.__name__] is base)
