"""The ways to run trials."""

import argparse
import dataclasses
import pathlib
import shlex
import typing

from federated.extension import Registry
from federated.options import UsageError, add_options, names_of, one_of, option, options_from, say
from federated.running import resources
from federated.running.launcher import PROCESS_BYTES, Launcher, QueuedLaunch, check_writable, client_processes, gpu_environment
from federated.running.listener import key_from_environment, unix_address
from federated.running.processes import (
    ForkedProcess,
    SpawnedProcess,
    check_open_files,
    files_needed,
    max_open_files,
    preload,
    trial_commands,
)
from federated.running.slurm_launcher import Slurm
from federated.running.supervisor import ReportOutcome, RunningTrial, run_trials
from federated.settings import RunOptions, Settings
from federated.trial import Trial

REGISTRY: Registry[type[Launcher]] = Registry("launcher")
AnyLauncher = typing.TypeVar("AnyLauncher", bound=type[Launcher])


def register(name: str) -> typing.Callable[[AnyLauncher], AnyLauncher]:
    """A decorator that lets options name a launcher, a class that derives from Launcher and has its launch(). Raises UsageError
    if the class lacks what is needed, or the name exists."""

    def decorate(launcher: AnyLauncher) -> AnyLauncher:
        is_one = isinstance(launcher, type) and issubclass(launcher, Launcher) and launcher.launch is not Launcher.launch
        REGISTRY.require(is_one, name, "a class that derives from Launcher and has a launch()")
        REGISTRY.add(name, launcher)
        return launcher

    return decorate


