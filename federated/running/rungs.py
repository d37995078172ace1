"""Run sweeps under halving: the trials of a rung follow once the rung before is decided."""

import collections
import contextlib
import dataclasses
import pathlib
import typing

from federated.halving import Candidate, Halving, HalvingOptions, Rung, Standing, cost, standings_there, write_plan
from federated.options import UsageError, say
from federated.running import checkpoint, resources
from federated.running.launcher import check_writable
from federated.running.progress import Progress
from federated.running.supervisor import Outcome, ReportOutcome
from federated.settings import Settings, remove_sweep_file
from federated.trial import KEPT, Trial, remove_job_dir, sets_there


@dataclasses.dataclass(frozen=True)
class HalvedSweep:
    """A sweep with its plan. `sets` has the trials of each hyper-parameter set, by the name of its directory."""

    directory: pathlib.Path
    settings: Settings
    plan: Halving
    sets: dict[str, list[Trial]]

    @property
    def ladder(self) -> list[Rung]:
        return self.plan.ladder(len(self.sets), self.settings.rounds, self.settings.eval_every)

    def standings(self) -> dict[str, Standing]:
        """The standing of each set, also of those of which nothing is on disk yet."""
        found = self._standings_of_all()
        return {name: found[name] for name in found if name in self.sets}

    def _standings_of_all(self) -> dict[str, Standing]:
        """Also of the sets that are on disk alone."""
        new = {name: Candidate(trials[0].hparams_seed) for name, trials in self.sets.items()}
        return standings_there(self.directory, self.settings, self.plan, new)

    def wanted(self, standings: dict[str, Standing]) -> list[Trial]:
        """The trials that a rung which is not decided, or the last one, still needs."""
        wanted: list[Trial] = []
        for name, standing in standings.items():
            if not standing.is_stopped:
                first, *others = self.sets[name]
                is_last = standing.rounds == self.settings.rounds
                wanted += [first, *others] if is_last else [_of_rounds(first, standing.rounds)]
        return [trial for trial in wanted if not trial.is_done()]

    def drop_checkpoints(self, standings: dict[str, Standing]) -> None:
        """Remove the checkpoints of stopped sets."""
        for name, standing in standings.items():
            first = self.sets[name][0]
            if standing.is_stopped and first.rounds_done() == standing.rounds:
                (first.directory / KEPT).unlink(missing_ok=True)

    def ties(self) -> list[str]:
        """A line on each rung that could not tell most of the sets that went on from one that it stopped."""
        lines, stopped = [], [each for each in self._standings_of_all().values() if each.is_stopped and each.rank is not None]
        for rounds in sorted({each.rounds for each in stopped}):
            here = [each for each in stopped if each.rounds == rounds]
            went_on, tied = min(each.rank or 0 for each in here) - 1, max(each.tied_with for each in here)
            if 2 * tied > went_on:
                lines.append(
                    f"{self.directory.name}: {tied} of the {went_on} sets that went on after {rounds} rounds had the "
                    "validation accuracy of one that was stopped, so the rung could not tell them apart: raise --min_rounds."
                )
        return lines

    def prepare(self) -> None:
        """Note on disk what decisions depend on: the settings, the sets, and at last the plan. Raises UsageError."""
        firsts = [first for first, *_ in self.sets.values()]
        check_writable(firsts)
        for first in firsts:
            first.note_hparams()
        write_plan(self.directory, self.plan)

    def forget(self) -> None:
        """Undo prepare() for sets of which no trial was run."""
        for name, seeds in sets_there(self.directory).items():
            if not seeds:
                remove_job_dir(self.directory / name)
        with contextlib.suppress(OSError):
            remove_sweep_file(self.directory)

    def cost(self) -> tuple[int, int]:
        """The rounds of the plan, and those of all trials of all sets."""
        trials = max(map(len, self.sets.values()))
        return cost(self.ladder, trials), len(self.sets) * trials * self.settings.rounds

    def __str__(self) -> str:
        """A text on how many sets run how many rounds."""
        steps = ", ".join(f"{sets} sets x {rounds} rounds" for rounds, sets in self.ladder)
        return f"{self.directory.name}: {steps} x {max(map(len, self.sets.values()))} trials, {_share(*self.cost())}"


def halved_sweeps(sets: typing.Iterable[list[Trial]], options: HalvingOptions) -> list[HalvedSweep]:
    """The sweeps of hyper-parameter sets, of which each has its trials, with the plans that are asked for. Raises UsageError if
    one has a single rung."""
    by_sweep: dict[Settings, dict[str, list[Trial]]] = {}
    for trials in sets:
        by_sweep.setdefault(trials[0].settings, {})[trials[0].job_dir.name] = trials
    sweeps = []
    for settings, of_sweep in by_sweep.items():
        directory, plan = next(iter(of_sweep.values()))[0].sweep_dir, options.plan(settings.rounds)
        sweeps.append(HalvedSweep(directory, settings, plan, of_sweep))
        if len(sweeps[-1].ladder) == 1:
            raise UsageError(
                f"--halving {plan.eta}: {len(of_sweep)} sets of {settings.rounds} rounds from {plan.min_rounds} with "
                f"{plan.finalists} finalists leave no rung to stop at"
            )
    return sweeps


