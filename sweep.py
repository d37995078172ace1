"""Tune a federated-learning algorithm: run seeded hyper-parameter sets, each over several trials."""

import argparse
import contextlib
import dataclasses
import itertools
import json
import pathlib
import sys
import typing

import command_launchers
from command_launchers import REGISTRY
from federated import models
from federated import trial as trial_state
from federated.data import augmentation, datasets, partition, partition_table
from federated.lock import LockedError, holder, take_over
from federated.options import (
    ALL_LOCKED,
    FAILED,
    USAGE_ERROR,
    Parser,
    UsageError,
    add_options,
    directory,
    exit_with,
    integer,
    json_object,
    names_of,
    options_from,
    output_file,
    say,
)
from federated.running.launcher import Launcher, QueuedTrial
from federated.running.processes import Interrupted, interrupt_on_signals
from federated.running.progress import Progress, follow, last_round
from federated.settings import (
    RunOptions,
    Settings,
    check_has_model,
    check_same_settings,
    check_tensorboard,
    remove_sweep_file,
    stored_settings,
)
from federated.trial import DONE, Trial, trial_path
from hparams_registry import check_hparams, default_hparams, random_hparams

MAX_TRIALS = 100_000  # of one sweep
# Options that may name several, each of which is a sweep of its own
SEVERAL = ("algorithm", "dataset")


class Job:
    """One hyper-parameter set with all its trials."""

    NOT_LAUNCHED = trial_state.NOT_LAUNCHED
    INCOMPLETE = trial_state.INCOMPLETE
    QUEUED = trial_state.QUEUED
    RUNNING = trial_state.RUNNING
    DONE = trial_state.COMPLETE

    def __init__(
        self,
        output_dir: pathlib.Path,
        settings: Settings,
        hparams: dict,
        hparams_seed: int,
        num_trials: int,
        queued: dict[pathlib.Path, QueuedTrial],
    ) -> None:
        """`queued` has the trials that launchers have submitted, by their directories."""
        self.settings, self.hparams, self.hparams_seed = settings, hparams, hparams_seed
        self.trials = [
            Trial(settings, hparams, hparams_seed, seed, trial_path(output_dir, settings, hparams, seed))
            for seed in range(num_trials)
        ]
        self.output_dir = self.trials[0].job_dir
        self.queued = {each.directory: queued[each.directory] for each in self.trials if each.directory in queued}
        self.states = [self._state_of(each) for each in self.trials]
        if self.RUNNING in self.states:
            self.state = self.RUNNING
        elif self.QUEUED in self.states:
            self.state = self.QUEUED
        elif len(set(self.states)) == 1:
            self.state = self.states[0]
        else:
            self.state = self.INCOMPLETE

    def _state_of(self, trial: Trial) -> str:
        return self.queued[trial.directory].state if self.is_queued(trial) and not trial.is_done() else trial.state()

    def is_queued(self, trial: Trial) -> bool:
        """True if a launcher has submitted `trial` and its job has not ended since."""
        return trial.directory in self.queued and self.queued[trial.directory].is_active()

    def __str__(self) -> str:
        done = f"{self.states.count(self.DONE)}/{len(self.trials)} trials done"
        return f"{self.state}: {self.output_dir} set {self.hparams_seed}, {done}, {json.dumps(self.hparams)}"

    def left(self) -> list[Trial]:
        """The trials that are neither done nor submitted."""
        return [trial for trial in self.trials if not self.is_queued(trial) and not trial.is_done()]

    @staticmethod
    def launch(jobs: "list[Job]", launcher_fn: typing.Callable[[list[Trial]], None]) -> None:
        """Have `launcher_fn` make the directories of all trials of `jobs` that are neither done nor submitted, and run them."""
        say("Launching...")
        for job in jobs:
            for trial in filter(Trial.is_done, job.trials):
                trial.forget_attempts()  # of processes that were killed before they could
        launcher_fn([trial for job in jobs for trial in job.left()])
        say(f"Launched {len(jobs)} jobs!")

    @staticmethod
    def delete(jobs: "list[Job]") -> None:
        """Delete what this sweep made of `jobs`; what runs stays."""
        say("Deleting...")
        deleted = 0
        for job in jobs:
            try:
                deleted += job._delete()
            except LockedError as error:
                say(f"Not deleted: {error}")
        say(f"Deleted {deleted} jobs!")

    def _delete(self) -> bool:
        if self.output_dir.is_symlink() or self.output_dir.parent.is_symlink():
            say(f"Not deleted, it is a link: {self.output_dir}")
            return False
        for path in self.output_dir.glob("trial_*"):
            dataclasses.replace(self.trials[0], directory=path).delete()
        with contextlib.suppress(OSError):
            self.output_dir.rmdir()
        with contextlib.suppress(OSError):
            remove_sweep_file(self.output_dir.parent)
        return True


