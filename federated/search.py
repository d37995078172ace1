"""Search: which hyper-parameter sets a sweep tries."""

import dataclasses
import itertools
import math
import typing
from collections.abc import Iterator

import numpy as np

from federated import domains
from federated.domains import Choice, Domain, Fixed
from federated.seeds import seed_hash

RANDOM, GRID = "random", "grid"
KINDS = (RANDOM, GRID)

_STREAM = np.random.RandomState(0)  # seeded again for each draw: 70 times as fast as a new one


def draw(domain: Domain, name: str, seed: int) -> float:
    """The draw of `seed` for the hyper-parameter called `name`, which has a random stream of its own."""
    _STREAM.seed(seed_hash(seed, name))
    return domain.draw(_STREAM)


@dataclasses.dataclass(frozen=True)
class Space:
    """A search space: the domain of each hyper-parameter and its default, by name.

    Set k of a random search is the draw of seed k. Set 0 holds the defaults; if one lies outside of its domain, set 0 has the
    draw of seed 0 instead. Set k of a grid is the kth combination of the values of all Choices; the last name varies fastest.
    """

    kind: str  # one of KINDS
    domains: dict[str, Domain]
    defaults: dict[str, float]

    def sets(self, first: int, number: int) -> Iterator[tuple[int, dict[str, float]]]:
        """(k, hyper-parameters) of sets first, first + 1, …, first + number - 1. A grid may end earlier."""
        if self.kind == GRID:
            combinations = (dict(zip(self.domains, values)) for values in itertools.product(*self._axes()))
            yield from itertools.islice(enumerate(combinations), first, first + number)
            return
        for k in range(first, first + number):
            yield k, {name: self._value(name, domain, k) for name, domain in self.domains.items()}

    def _axes(self) -> list[tuple[float, ...]]:
        """The values of each hyper-parameter of a grid."""
        return [domain.values for domain in self.domains.values() if isinstance(domain, Fixed | Choice)]

    def _value(self, name: str, domain: Domain, k: int) -> float:
        if k == 0 and domain.holds(self.defaults[name]):
            return self.defaults[name]
        return draw(domain, name, k)

    def size(self) -> int:
        """How many sets a grid has."""
        return math.prod(map(len, self._axes()))

    def __str__(self) -> str:
        return f"{self.kind} search, {'; '.join(f'{name} {domain}' for name, domain in self.domains.items())}"

    def as_json(self) -> dict[str, typing.Any]:
        return {
            "search": self.kind,
            "domains": {name: domain.as_json() for name, domain in self.domains.items()},
            "defaults": self.defaults,
        }

    @classmethod
    def from_json(cls, value: typing.Any) -> "Space":
        """Raises ValueError, TypeError or KeyError if `value` is not what as_json() gives."""
        defaults = {str(name): default for name, default in value["defaults"].items()}
        if value["search"] not in KINDS or value["domains"].keys() != defaults.keys():
            raise ValueError("it is no search space")
        read = {
            name: domains.from_json(domain, _number, isinstance(defaults[name], int))
            for name, domain in value["domains"].items()
        }
        if value["search"] == GRID and not all(isinstance(domain, Fixed | Choice) for domain in read.values()):
            raise ValueError("a grid has no ranges")
        return cls(value["search"], read, defaults)


def _number(value: object) -> float:
    if type(value) not in (int, float) or not math.isfinite(typing.cast(float, value)):
        raise ValueError("it holds something that is no number")
    return typing.cast(float, value)
