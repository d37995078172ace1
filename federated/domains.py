"""Domains of hyper-parameters: the values among which a search chooses.

In JSON a number is a fixed value, a list a choice, and {"low": 0.001, "high": 1, "log": true} a range.
"""

import dataclasses
import json
import math
import typing

import numpy as np

from federated.options import shortened


@dataclasses.dataclass(frozen=True)
class Fixed:
    """One value."""

    value: float

    @property
    def values(self) -> tuple[float, ...]:
        return (self.value,)

    def draw(self, stream: np.random.RandomState) -> float:
        return self.value

    def holds(self, value: float) -> bool:
        return value == self.value

    def as_json(self) -> float:
        return self.value

    def __str__(self) -> str:
        return f"{self.value:g}"


@dataclasses.dataclass(frozen=True)
class Choice:
    """Several values, all equally likely."""

    values: tuple[float, ...]

    def draw(self, stream: np.random.RandomState) -> float:
        return self.values[stream.choice(len(self.values))]

    def holds(self, value: float) -> bool:
        return value in self.values

    def as_json(self) -> list[float]:
        return list(self.values)

    def __str__(self) -> str:
        return ", ".join(f"{value:g}" for value in self.values)


@dataclasses.dataclass(frozen=True)
class Uniform:
    """The numbers from low to high; with `whole` the whole numbers, both ends included."""

    low: float
    high: float
    whole: bool = False

    def draw(self, stream: np.random.RandomState) -> float:
        if self.whole:
            return int(stream.randint(int(self.low), int(self.high) + 1, dtype=np.int64))
        return float(stream.uniform(self.low, self.high))

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high

    def as_json(self) -> dict[str, typing.Any]:
        return {"low": self.low, "high": self.high}

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}"


@dataclasses.dataclass(frozen=True)
class LogUniform:
    """The numbers from low to high, their logarithms uniform; with `whole` rounded down. `base` changes no more than the last
    bits of a draw."""

    low: float
    high: float
    base: int = 10
    whole: bool = False

    def draw(self, stream: np.random.RandomState) -> float:
        log = math.log2 if self.base == 2 else math.log10
        value = self.base ** stream.uniform(log(self.low), log(self.high))
        return int(value) if self.whole else float(value)

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high

    def as_json(self) -> dict[str, typing.Any]:
        return {"low": self.low, "high": self.high, "log": True} | ({"base": 2} if self.base == 2 else {})

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}, log"


Domain = Fixed | Choice | Uniform | LogUniform

MAX_FLOAT32 = 1e38


@dataclasses.dataclass(frozen=True)
class Hparam:
    """One hyper-parameter: its default, the domain that a search draws from, and the bounds of valid values. If the default is
    an int, all values are."""

    default: float
    domain: Domain
    low: float = 0.0
    high: float = MAX_FLOAT32


def one_of(*values: float) -> Choice:
    return Choice(values)


def log_base(domain: Domain) -> int | None:
    """The base of the log axis on which the values of a domain are spread evenly: a log range's own, 10 for choices that span
    more than one power of ten, None for all others."""
    if isinstance(domain, LogUniform):
        return domain.base
    is_wide = isinstance(domain, Choice) and 0 < 10 * min(domain.values) < max(domain.values)
    return 10 if is_wide else None


_RANGE = {"low", "high", "log", "base"}


def from_json(value: object, parse: typing.Callable[[object], float], whole: bool) -> Domain:
    """The domain that `value` describes. parse(number) checks one of its numbers and may raise; with `whole` only whole numbers
    are drawn. Raises ValueError, which says why `value` is no list or range."""
    text = shortened(json.dumps(value))
    if isinstance(value, list):
        values = tuple(map(parse, value))
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{text} is not a list of different values")
        return Choice(values)
    if not isinstance(value, dict):
        return Fixed(parse(value))
    if not {"low", "high"} <= value.keys() <= _RANGE:
        raise ValueError(f'{text} is not a range such as {{"low": 0.001, "high": 1, "log": true}}')
    low, high, log, base = parse(value["low"]), parse(value["high"]), value.get("log", False), value.get("base", 10)
    if not low < high:
        raise ValueError(f"{text} is not a range: low is not below high")
    if not isinstance(log, bool):
        raise ValueError(f"{text} is not a range: log is neither true nor false")
    if base not in (2, 10) or ("base" in value and not log):
        raise ValueError(f"{text} is not a range: base is 2 or 10, and only with log")
    if log and low <= 0:
        raise ValueError(f"{text} is not a range: {low:g} has no logarithm")
    return LogUniform(low, high, base, whole) if log else Uniform(low, high, whole)
