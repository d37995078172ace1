"""Halving: the hyper-parameter sets of a sweep start with few rounds of one trial, and the best go on to more.

This is synchronous successive halving (Jamieson and Talwalkar, AISTATS 2016; Li et al., JMLR 2018, algorithm 1), with trial
seeds as a further fidelity: only the last rung runs all of them. Who goes on is a function of the plan and of the validation
curves of first trials, whatever computed these and in which order. So it is not stored: what is on disk says it.

OUTPUT_DIR/<sweep>/halving.json      the plan, by the last launch with --halving
"""

import collections
import dataclasses
import json
import math
import pathlib
import typing
from collections.abc import Mapping, Sequence

from federated.files import read_regular, write_atomically
from federated.options import UsageError, integer, option
from federated.settings import HALVING, Settings
from federated.trial import RESULTS, Trial, read_hparams, rounds_done, sets_there, trial_path

_MAX_BYTES, _MAX_RESULTS_BYTES = 1 << 12, 1 << 28


@dataclasses.dataclass(frozen=True)
class Halving:
    """A plan: all sets have `min_rounds` rounds, 1 of `eta` goes on from each rung, at least `finalists` reach the last one."""

    eta: int
    min_rounds: int
    finalists: int

    def ladder(self, sets: int, rounds: int, eval_every: int) -> list["Rung"]:
        """The rungs of a sweep of `sets` sets. Their rounds are `min_rounds`, `eta` times as many, and so on; all `rounds` take
        the place of the number that is nearest to them by ratio, and of those at which none would be stopped. Trials of more
        rounds are evaluated after each of these, too."""
        ladder: list[Rung] = []
        here = math.ceil(self.min_rounds / eval_every) * eval_every
        while here**2 * self.eta < rounds**2 and sets > self.finalists:
            ladder.append(Rung(here, sets))
            here, sets = here * self.eta, max(math.ceil(sets / self.eta), self.finalists)
        return [*ladder, Rung(rounds, sets)]


class Rung(typing.NamedTuple):
    rounds: int
    sets: int  # number of sets that reach it, if none diverges


def cost(ladder: Sequence[Rung], trials: int) -> int:
    """The rounds of all rungs, with `trials` trials in the last, if no set diverges."""
    before = [0, *(rung.rounds for rung in ladder)]
    of_first = sum(rung.sets * (rung.rounds - reached) for rung, reached in zip(ladder, before))
    return of_first + ladder[-1].sets * (trials - 1) * ladder[-1].rounds


_DEFAULT_ETA, _DEFAULT_FINALISTS = 2, 2


