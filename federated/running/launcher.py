"""The base class of launchers, and helpers that they share."""

import dataclasses
import pathlib
import tempfile
import typing

from federated.options import UsageError
from federated.running.supervisor import ReportOutcome
from federated.settings import RunOptions, write_sweep_file
from federated.trial import INCOMPLETE, Trial

# A trial's process is counted as this much memory if the number of trials at once is not given
PROCESS_BYTES = 1 << 29


@dataclasses.dataclass(frozen=True)
class NoOptions:
    """The options of a launcher that has none of its own."""


@dataclasses.dataclass(frozen=True)
class QueuedTrial:
    """A trial that a queueing launcher has submitted."""

    job: str  # for the launcher's cancel()
    state: str  # QUEUED, RUNNING, or INCOMPLETE once the job has ended
    detail: str  # status prints it, such as why the trial waits or has ended; may be empty

    def is_active(self) -> bool:
        return self.state != INCOMPLETE


@dataclasses.dataclass(frozen=True)
class QueuedLaunch(QueuedTrial):
    """A launch of the next rung of halved sweeps that a queueing launcher has submitted."""

    sweeps: frozenset[str] = frozenset()  # the names of their directories
    words: tuple[str, ...] = ()  # of its command line
    begun: frozenset[tuple[pathlib.Path, int]] = frozenset()  # (directory, rounds) of trials that the launches before it began
    is_this: bool = False  # it is the one that this process runs


class Launcher:
    """A way to run trials. launch() is all that a launcher needs. One that queues trials and returns also says what became of
    them and cancels them."""

    Options: type = NoOptions  # a dataclass of the options that only this launcher has

    def __init__(self, options: typing.Any = None) -> None:
        self.options = self.Options() if options is None else options

    def launch(self, trials: list[Trial], output_dir: pathlib.Path, run: RunOptions, report: ReportOutcome) -> None:
        """Run `trials`, at least one, which lie below `output_dir`, and call report(trial, outcome) as each has ended. The
        trials that it returns may be run, too: if none of them is, launch() is called again. A launcher that queues trials may
        return before they have run. Raises UsageError before anything is made."""
        raise NotImplementedError

    def commands(self, trials: list[Trial], output_dir: pathlib.Path, run: RunOptions) -> list[str]:
        """The shell commands of launch(), for dry_run."""
        return []

    def queued(self, output_dir: pathlib.Path) -> dict[pathlib.Path, QueuedTrial]:
        """{trial's directory: what is known of it} of the trials that it submitted. Raises UsageError if that cannot be
        known now."""
        return {}

    def launch_next(self, output_dir: pathlib.Path, next_launch: QueuedLaunch) -> bool:
        """Have a launch follow once the trials of its sweeps that are queued have ended. Returns False if this launcher has no
        way to do so, and the user has to launch again."""
        return False

    def next_commands(self, output_dir: pathlib.Path, next_launch: QueuedLaunch) -> list[str]:
        """What launch_next() would have a shell do after commands()."""
        return []

    def next_launches(self, output_dir: pathlib.Path) -> list[QueuedLaunch]:
        """Those that launch_next() has submitted, the last one last. Raises UsageError if that cannot be known now."""
        return []

    def cancel(self, queued: typing.Sequence[QueuedTrial]) -> None:
        """Cancel what is active. Return once none of it is queued or running."""

    def tidy(self, output_dir: pathlib.Path) -> None:
        """Remove files of the launcher that no trial needs any more."""


def check_writable(trials: list[Trial]) -> None:
    """Write the settings and the search space of each sweep. Raises UsageError if that is impossible; no trial is started
    then."""
    for sweep_dir, trial in {trial.sweep_dir: trial for trial in trials}.items():
        try:
            write_sweep_file(sweep_dir, trial.settings, trial.space)
            with tempfile.TemporaryFile(dir=sweep_dir):
                pass
        except OSError as error:
            raise UsageError(
                f"--output_dir: {str(sweep_dir)!r} cannot be written to ({error.strerror}): name another"
            ) from error


def client_processes(trial: Trial, run: RunOptions, jobs: int, gpus: list[str], cores: int) -> int:
    """How many client processes a trial gets while `jobs` trials share the machine's `cores`: as asked for, else one on a GPU,
    else one a participant up to the trial's share of the cores."""
    settings = trial.settings
    share = 1 if gpus else max(1, cores // (jobs * settings.threads))
    return min(run.client_processes or share, settings.participants)


def gpu_environment(gpus: list[str], slot: int) -> dict[str, str]:
    """The environment that shows a trial its own GPU, if there are any. `slot` numbers the trials that run at once."""
    return {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if gpus else {}