def queued_trials(output_dir: pathlib.Path, is_status: bool) -> dict[pathlib.Path, QueuedTrial]:
    """The trials below `output_dir` that launchers have submitted, by their directories. If a launcher cannot say, only
    `status` goes without."""
    queued: dict[pathlib.Path, QueuedTrial] = {}
    for launcher in REGISTRY.values():
        try:
            queued |= launcher().queued(output_dir)
        except UsageError as error:
            if not is_status:
                raise
            say(f"Ignored: {error}")
    return queued


def make_jobs(args: argparse.Namespace, sweeps: list[Settings]) -> list[Job]:
    """The jobs of sets hparams_seed, hparams_seed + 1, … of each sweep; a set that equals an earlier one is left out."""
    if args.num_hparams * args.num_trials > MAX_TRIALS:
        raise UsageError(f"--num_hparams {args.num_hparams} x --num_trials {args.num_trials} is more than {MAX_TRIALS} trials")
    output_dir = pathlib.Path(args.output_dir)
    queued = queued_trials(output_dir, args.command == "status")
    jobs: dict[pathlib.Path, Job] = {}
    for settings, fixed in zip(sweeps, fixed_hparams(args.hparams, sweeps)):
        algorithm, dataset, optimizer = settings.hparams_key
        for seed in range(args.hparams_seed, args.hparams_seed + args.num_hparams):
            hparams = random_hparams(algorithm, dataset, seed, optimizer) if seed else default_hparams(*settings.hparams_key)
            job_dir = trial_path(output_dir, settings, hparams | fixed, 0).parent
            if job_dir not in jobs:
                jobs[job_dir] = Job(output_dir, settings, hparams | fixed, seed, args.num_trials, queued)
    return list(jobs.values())


def fixed_hparams(values: dict, sweeps: list[Settings]) -> list[dict]:
    """Those of `values` that each sweep has. Raises UsageError if one is wrong, or none of the sweeps has it."""
    known = [default_hparams(*settings.hparams_key) for settings in sweeps]
    for name in values:
        if not any(name in each for each in known):
            check_hparams({name: values[name]}, *sweeps[0].hparams_key)  # raises UsageError
    return [
        check_hparams({name: value for name, value in values.items() if name in each}, *settings.hparams_key)
        for settings, each in zip(sweeps, known)
    ]


# Commands


def launch(args: argparse.Namespace) -> int:
    """Run what is not done yet."""
    launcher, run = command_launchers.launcher_from(args), options_from(RunOptions, args)
    jobs = chosen_jobs(args)
    show(jobs)
    to_launch = [job for job in jobs if {Job.NOT_LAUNCHED, Job.INCOMPLETE} & set(job.states)]
    if not to_launch:
        if any(job.state in (Job.QUEUED, Job.RUNNING) for job in jobs):
            say("Nothing to launch! What is not done is queued or being run by another sweep.")
            return ALL_LOCKED
        say("Nothing to launch! Exiting...All jobs are done.")
        return 0
    say(f"About to launch {len(to_launch)} jobs.")
    for settings in {job.settings: None for job in to_launch}:
        check(settings, run, args.num_trials)
    if not confirmed(args):
        return 0
    output_dir = pathlib.Path(args.output_dir)
    with Progress([trial for job in to_launch for trial in job.left()]) as progress:
        Job.launch(to_launch, lambda trials: launcher.launch(trials, output_dir, run, progress.report))
    return progress.exit_code()