@register("local_sequential")
class LocalSequential(Launcher):
    """One trial after another on this machine, each process started as a user would start it."""

    start: type[SpawnedProcess] | type[ForkedProcess] = SpawnedProcess

    def launch(self, trials: list[Trial], output_dir: pathlib.Path, run: RunOptions, report: ReportOutcome) -> None:
        check_device(trials[0].settings)  # all have the same device, precision and threads
        if run.host:
            key_from_environment()  # raises UsageError before anything is made
        gpus, jobs = self._slots(trials, run)
        if trials[0].settings.device != "cpu" and (line := resources.gpu_disagreement()):
            say(line)
        self._prepare(trials, run, gpus, jobs)
        check_writable(trials)
        cores = resources.cores()

        def begin(trial: Trial, slot: int) -> RunningTrial:
            processes = client_processes(trial, run, jobs, gpus, cores)
            return RunningTrial(trial, self.start, gpu_environment(gpus, slot), processes, run)

        run_trials(trials, begin, jobs, run.retries, report, len(gpus))

    def commands(self, trials: list[Trial], output_dir: pathlib.Path, run: RunOptions) -> list[str]:
        gpus, jobs = self._slots(trials, run)
        cores = resources.cores()
        commands = []
        for number, trial in enumerate(trials):
            roles = trial_commands(trial, run.host or unix_address(), client_processes(trial, run, jobs, gpus, cores), run)
            gpu = [f"{name}={value}" for name, value in gpu_environment(gpus, number % jobs).items()]
            commands.append(" &\n".join(" ".join([*gpu, shlex.join(command)]) for command in roles.values()))
        return commands

    def _prepare(self, trials: list[Trial], run: RunOptions, gpus: list[str], jobs: int) -> None:
        """Raises UsageError if no trial could be started."""

    def _max_jobs(self, trials: list[Trial], run: RunOptions) -> int:
        return 1

    def _slots(self, trials: list[Trial], run: RunOptions) -> tuple[list[str], int]:
        """The GPUs, and how many trials run at once."""
        settings = trials[0].settings
        gpus = [] if settings.device == "cpu" else resources.gpus()
        if run.jobs:
            jobs = run.jobs
        elif gpus:
            jobs = len(gpus) * run.trials_per_device
        else:
            jobs = min(resources.cores() // settings.threads, resources.memory() // (2 * PROCESS_BYTES))
        return gpus, max(1, min(jobs, self._max_jobs(trials, run)))


@register("local_parallel")
class LocalParallel(LocalSequential):
    """As many trials at once as this machine holds, forked from a process that has imported what they need."""

    start = ForkedProcess

    def _prepare(self, trials: list[Trial], run: RunOptions, gpus: list[str], jobs: int) -> None:
        check_open_files(jobs, self._processes(trials, run, jobs, gpus))
        preload(trials, ["federated.learning.tensorboard_events"] if run.tensorboard else [], run.extension)

    def _max_jobs(self, trials: list[Trial], run: RunOptions) -> int:
        return 1 if run.host else len(trials)

    def _slots(self, trials: list[Trial], run: RunOptions) -> tuple[list[str], int]:
        """As in LocalSequential; if the user gives no number, at most as many as the limit of open files allows."""
        gpus, jobs = super()._slots(trials, run)
        while not run.jobs and jobs > 1 and files_needed(jobs, self._processes(trials, run, jobs, gpus)) > max_open_files():
            jobs -= 1
        return gpus, jobs

    @staticmethod
    def _processes(trials: list[Trial], run: RunOptions, jobs: int, gpus: list[str]) -> int:
        """The client processes of the trial that has most."""
        one_of_each = {trial.settings: trial for trial in trials}.values()
        cores = resources.cores()
        return max(client_processes(trial, run, jobs, gpus, cores) for trial in one_of_each)


register("slurm")(Slurm)
DRY_RUN, DEFAULT = "dry_run", "local_parallel"


def printable() -> list[str]:
    """The launchers whose commands dry_run can print."""
    return [name for name in REGISTRY if name != DRY_RUN]


@dataclasses.dataclass(frozen=True)
class DryRunOptions:
    dry_run_of: str = option(
        DEFAULT,
        lambda text: one_of(printable())(text),
        lambda: f"the launcher whose commands dry_run prints: {', '.join(printable())}",
        "NAME",
    )


@register(DRY_RUN)
class DryRun(Launcher):
    """Print the commands of another launcher, run nothing."""

    Options = DryRunOptions

    def __init__(self, options: DryRunOptions | None = None, other: Launcher | None = None) -> None:
        super().__init__(options)
        self._other = other or REGISTRY[self.options.dry_run_of]()

    def launch(self, trials: list[Trial], output_dir: pathlib.Path, run: RunOptions, report: ReportOutcome) -> None:
        for command in self._other.commands(trials, output_dir, run):
            print(command)

    def launch_next(self, output_dir: pathlib.Path, next_launch: QueuedLaunch) -> bool:
        for command in (commands := self._other.next_commands(output_dir, next_launch)):
            print(command)
        return bool(commands)


def add_arguments(parser: argparse._ActionsContainer, without: typing.Collection[str] = ()) -> None:
    """Add the options that choose a launcher, those of how trials are run, and those that single launchers have, but for those
    in `without`."""
    parser.add_argument(
        "--command_launcher",
        type=one_of(REGISTRY),
        default=DEFAULT,
        metavar="NAME",
        help=f"how trials are run: {', '.join(REGISTRY)} (default: {DEFAULT})",
    )
    add_options(parser, RunOptions, without=without)
    for launcher in REGISTRY.values():
        add_options(parser, launcher.Options, without=without)


def launcher_from(args: argparse.Namespace) -> Launcher:
    """The launcher that the user chose, with its options. Raises UsageError if an option belongs to a launcher that is not
    the selected one, where it would silently do nothing."""
    name = args.command_launcher
    selected = [name, args.dry_run_of] if name == DRY_RUN else [name]
    for other, launcher in REGISTRY.items():
        default = launcher.Options()
        for each in names_of(launcher.Options):
            if other not in selected and getattr(args, each, getattr(default, each)) != getattr(default, each):
                raise UsageError(f"--{each} applies only to --command_launcher {other}, and this is {name}")
    made = [REGISTRY[each](options_from(REGISTRY[each].Options, args)) for each in selected]
    return made[0] if len(made) == 1 else DryRun(made[0].options, made[1])


def check_device(settings: Settings) -> None:
    """Raises UsageError if this machine lacks the device or the arithmetic that `settings` ask for."""
    if settings.device == "cuda" or settings.precision != "fp32":  # else no need to wait for torch's import
        from federated.learning.device import resolve_device

        resolve_device(settings)