def _of_rounds(trial: Trial, rounds: int) -> Trial:
    """A trial with fewer rounds, from which it may go on. One that was begun with more and has not ended runs these."""
    begun = min(checkpoint.rounds_asked(trial.directory), trial.settings.rounds)
    return dataclasses.replace(trial, settings=trial.settings.with_rounds(max(rounds, begun)), may_get_more_rounds=True)


def _share(rounds: int, of: int) -> str:
    return f"{rounds} of {of} rounds ({rounds / of:.1%})"


def say_plans(sweeps: list[HalvedSweep]) -> None:
    """Print what share of the rounds halving will run, of each sweep and of all."""
    for sweep in sweeps:
        say(f"Halving {sweep}.")
    if len(sweeps) > 1:
        costs = [sweep.cost() for sweep in sweeps]
        say(f"Halving all sweeps: {_share(sum(rounds for rounds, _ in costs), sum(of for _, of in costs))}.")


class Rungs:
    """Runs what sweeps want, rung by rung. A launcher that takes further trials as some end is kept busy by all sweeps."""

    def __init__(
        self,
        sweeps: list[HalvedSweep],
        keep: bool,
        busy: typing.Collection[pathlib.Path],
        begun: typing.Collection[tuple[pathlib.Path, int]] = (),
    ) -> None:
        """With `keep` stopped sets keep their checkpoints. `busy` are the directories of trials that are queued already,
        `begun` is as in QueuedLaunch, if this continues other launches."""
        self._sweeps, self._keep, self._busy = {each.directory: each for each in sweeps}, keep, busy
        self.begun = set(begun)
        self._in_flight: collections.Counter[pathlib.Path] = collections.Counter()
        self._offered: dict[pathlib.Path, Trial] = {}  # to the launcher, by report()
        self._takes_more = False

    def first(self) -> list[Trial]:
        """The trials that are run first."""
        wanted = [trial for sweep in self._sweeps.values() for trial in sweep.wanted(sweep.standings())]
        return [trial for trial in wanted if self._is_new(trial)]

    def _is_new(self, trial: Trial) -> bool:
        return trial.directory not in self._busy and (trial.directory, trial.settings.rounds) not in self.begun

    def run(
        self, launch: typing.Callable[[list[Trial], ReportOutcome], None], progress: Progress, is_dry: bool = False
    ) -> None:
        """Call launch(trials, report) until nothing more can be run now. If `is_dry`, nothing is noted on disk. Raises
        UsageError if launch() does, or nothing can be noted."""
        self._progress, noted = progress, [] if is_dry else list(self._sweeps.values())
        try:
            for sweep in noted:
                sweep.prepare()
            trials = self._next(self._sweeps)
            while trials:
                self._takes_more = len(trials) >= resources.cores()  # else a launcher may have slots for these alone
                launch(trials, self._ended)
                trials, self._offered = list(self._offered.values()) or self._next(self._sweeps), {}
        except UsageError:
            for sweep in noted:
                sweep.forget()
            raise

    def _ended(self, trial: Trial, outcome: Outcome) -> list[Trial]:
        """Report a trial's outcome. Returns the trials that follow once its rung is decided."""
        self._progress.report(trial, outcome)
        self._offered.pop(trial.directory, None)
        self._in_flight[trial.sweep_dir] -= 1
        more = self._next([trial.sweep_dir]) if self._takes_more else []
        self._offered |= {each.directory: each for each in more}
        return more

    def _next(self, directories: typing.Iterable[pathlib.Path]) -> list[Trial]:
        """The trials that sweeps want of which none is in flight, but for those that were begun already."""
        found = []
        for sweep in (self._sweeps[each] for each in directories if not self._in_flight[each]):
            standings = sweep.standings()
            if not self._keep:
                sweep.drop_checkpoints(standings)
            for trial in filter(self._is_new, sweep.wanted(standings)):
                self.begun.add((trial.directory, trial.settings.rounds))
                self._in_flight[trial.sweep_dir] += 1
                found.append(trial)
        self._progress.add(found)
        return found

    def is_in_flight(self) -> bool:
        """True if a launcher has returned before its trials ended: they are queued."""
        return self._in_flight.total() > 0

    def ties(self) -> list[str]:
        """See HalvedSweep.ties, for all sweeps."""
        return [line for sweep in self._sweeps.values() for line in sweep.ties()]

    def waiting(self) -> list[str]:
        """A line on each sweep that does not go on by itself, as trials of a rung failed, are run by other processes or are
        broken."""
        lines = []
        for sweep in (each for each in self._sweeps.values() if not self._in_flight[each.directory]):
            standings = sweep.standings()
            wanted = [trial.directory for trial in sweep.wanted(standings)]
            for rounds in {each.rounds for each in standings.values() if not each.is_stopped}:
                if (wanted or rounds < sweep.settings.rounds) and not set(wanted) & set(self._busy):
                    names = ", ".join(map(str, wanted)) or "results that cannot be read"
                    lines.append(f"{sweep.directory.name} waits at {rounds} rounds for {names}: launch again.")
        return lines