def status(args: argparse.Namespace) -> int:
    """Show the jobs and their states."""
    sweeps = sweeps_of(args)
    jobs = make_jobs(args, sweeps)
    if args.json:
        print(as_json(jobs))
        return 0
    show(jobs)
    if args.watch:
        follow(lambda: [each for job in make_jobs(args, sweeps) for each in zip(job.trials, job.states)])
    return 0


def delete_incomplete(args: argparse.Namespace) -> int:
    """Delete jobs that were begun and are not done."""
    jobs = chosen_jobs(args)
    show(jobs)
    delete([job for job in jobs if job.state in (Job.INCOMPLETE, Job.QUEUED, Job.RUNNING)], args)
    return 0


def delete_all(args: argparse.Namespace) -> int:
    """Delete all jobs of the sweep."""
    jobs = chosen_jobs(args)
    show(jobs)
    delete([job for job in jobs if job.state != Job.NOT_LAUNCHED], args)
    return 0


def show_partition(args: argparse.Namespace) -> int:
    """Print how many samples of each label each client has, in the trial of seed 0."""
    settings = options_from(Settings, args)
    data = datasets.load(settings.dataset, args.data_dir)
    parts = partition.split(data, settings, 0)
    if args.picture is not None:
        partition_table.save_picture(data, parts, f"{settings.dataset}, {settings.partition}", args.picture)
    print(partition_table.table(data, parts))
    return 0


def chosen_jobs(args: argparse.Namespace) -> list[Job]:
    """The jobs that the options choose, after taking over their locks if the user said so."""
    sweeps = sweeps_of(args)
    jobs = make_jobs(args, sweeps)
    if not args.take_over:
        return jobs
    for job in jobs:
        for trial in job.trials:
            take_over(trial.directory)
    return make_jobs(args, sweeps)


