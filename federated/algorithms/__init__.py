"""The federated algorithms. One file holds one algorithm, its client half and its server half side by side.

None imports torch as it is loaded, so that what an algorithm asks for can be looked up at no cost.
"""

import importlib
import typing

if typing.TYPE_CHECKING:
    from federated.algorithms.fedavg import Fedavg

# name: module of this package; the class has the name
REGISTRY = {
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


def canonical(name: str) -> str:
    """The registered spelling of `name`, which may come in any case. Raises KeyError with the valid names."""
    for known in REGISTRY:
        if known.lower() == name.lower():
            return known
    raise KeyError(f"unknown algorithm {name!r}: the algorithms are {', '.join(REGISTRY)}")


def load(name: str) -> "type[Fedavg]":
    """The class of the algorithm called `name`."""
    known = canonical(name)
    return getattr(importlib.import_module(f"{__name__}.{REGISTRY[known]}"), known)