@dataclasses.dataclass(frozen=True)
class HalvingOptions:
    """How few rounds most sets of a launch get."""

    halving: int | None = option(
        None,
        integer(2, 100_000),
        f"after each rung the best 1/ETA of the sets get ETA times the rounds; without a number: {_DEFAULT_ETA}",
        metavar="ETA",
        bare=_DEFAULT_ETA,
    )
    min_rounds: int | None = option(
        None, integer(1, 1_000_000), "rounds of the first rung; default: a twelfth of --rounds", metavar="INT"
    )
    finalists: int | None = option(
        None,
        integer(1, 100_000),
        f"least number of sets that run all rounds with all trials (default: {_DEFAULT_FINALISTS})",
        metavar="INT",
    )

    def __post_init__(self) -> None:
        """Raises UsageError if they do not go together."""
        for name in ("min_rounds", "finalists"):
            if getattr(self, name) is not None and self.halving is None:
                raise UsageError(f"--{name} applies only to --halving")

    def plan(self, rounds: int) -> Halving:
        """The plan of a sweep of so many rounds, if it is to be halved."""
        assert self.halving is not None
        return Halving(self.halving, self.min_rounds or max(1, rounds // 12), self.finalists or _DEFAULT_FINALISTS)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """What is known of a set: its number, its first trial's validation accuracy by round (NaN if not evaluated), and whether
    one of its trials diverged as it went on from there."""

    number: int
    val_acc: Sequence[float] = ()
    has_diverged: bool = False

    def best(self, rounds: int) -> float:
        """The best validation accuracy of the first `rounds` rounds."""
        return max((accuracy for accuracy in self.val_acc[:rounds] if accuracy == accuracy), default=-math.inf)


@dataclasses.dataclass(frozen=True)
class Standing:
    """The last rung that a set is in, counted from 0, and the rounds of it. Of a decided one: the set's rank there, from 1, or
    None if it diverged, among so many sets. `is_stopped`: it does not go on, while `tied_with` sets of the same accuracy do,
    because of their numbers."""

    rung: int
    rounds: int
    is_stopped: bool = False
    rank: int | None = None
    among: int | None = None
    tied_with: int = 0


def standings(ladder: Sequence[Rung], candidates: Mapping[str, Candidate]) -> dict[str, Standing]:
    """The standing of each candidate, by its name. A rung is decided once all of its sets have its rounds or diverged: the best
    go on by the best validation accuracy so far, of equal ones those with the lower number."""
    found: dict[str, Standing] = {}
    inside = sorted(candidates, key=lambda name: (candidates[name].number, name))
    for number, (rounds, _) in enumerate(ladder):
        is_last = number == len(ladder) - 1
        there = [name for name in inside if len(candidates[name].val_acc) >= rounds]
        out = [name for name in inside if candidates[name].has_diverged and (is_last or name not in there)]
        found |= dict.fromkeys(inside, Standing(number, rounds))
        found |= dict.fromkeys(out, Standing(number, rounds, True, None, len(inside)))
        if is_last or len(there) + len(out) < len(inside):
            break
        best = {name: candidates[name].best(rounds) for name in there}
        there.sort(key=lambda name: -best[name])  # stable: numbers break ties
        going_on = there[: ladder[number + 1].sets]
        going_on_with = collections.Counter(best[name] for name in going_on)
        for rank, name in enumerate(there, start=1):
            is_stopped = rank > len(going_on)
            found[name] = Standing(number, rounds, is_stopped, rank, len(inside), is_stopped * going_on_with[best[name]])
        inside = [name for name in inside if not found[name].is_stopped]
    return found


# On disk


def write_plan(sweep_dir: pathlib.Path, plan: Halving) -> None:
    write_atomically(sweep_dir / HALVING, json.dumps(dataclasses.asdict(plan)) + "\n")


def read_plan(sweep_dir: pathlib.Path) -> Halving | None:
    """The plan of the sweep in a directory; None if it has none. Raises UsageError if it cannot be read."""
    path = sweep_dir / HALVING
    try:
        known = json.loads(read_regular(path, _MAX_BYTES))
        plan = Halving(**known)
        if not all(type(value) is int for value in known.values()) or plan.eta < 2 or plan.min_rounds < 1 or plan.finalists < 1:
            raise ValueError("its numbers make no plan")
        return plan
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{str(path)!r} cannot be read as a plan of halving ({reason}): restore or remove it") from error


def candidates_there(sweep_dir: pathlib.Path, settings: Settings) -> dict[str, Candidate]:
    """The sets of a sweep's directory whose hyper-parameters are known, by their directories' names."""
    found = {}
    for name, seeds in sets_there(sweep_dir).items():
        if (known := read_hparams(sweep_dir / name)) is not None:
            trials = [Trial(settings, known[1], known[0], seed, trial_path(sweep_dir / name, seed)) for seed in sorted(seeds)]
            has_diverged = any(trial.has_failed() and not trial.is_done() for trial in trials)
            found[name] = Candidate(known[0], _validation_curve(trial_path(sweep_dir / name, 0)), has_diverged)
    return found


def _validation_curve(directory: pathlib.Path) -> list[float]:
    """The validation accuracies of a trial by round, NaN if not evaluated; empty if it has no readable results."""
    try:
        if not rounds_done(directory):
            return []
        curve = json.loads(read_regular(directory / RESULTS, _MAX_RESULTS_BYTES))["curves"]["val_acc"]
        return [math.nan if value is None else float(value) for value in curve]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return []


def standings_there(
    sweep_dir: pathlib.Path,
    settings: Settings,
    plan: Halving | None = None,
    new: Mapping[str, Candidate] | None = None,
) -> dict[str, Standing]:
    """The standing of each set in a sweep's directory, by its directory's name, and of those in `new` of which nothing is there
    yet; under the plan that the directory has, if none is given: empty if it has none."""
    plan = plan or read_plan(sweep_dir)
    if plan is None:
        return {}
    candidates = {**(new or {}), **candidates_there(sweep_dir, settings)}
    return standings(plan.ladder(len(candidates), settings.rounds, settings.eval_every), candidates)