# command: (function, an example of its options)
COMMANDS = {
    "launch": (launch, "--algorithm Fedavg Fedprox --dataset mnist --num_hparams 20"),
    "status": (status, "--algorithm Fedavg Fedprox --dataset mnist --watch"),
    "delete_incomplete": (delete_incomplete, "--dataset mnist"),
    "delete_all": (delete_all, "--dataset mnist"),
    "show_partition": (show_partition, "--dataset mnist --partition dirichlet --picture labels.png"),
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="sweep.py", description=__doc__, formatter_class=argparse.HelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (function, example) in COMMANDS.items():
        help = function.__doc__
        sub = commands.add_parser(
            name,
            help=help,
            description=help,
            epilog=f"example: python sweep.py {name} {example}",
            formatter_class=argparse.HelpFormatter,
        )
        if name == "show_partition":
            _add_picture(sub)
        else:
            _add_sweep(sub, name)
        if name == "launch":
            command_launchers.add_arguments(sub.add_argument_group("how it is run", "None of these changes a result."))
        settings = sub.add_argument_group("what a trial trains", "Fixed once for a sweep and kept in its sweep.json.")
        add_options(settings, Settings, given_only=True, several=() if name == "show_partition" else SEVERAL)
    return parser.parse_args(argv)


def _add_sweep(parser: Parser, command: str) -> None:
    """Add the options that choose jobs."""
    group = parser.add_argument_group("the sweep")
    group.add_argument("--output_dir", type=directory, default="sweep_logs", metavar="DIR", help="(default: sweep_logs)")
    group.add_argument(
        "--num_hparams", type=integer(1, MAX_TRIALS), default=5, metavar="INT", help="hyper-parameter sets (default: 5)"
    )
    group.add_argument(
        "--num_trials", type=integer(1, MAX_TRIALS), default=3, metavar="INT", help="seeds for each set (default: 3)"
    )
    group.add_argument(
        "--hparams_seed",
        type=integer(0),
        default=0,
        metavar="INT",
        help="seed of the first set; 0 is the defaults (default: 0)",
    )
    group.add_argument(
        "--hparams",
        type=json_object,
        default={},
        metavar="JSON",
        help="""values fixed in every set, e.g. '{"batch_size": 32}'""",
    )
    if command == "status":
        view = parser.add_argument_group("how it is shown").add_mutually_exclusive_group()
        view.add_argument("--watch", action="store_true", help="keep reporting progress until the sweep ends")
        view.add_argument("--json", action="store_true", help="for programs: a list of jobs with their trials")
    else:
        group.add_argument("--skip_confirmation", action="store_true", help="do not ask")
        group.add_argument(
            "--take_over",
            action="store_true",
            help="take over the trials of processes that cannot be seen from here; only you can know that those are dead",
        )


def _add_picture(parser: Parser) -> None:
    parser.add_argument("--data_dir", type=directory, default="data", metavar="DIR", help="where data sets lie (default: data)")
    parser.add_argument(
        "--picture",
        type=output_file(partition_table.PICTURES),
        metavar="FILE",
        help=f"draw it too, into FILE, which ends in {', '.join(partition_table.PICTURES)}; default: no picture",
    )


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    interrupt_on_signals("ending; what is done and the checkpoints stay, and the same command resumes from here.")
    try:
        return COMMANDS[args.command][0](args)
    except UsageError as error:
        say(f"sweep.py {args.command}: error: {error}")
        return USAGE_ERROR
    except BrokenPipeError:
        raise  # see exit_with
    except OSError as error:
        say(f"sweep.py {args.command}: error: {error}")
        return FAILED
    except Interrupted as interrupted:
        return 128 + interrupted.signum


# Helpers of the commands


def sweeps_of(args: argparse.Namespace) -> list[Settings]:
    """The settings of the sweep of each algorithm on each data set."""
    named = [getattr(args, name, [Settings.__dataclass_fields__[name].default]) for name in SEVERAL]
    sweeps: dict[str, Settings] = {}
    for values in itertools.product(*named):
        settings = settings_of(args, argparse.Namespace(**(vars(args) | dict(zip(SEVERAL, values)))))
        sweeps.setdefault(settings.name, settings)
    return list(sweeps.values())


def settings_of(args: argparse.Namespace, one: argparse.Namespace) -> Settings:
    """Settings of one sweep. `launch` takes the options as given; other commands complete them from sweep.json."""
    given = options_from(Settings, one)
    sweep_dir = pathlib.Path(args.output_dir) / given.name
    try:
        stored = stored_settings(sweep_dir)
    except UsageError as error:
        if args.command != "status":
            raise
        say(f"Ignored: {error}")
        stored = None
    if args.command != "launch" and stored is not None:
        named = {name: getattr(one, name) for name in names_of(Settings) if hasattr(args, name)}
        given = dataclasses.replace(stored, **named)
    check_same_settings(sweep_dir, given, stored)
    return given


def show(jobs: list[Job]) -> None:
    """Print every job, the last failure of each of its trials that is not done, who runs one, what is broken of one that is
    done, and how many jobs there are of each state."""
    for job in jobs:
        print(job)
        for trial, state in zip(job.trials, job.states):
            if state == Job.INCOMPLETE and (failures := trial.failures()):
                print(f"  {trial.directory.name} failed: {failures[-1]['role']} {failures[-1]['reason']}")
            for path in trial.broken_results() if state == Job.DONE else ():
                print(f"  {trial.directory.name}: {path} is missing or cut; delete {DONE} beside it to have it computed again")
            if state == Job.RUNNING and not job.is_queued(trial) and (found := holder(trial.directory)) is not None:
                print(f"  {trial.directory.name} is run by {found}")
            if state != Job.DONE and trial.directory in job.queued and (detail := job.queued[trial.directory].detail):
                print(f"  {trial.directory.name}: {detail}")
    states = [job.state for job in jobs]
    counts = f"{len(jobs)} jobs: {states.count(Job.DONE)} done, {states.count(Job.INCOMPLETE)} incomplete, "
    counts += f"{states.count(Job.NOT_LAUNCHED)} not launched"
    for state in (Job.QUEUED, Job.RUNNING):
        if state in states:
            counts += f", {states.count(state)} {state.lower()}"
    print(f"\n{counts}.\n", flush=True)


def check(settings: Settings, run: RunOptions, num_trials: int) -> None:
    """Raises UsageError if trials with `settings` could not be run."""
    spec = datasets.REGISTRY[settings.dataset]
    models.check(settings.model_arch, spec)
    augmentation.check(settings.augmentation, spec)
    if run.save_model:
        check_has_model(settings)
    if run.tensorboard:
        check_tensorboard()
    data = datasets.load(settings.dataset, run.data_dir)
    for seed in range(num_trials):
        partition.split(data, settings, seed)


def delete(jobs: list[Job], args: argparse.Namespace) -> None:
    """Cancel what is queued of `jobs` and delete them, but for those that run."""
    for job in [job for job in jobs if any(each.state() == Job.RUNNING for each in job.trials if not job.is_queued(each))]:
        say(f"Not deleted, it is running: {job.output_dir}")
        jobs.remove(job)
    active = sum(each.is_active() for job in jobs for each in job.queued.values())
    say(f"About to {f'cancel {active} trials that are queued or running, and ' if active else ''}delete {len(jobs)} jobs.")
    if jobs and confirmed(args):
        output_dir, directories = pathlib.Path(args.output_dir), {job.output_dir for job in jobs}
        launchers: list[Launcher] = [launcher() for launcher in REGISTRY.values()]
        for launcher in launchers:
            queued = launcher.queued(output_dir).items()
            if to_cancel := [each for path, each in queued if path.parent in directories and each.is_active()]:
                launcher.cancel(to_cancel)
        Job.delete(jobs)
        for launcher in launchers:
            launcher.tidy(output_dir)


def confirmed(args: argparse.Namespace) -> bool:
    """Ask, unless told not to. Raises UsageError if nobody is there to answer."""
    if args.skip_confirmation:
        return True
    if not sys.stdin.isatty():
        raise UsageError("there is no terminal to ask for confirmation: give --skip_confirmation")
    sys.stderr.write("Are you sure? (y/n) ")
    sys.stderr.flush()
    if input().lower().strip()[:1] == "y":
        return True
    say("Nevermind!")
    return False


def as_json(jobs: list[Job]) -> str:
    """What status shows, for programs."""

    queued = {directory: each for job in jobs for directory, each in job.queued.items()}

    def of_trial(trial: Trial, state: str) -> dict:
        last, failures = last_round(trial), trial.failures() if state == Job.INCOMPLETE else []
        return {
            "trial_seed": trial.trial_seed,
            "state": state,
            "directory": str(trial.directory),
            **(dataclasses.asdict(last) if last is not None else {}),
            "failures": [{"role": failure["role"], "reason": failure["reason"]} for failure in failures],
            "queue": queued[trial.directory].detail if trial.directory in queued else None,
        }

    return json.dumps(
        [
            {
                "state": job.state,
                "directory": str(job.output_dir),
                "algorithm": job.settings.algorithm,
                "dataset": job.settings.dataset,
                "model_arch": job.settings.model_arch,
                "hparams_seed": job.hparams_seed,
                "hparams": job.hparams,
                "trials": list(map(of_trial, job.trials, job.states)),
            }
            for job in jobs
        ],
        indent=1,
    )


if __name__ == "__main__":
    exit_with(main)
