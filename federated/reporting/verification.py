"""Compares trials with the same trials computed again: all bits have to be the same."""

import math
import pathlib

import numpy as np

from federated.reporting.collect import BrokenError, codes_of, environment_of, numbers_of, places_of, read_trial
from federated.seeds import seed_hash
from federated.settings import Settings
from federated.trial import Trial, failure_line, rounds_done, sets_there, trial_path
from federated.version import code


def done_trials(sweeps: list[Settings], output_dir: pathlib.Path) -> list[tuple[pathlib.Path, Settings]]:
    """(directory, settings) of each trial of `sweeps` that has results; the settings have the results' number of rounds."""
    found = []
    for settings in sweeps:
        for name, seeds in sorted(sets_there(output_dir / settings.name).items()):
            for directory in (trial_path(output_dir / settings.name / name, seed) for seed in sorted(seeds)):
                if rounds := rounds_done(directory):
                    there = settings.rounds if rounds == math.inf else int(rounds)
                    found.append((directory, settings.with_rounds(there)))
    return found


def share_of(trials: list[tuple[pathlib.Path, Settings]], fraction: float) -> list[tuple[pathlib.Path, Settings]]:
    """A random share of `trials`, at least one, in their order. It depends on nothing but the trials, and a larger share of
    them includes it."""
    drawn = sorted(trials, key=lambda each: seed_hash(*each[0].parts[-3:], "verify", modulus=2**63))
    chosen = {directory for directory, _ in drawn[: max(1, round(fraction * len(trials)))]}
    return [each for each in trials if each[0] in chosen]


class TrialResults:
    """The results of a done trial."""

    def __init__(self, directory: pathlib.Path, settings: Settings) -> None:
        """Raises BrokenError or OSError if they cannot be read."""
        self.directory, self.settings = directory, settings
        self.results, self.clients = read_trial(directory, settings)

    def again(self, output_dir: pathlib.Path) -> Trial:
        """The same trial in another output directory."""
        hparams, number, seed = (self.results[name] for name in ("hparams", "hparams_seed", "trial_seed"))
        directory = trial_path(output_dir / self.settings.name / self.directory.parent.name, seed)
        return Trial(self.settings, hparams, number, seed, directory)

    def is_of_other_code(self) -> bool:
        return bool(codes_of(self.results) - {code()})

    def origin(self) -> str:
        """Which code, packages, processors and devices computed the trial, if its results say so."""
        return ", ".join([environment_of(self.results), *places_of(self.results)])


def read(trials: list[tuple[pathlib.Path, Settings]]) -> tuple[list[TrialResults], dict[pathlib.Path, list[str]]]:
    """The results of `trials`, and {directory: a line that says why} for those that cannot be read."""
    found, unreadable = [], {}
    for directory, settings in trials:
        try:
            found.append(TrialResults(directory, settings))
        except (BrokenError, OSError) as error:
            unreadable[directory] = [f"cannot be read: {error}"]
    return found, unreadable


def compare(original: TrialResults, trial: Trial) -> list[str]:
    """How `trial`, which has computed `original` again, differs: a line for each curve and each array of clients with other
    values, then the origins of both. Empty if nothing differs."""
    if not trial.is_done():
        return [": ".join(["could not be computed again", *map(failure_line, trial.failures()[-1:])])]
    again = TrialResults(trial.directory, trial.settings)
    then, now = (numbers_of(each.results, each.clients) for each in (original, again))
    differing = [name for name in then if not np.array_equal(then[name], now[name], equal_nan=True)]
    lines = [f"{name}: {_difference(then[name], now[name])}" for name in differing]
    return lines and [*lines, f"then: {original.origin()}", f"now: {again.origin()}"]


def _difference(first: np.ndarray, second: np.ndarray) -> str:
    """The first round in which two arrays of the same shape [..., rounds] differ, and the largest difference, as a text."""
    only_one = np.isnan(first) != np.isnan(second)
    apart = np.where(np.isnan(first) | np.isnan(second), 0, np.abs(first - second))
    rounds = np.flatnonzero((only_one | (apart > 0)).reshape(-1, first.shape[-1]).any(axis=0))
    missing = f"; {only_one.sum()} values are missing in one of them" if only_one.any() else ""
    return f"since round {rounds[0]}, by at most {apart.max():.3g}{missing}"
