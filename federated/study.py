"""A study: several sweeps in one output directory, one for each combination of settings."""

import itertools
import pathlib
import typing

from federated.options import UsageError, names_of, say
from federated.settings import USED_UNDER, Settings, check_same_settings, stored_settings

Given = dict[str, typing.Any]  # settings that the user gave, one value each


def combinations(axes: dict[str, list]) -> list[Given]:
    """Every combination of the values in `axes`, {setting: its values}; the first setting varies slowest. A setting is left out
    of those in which it has no effect, unless that is all of them."""
    names = [name for name in names_of(Settings) if name in axes]
    every = [dict(zip(names, values)) for values in itertools.product(*(axes[name] for name in names))]
    for name in USED_UNDER.keys() & axes.keys():
        with_effect = [partition for partition in axes.get("partition", []) if partition in USED_UNDER[name]]
        if with_effect:
            for given in every:
                if given["partition"] not in with_effect:
                    del given[name]
    return [dict(given) for given in dict.fromkeys(tuple(each.items()) for each in every)]


def sweeps_of(combinations: list[Given], output_dir: pathlib.Path) -> list[Settings]:
    """The sweep of each combination, equal ones once. Raises UsageError if values do not fit together, or a sweep in
    `output_dir` was made with others. Rounds that were given may be more than those of the sweep there."""
    sweeps: dict[str, Settings] = {}
    for given in combinations:
        settings = Settings(**given)
        same = sweeps.setdefault(settings.name, settings)
        for name, value in settings.values().items():
            if value != same.values()[name]:
                raise UsageError(f"--{name} {same.values()[name]} {value}: it takes one value, as it is not in a sweep's name")
    for name, settings in sweeps.items():
        may_extend = any("rounds" in given for given in combinations)
        check_same_settings(output_dir / name, settings, stored_settings(output_dir / name), may_extend)
    return list(sweeps.values())


def sweeps_there(output_dir: pathlib.Path) -> list[Settings]:
    """The sweeps in `output_dir`, by name. Says which cannot be read."""
    found = []
    for directory in sorted(output_dir.iterdir()) if output_dir.is_dir() else []:
        try:
            settings = stored_settings(directory) if directory.is_dir() else None
            if settings is not None and settings.name != directory.name:
                raise UsageError(f"{str(directory)!r} holds the settings of {settings.name}")
        except (UsageError, OSError) as error:
            say(f"Ignored: {error}")
            continue
        if settings is not None:
            found.append(settings)
    return found


def matches(settings: Settings, given: Given) -> bool:
    """True if a sweep has all settings that were given."""
    values = settings.values()
    return all(
        values[name].lower() == value.lower() if name == "algorithm" else values[name] == value for name, value in given.items()
    )


Conditions = dict[str, list[str]]  # {setting: the texts of its values, one of which a sweep has to have}


def meets(settings: Settings, where: Conditions) -> bool:
    """True if a sweep meets all conditions."""
    values = settings.values()
    return all(any(_is_written(values[name], text) for text in texts) for name, texts in where.items())


def check_conditions(sweeps: list[Settings], where: Conditions) -> None:
    """Raises UsageError if no sweep has a value, or none meets all conditions."""
    for name, texts in where.items():
        there = sorted({each.values()[name] for each in sweeps}, key=lambda value: (value is not None, value))
        for text in texts:
            if not any(_is_written(value, text) for value in there):
                raise UsageError(f"--where {name}={text}: no sweep has it; there are {', '.join(map(str, there)) or 'none'}")
    if not any(meets(each, where) for each in sweeps):
        together = " ".join(f"{name}={text}" for name, texts in where.items() for text in texts)
        raise UsageError(f"--where {together}: no sweep has all of these")


def _is_written(value: object, text: str) -> bool:
    """True if `text` means the value of a setting: numbers in any notation, names in any case."""
    if isinstance(value, int | float):
        try:
            return float(text) == value
        except ValueError:
            return False
    return str(value).lower() == text.lower()
