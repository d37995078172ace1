"""Tune a federated-learning algorithm: run seeded hyper-parameter sets, each over several trials."""

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import shutil
import sys
import tempfile
import typing

import command_launchers
from command_launchers import REGISTRY
from federated import extension, halving, models, study
from federated import trial as trial_state
from federated.data import augmentation, datasets, partition, partition_table
from federated.lock import LockedError, holder, take_over
from federated.options import (
    ALL_LOCKED,
    FAILED,
    USAGE_ERROR,
    ExtensionOptions,
    Parser,
    UsageError,
    add_options,
    command_words,
    directory,
    exit_with,
    integer,
    json_object_or_file,
    names_of,
    number,
    one_of,
    options_from,
    output_file,
    python_file,
    say,
)
from federated.running import check as checks
from federated.running.launcher import Launcher, QueuedLaunch, QueuedTrial
from federated.running.processes import Interrupted, interrupted_by_signals
from federated.running.progress import Progress, follow, last_round
from federated.running.rungs import HalvedSweep, Rungs, halved_sweeps, say_plans
from federated.running.slurm_launcher import RECORDS
from federated.search import GRID, KINDS, RANDOM, Space
from federated.settings import ForeignSettings, RunOptions, Settings, check_has_model, check_tensorboard, remove_sweep_file
from federated.trial import (
    DONE,
    Trial,
    hparams_hash,
    read_hparams,
    remove_job_dir,
    sets_there,
    trial_path,
    trial_seed_of,
)
from federated.version import code
from hparams_registry import default_hparams, hparams_of, space_of

MAX_TRIALS = 100_000  # of one command
SETS = ("hparams_seed", "num_hparams", "hparams")  # options that choose hyper-parameter sets
OUTPUT_DIR, NUM_HPARAMS, NUM_TRIALS = "sweep_logs", 5, 3  # the defaults
DELETE = ("delete_incomplete", "delete_all")
NOT_OF_VERIFY = ("keep_checkpoints", "save_model", "tensorboard", "dry_run_of", "wait")  # it waits, and leaves nothing


class Job:
    """One hyper-parameter set with all its trials."""

    NOT_LAUNCHED = trial_state.NOT_LAUNCHED
    INCOMPLETE = trial_state.INCOMPLETE
    QUEUED = trial_state.QUEUED
    RUNNING = trial_state.RUNNING
    FAILED = trial_state.FAILED_FOR_GOOD
    DONE = trial_state.COMPLETE
    STOPPED = "Stopped"  # by halving; its trials alone do not say so

    def __init__(
        self,
        output_dir: pathlib.Path,
        settings: Settings,
        space: Space | None,
        known: tuple[int, dict] | None,
        trial_seeds: typing.Iterable[int],
        there: typing.Collection[int],
        queued: dict[pathlib.Path, QueuedTrial],
        standing: halving.Standing | None,
        next_launch: QueuedLaunch | None,
    ) -> None:
        """The job in the directory `output_dir`. `known` is the number of its set and the hyper-parameters, None if nothing
        says them; a launch draws them from `space`. `there` has the seeds of the trials on disk, `queued` the trials that
        launchers have submitted, by their directories, `standing` how far the set has come in a sweep that is halved,
        `next_launch` the last one that was to follow for it."""
        self.output_dir, self.settings = output_dir, settings
        seed, self.hparams = known if known is not None else (None, {})
        self.hparams_seed: int | None = seed
        self.trials = [
            Trial(settings, self.hparams, self.hparams_seed or 0, seed, trial_path(output_dir, seed), space)
            for seed in trial_seeds
        ]
        directories = [each.directory for each in self.trials] if queued else []  # looking up 100,000 paths takes a second
        self.queued = {each: queued[each] for each in directories if each in queued}
        self.states = [
            self._state_of(each) if each.trial_seed in there or self.queued else self.NOT_LAUNCHED for each in self.trials
        ]
        self.standing, self.next_launch = standing, next_launch
        self.state = self._joint_state()

    def _joint_state(self) -> str:
        states = set(self.states)
        for state in (self.RUNNING, self.QUEUED):
            if state in states:
                return state
        if self.standing is not None and self.standing.is_stopped and states != {self.DONE}:
            return self.STOPPED if self.standing.rank is not None else self.FAILED
        if len(states) == 1:
            return self.states[0]
        return self.FAILED if states == {self.FAILED, self.DONE} else self.INCOMPLETE

    def is_out(self) -> bool:
        """True if halving has stopped it."""
        return self.standing is not None and self.standing.is_stopped and self.state != self.DONE

    def _state_of(self, trial: Trial) -> str:
        return self.queued[trial.directory].state if self.is_queued(trial) and not trial.is_done() else trial.state()

    def is_queued(self, trial: Trial) -> bool:
        """True if a launcher has submitted `trial` and its job has not ended since."""
        return trial.directory in self.queued and self.queued[trial.directory].is_active()

    def __str__(self) -> str:
        done = f"{self.states.count(self.DONE)}/{len(self.trials)} trials done"
        if self.state == self.STOPPED and (at := self.standing) is not None:
            done += f", stopped after {at.rounds} of {self.settings.rounds} rounds, rank {at.rank} of {at.among}"
        elif shorter := self.shorter():
            rounds = sorted({str(trial.rounds_done()) for trial in shorter})
            done += f" ({len(shorter)} with {' or '.join(rounds)} of {self.settings.rounds} rounds)"
        if self.hparams_seed is None:
            return f"{self.state}: {self.output_dir} {done}, of unknown hyper-parameters"
        return f"{self.state}: {self.output_dir} set {self.hparams_seed}, {done}, {json.dumps(self.hparams)}"

    def left(self, again: bool) -> list[Trial]:
        """The trials that are to be run: neither done nor submitted, and those that failed for good only if `again`."""
        return [
            trial
            for trial, state in zip(self.trials, self.states)
            if not self.is_queued(trial) and not trial.is_done() and (again or state != self.FAILED)
        ]

    def shorter(self) -> list[Trial]:
        """The trials that have results, but of fewer rounds than the sweep."""
        ended = (self.NOT_LAUNCHED, self.DONE)
        return [trial for trial, state in zip(self.trials, self.states) if state not in ended and trial.rounds_done()]

    @staticmethod
    def launch(jobs: "list[Job]", launcher_fn: typing.Callable[[], None]) -> None:
        """Have `launcher_fn` run the trials of `jobs` that are left."""
        say("Launching...")
        for job in jobs:
            for trial in filter(Trial.is_done, job.trials):
                trial.forget_attempts()  # of processes that were killed before they could
        launcher_fn()
        say(f"Launched {len(jobs)} jobs!")

    @staticmethod
    def delete(jobs: "list[Job]") -> None:
        """Delete the files of `jobs` that this sweep wrote, but not of running trials."""
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
        for trial in self.trials:
            trial.delete()
        with contextlib.suppress(OSError):
            remove_job_dir(self.output_dir)
        with contextlib.suppress(OSError):
            remove_sweep_file(self.output_dir.parent)
        return True


def queued_trials(output_dir: pathlib.Path, is_status: bool) -> tuple[dict[pathlib.Path, QueuedTrial], dict[str, QueuedLaunch]]:
    """The trials below `output_dir` that launchers have submitted, by their directories, and the last launch of a next rung of
    each sweep that was halved. If a launcher cannot say, only `status` goes without."""
    queued: dict[pathlib.Path, QueuedTrial] = {}
    launches: dict[str, QueuedLaunch] = {}
    for launcher in REGISTRY.values():
        try:
            queued |= launcher().queued(output_dir)
            launches |= {sweep: each for each in launcher().next_launches(output_dir) for sweep in each.sweeps}
        except UsageError as error:
            if not is_status:
                raise
            say(f"Ignored: {error}")
    return queued, launches


def make_jobs(args: argparse.Namespace, sweeps: list[Settings]) -> list[Job]:
    """The jobs that a command is about. `launch`: those that the options draw; with halving also the other sets of the sweeps,
    among which they are ranked. `status`: these and what else lies in the sweeps' directories. `delete_…`: what lies there; if
    options choose sets, only what lies there of these."""
    is_launch, is_delete, output_dir = args.command == "launch", args.command in DELETE, pathlib.Path(args.output_dir)
    is_halving = is_launch and args.halving is not None
    is_chosen = args.search == GRID or any(getattr(args, name) is not None for name in SETS)
    queued, launches = queued_trials(output_dir, args.command == "status")
    jobs: list[Job] = []
    trials = 0
    for settings, space in zip(sweeps, spaces_of(args, sweeps or [Settings(**given) for given in combinations_of(args)])):
        sweep_dir = output_dir / settings.name
        there = sets_there(sweep_dir)
        for path in queued:
            if path.parent.parent == sweep_dir:
                there.setdefault(path.parent.name, set()).add(trial_seed_of(path))
        sets: dict[str, tuple[int, dict] | None] = {}
        if space is not None and (is_chosen or not is_delete):
            sets |= drawn_sets(args, space)
        drawn = set(sets)
        trials += len(drawn) * (args.num_trials or 0)
        if trials > MAX_TRIALS:
            raise UsageError(f"{trials} trials or more exceed the limit of {MAX_TRIALS}: give fewer values")
        if is_delete and is_chosen:
            sets = {name: known for name, known in sets.items() if name in there}
        elif not is_launch or is_halving:
            others = {name: read_hparams(sweep_dir / name) for name in there.keys() - drawn}
            if is_halving:
                others = {name: known for name, known in others.items() if known is not None}
            sets |= sorted(others.items(), key=lambda item: (item[1] or (math.inf,))[0])
        standings = halving.standings_there(sweep_dir, settings)
        for name, known in sets.items():
            begun = there.get(name, set())
            wanted = set(range(args.num_trials)) if (name in drawn and not is_delete) or is_halving else set()
            seeds = sorted(wanted if is_launch else wanted | begun)
            at, next_launch = standings.get(name), launches.get(settings.name)
            jobs.append(Job(sweep_dir / name, settings, space, known, seeds, begun, queued, at, next_launch))
    return jobs


def drawn_sets(args: argparse.Namespace, space: Space) -> dict[str, tuple[int, dict]]:
    """The sets of a search, by the names of their directories: {name: (number, hyper-parameters)}. A set that equals an earlier
    one is left out. Raises UsageError if they are too many."""
    first, number = args.hparams_seed, args.num_hparams
    if args.search == GRID:
        if first is not None or number is not None:
            given = "num_hparams" if first is None else "hparams_seed"
            raise UsageError(f"--search grid takes every combination: --{given} does not apply")
        first, number = 0, space.size()
        if number > MAX_TRIALS:
            raise UsageError(f"--search grid: {number} sets exceed the limit of {MAX_TRIALS} trials: give fewer values")
    drawn: dict[str, tuple[int, dict]] = {}
    for k, hparams in space.sets(first or 0, number or NUM_HPARAMS):
        drawn.setdefault(hparams_hash(hparams), (k, hparams))
    return drawn


def spaces_of(args: argparse.Namespace, sweeps: list[Settings]) -> list[Space | None]:
    """The search space of each sweep, with those domains of --hparams that it has; if it was made with an
    extension that is not loaded, the space that it used last. Raises UsageError if a domain is wrong, or no sweep has it."""
    values = args.hparams or {}
    known = {settings: hparams_of(*settings.hparams_key) for settings in sweeps if not isinstance(settings, ForeignSettings)}
    for name in values:
        if known and not any(name in each for each in known.values()):
            space_of(args.search, {name: values[name]}, *next(iter(known)).hparams_key)  # raises UsageError
    spaces: list[Space | None] = []
    for settings in sweeps:
        if isinstance(settings, ForeignSettings):
            if values or args.search == GRID:
                raise UsageError(
                    f"--{'hparams' if values else 'search grid'}: {settings.name} was made with {settings.needed}: give it"
                )
            spaces.append(settings.space)
        else:
            of_sweep = {name: value for name, value in values.items() if name in known[settings]}
            spaces.append(space_of(args.search, of_sweep, *settings.hparams_key))
    return spaces


# Commands


def launch(args: argparse.Namespace) -> int:
    """Run what is not done yet."""
    launcher, run = command_launchers.launcher_from(args), options_from(RunOptions, args)
    halving_options = options_from(halving.HalvingOptions, args)
    if args.halving is not None and args.again:
        raise UsageError("--again: --halving leaves out sets that diverged, so give only one of the two")
    jobs = chosen_jobs(args)
    show(jobs)
    if args.halving is not None:
        return launch_halved(jobs, args, launcher, run, halved_sweeps([job.trials for job in jobs], halving_options))
    to_run = {Job.NOT_LAUNCHED, Job.INCOMPLETE, *([Job.FAILED] if args.again else [])}
    to_launch = [job for job in jobs if to_run & set(job.states)]
    failed = sum(job.states.count(Job.FAILED) for job in jobs)
    if failed and not args.again:
        say(f"{failed} trials failed and would fail again: --again runs them anyway.")
    if not to_launch:
        if any(job.state in (Job.QUEUED, Job.RUNNING) for job in jobs):
            say("Nothing to launch! The trials that are left are queued, or another sweep runs them.")
            return ALL_LOCKED
        say(f"Nothing to launch! Exiting...All jobs {'are done or failed' if failed else 'are done'}.")
        return 0
    trials = [trial for job in to_launch for trial in job.left(args.again)]
    say_what_is_launched(to_launch, trials, "Sweeps: {}, trials left: {}, rounds left: {}.")
    check(trials, run)
    say_what_is_extended([trial for job in to_launch for trial in job.shorter()], run)
    if run.keep_checkpoints:
        say_what_is_kept(trials, run, pathlib.Path(args.output_dir))
    if not confirmed(args):
        return 0
    output_dir = pathlib.Path(args.output_dir)
    with Progress(trials) as progress:
        Job.launch(to_launch, lambda: launcher.launch(trials, output_dir, run, progress.report))
    return progress.exit_code()


def launch_halved(
    jobs: list[Job], args: argparse.Namespace, launcher: Launcher, run: RunOptions, sweeps: list[HalvedSweep]
) -> int:
    """Run the rungs of `sweeps`, which `jobs` are of, that are not done yet."""
    output_dir, queued = pathlib.Path(args.output_dir), {t.directory for job in jobs for t in job.trials if job.is_queued(t)}
    before, newer = launches_around(launcher, output_dir)
    sweeps = [each for each in sweeps if each.directory.name not in newer]
    rungs = Rungs(sweeps, run.keep_checkpoints, queued, before.begun if before is not None else ())
    say_plans(sweeps)
    code, trials, is_dry = 0, rungs.first(), args.command_launcher == command_launchers.DRY_RUN
    if trials:
        to_launch = [job for job in jobs if job.output_dir in {trial.job_dir for trial in trials}]
        say_what_is_launched(to_launch, trials, "Sweeps: {}, trials of the next rung: {}, rounds: {}.")
        if before is None:  # else it was checked and asked
            check([trial for job in jobs for trial in job.trials], run)
            say_what_is_kept(trials, run, output_dir)
        if not confirmed(args):
            return 0
        with Progress([]) as progress:
            Job.launch(
                to_launch,
                lambda: rungs.run(lambda trials, report: launcher.launch(trials, output_dir, run, report), progress, is_dry),
            )
        for line in rungs.ties():
            say(line)
        code = progress.exit_code()
    if rungs.is_in_flight() or (queued and not is_dry):
        names, words = frozenset(each.directory.name for each in sweeps), tuple(words_again(args))
        next_launch = QueuedLaunch("", Job.QUEUED, "", names, words, frozenset(rungs.begun))
        if not launcher.launch_next(output_dir, next_launch):
            say("Once these trials have ended, launch again to run the next rungs.")
    lines = rungs.waiting()
    for line in lines:
        say(line)
    if not trials and not lines:
        say(f"Nothing to launch! {'The trials that are left are queued.' if queued else 'Exiting...All rungs are done.'}")
        return ALL_LOCKED if queued else 0
    return code or (FAILED if lines else 0)


def launches_around(launcher: Launcher, output_dir: pathlib.Path) -> tuple[QueuedLaunch | None, set[str]]:
    """The launch that was queued as this process, if it is one, and the sweeps that newer ones carry on."""
    launches = launcher.next_launches(output_dir)
    this = next((number for number, each in enumerate(launches) if each.is_this), None)
    if this is None:
        return None, set()
    return launches[this], {sweep for each in launches[this + 1 :] if each.is_active() for sweep in each.sweeps}


def words_again(args: argparse.Namespace) -> list[str]:
    """The words of the command line of the same launch, from any directory and without a question. Extensions and what only
    a user can decide are left out."""
    left_out = ("command", "extension", "take_over", "wait", "dry_run_of")
    values = {name: value for name, value in vars(args).items() if name not in left_out}
    values |= {name: os.path.abspath(values[name]) for name in ("output_dir", "data_dir")}
    if args.command_launcher == command_launchers.DRY_RUN:
        values["command_launcher"] = args.dry_run_of
    return ["launch", *command_words(values | {"skip_confirmation": True})]


def status(args: argparse.Namespace) -> int:
    """Show the jobs and their states."""
    sweeps = chosen_sweeps(args)
    jobs = make_jobs(args, sweeps)
    if args.json:
        print(as_json(jobs))
        return 0
    show(jobs)
    if args.watch:
        follow(lambda: [each for job in make_jobs(args, sweeps) if not job.is_out() for each in zip(job.trials, job.states)])
    return 0


def delete_incomplete(args: argparse.Namespace) -> int:
    """Delete jobs that have failed, or were started and are not done."""
    jobs = chosen_jobs(args)
    show(jobs)
    delete([job for job in jobs if job.state not in (Job.DONE, Job.STOPPED)], args)
    return 0


def delete_all(args: argparse.Namespace) -> int:
    """Delete all jobs of the sweep."""
    jobs = chosen_jobs(args)
    show(jobs)
    delete(jobs, args)
    return 0


def verify(args: argparse.Namespace) -> int:
    """Compute a share of the done trials again, in a temporary directory, and compare every number."""
    from federated.reporting import verification  # pandas takes a second to import

    if args.command_launcher == "dry_run":
        raise UsageError("--command_launcher dry_run computes nothing to compare")
    args.wait = args.command_launcher == "slurm"
    launcher, run = command_launchers.launcher_from(args), options_from(RunOptions, args)
    done = verification.done_trials(chosen_sweeps(args), pathlib.Path(args.output_dir))
    if not done:
        say(f"No finished trials in {args.output_dir}.")
        return FAILED
    originals, differing = verification.read(verification.share_of(done, args.fraction))
    chosen, rounds = len(originals) + len(differing), sum(each.settings.rounds for each in originals)
    say(f"About to compute {chosen} of {len(done)} trials again, of {rounds} rounds in all.")
    with tempfile.TemporaryDirectory(prefix="fedsweep-verify-") as temporary:
        again = [each.again(pathlib.Path(temporary)) for each in originals]
        run_again(again, launcher, run, pathlib.Path(temporary))
        for original, trial in zip(originals, again):
            if lines := verification.compare(original, trial):
                differing[original.directory] = lines
    for path, lines in differing.items():
        print(f"{path}:", *lines, sep="\n  ")
    print(f"{chosen - len(differing)} of {chosen} trials: the same bits")
    if other := sum(original.is_of_other_code() for original in originals):
        print(f"Other code computed {other} of them before; the digest of this code is {code()}.")
    return FAILED if differing else 0


def run_again(trials: list[Trial], launcher: Launcher, run: RunOptions, output_dir: pathlib.Path) -> None:
    """Run `trials`, and leave none of them queued. Raises UsageError if they cannot be run."""
    check(trials, run)
    machines = grouped(trials, lambda trial: (trial.settings.device, trial.settings.precision, trial.settings.threads))
    try:
        with Progress(trials) as progress:
            for of_machine in machines.values():
                launcher.launch(of_machine, output_dir, run, progress.report)
    finally:
        if active := [each for each in launcher.queued(output_dir).values() if each.is_active()]:
            launcher.cancel(active)


def show_partition(args: argparse.Namespace) -> int:
    """Print each client's number of samples of each label, in the trial of seed 0."""
    settings = options_from(Settings, args)
    data = datasets.load(settings.dataset, args.data_dir)
    splits = partition.split(data, settings, 0)
    if args.picture is not None:
        partition_table.save_picture(data, splits, f"{settings.dataset}, {settings.partition}", args.picture)
    print(partition_table.table(data, splits))
    return 0


def chosen_jobs(args: argparse.Namespace) -> list[Job]:
    """The jobs that the options choose, after taking over their locks if the user said so."""
    sweeps = chosen_sweeps(args)
    jobs = make_jobs(args, sweeps)
    if not args.take_over:
        return jobs
    take_over(pathlib.Path(args.output_dir, RECORDS))  # of a launch that died while it submitted jobs
    for job in jobs:
        for trial in job.trials:
            take_over(trial.directory)
    return make_jobs(args, sweeps)


def check_extensions(args: argparse.Namespace) -> int:
    """Check your own code in FILEs, or the built-in code if you name none, by tiny trials. The exit code is 1 if a check
    fails."""
    extension.load(args.extension)
    run = dataclasses.replace(RunOptions(), extension=tuple(args.extension), data_dir=args.data_dir)
    names = checks.Names.of_extensions() if args.extension else checks.Names.built_in()
    are_right = []
    for is_right, line in checks.check(names, run, lambda settings: default_hparams(*settings.hparams_key)):
        print(f"{'ok' if is_right else 'FAILED'}: {line}", flush=True)
        are_right.append(is_right)
    if not are_right:
        raise UsageError(f"{' '.join(args.extension)} has no algorithm, model, data set or partition to check")
    return 0 if all(are_right) else FAILED


# command: (function, an example of its options)
COMMANDS = {
    "launch": (launch, "--algorithm Fedavg Fedprox --num_hparams 20"),
    "status": (status, "--algorithm Fedavg Fedprox --watch"),
    "delete_incomplete": (delete_incomplete, "--dataset mnist"),
    "delete_all": (delete_all, "--dataset mnist"),
    "verify": (verify, "--fraction 0.1 --dataset mnist"),
    "show_partition": (show_partition, "--partition dirichlet --picture p.png"),
    "check": (check_extensions, "my_study.py"),
}


FILE_PREFIX = "@"  # of the name of a file of arguments


def parse(argv: list[str] | None) -> argparse.Namespace:
    words = sys.argv[1:] if argv is None else argv
    extension.load_given(" ".join(["sweep.py", *words[:1]]), words, afresh=True, file_prefix=FILE_PREFIX)
    parser = make_parser(words)
    args, unknown = parser.parse_known_args(words)
    if args.command in ("status", *DELETE) and any(word.startswith(FILE_PREFIX) for word in words):
        # A study's file also says how to launch the study, which these commands need not know
        _, unknown = parser.parse_known_args(["launch", *unknown])
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return args


def make_parser(words: list[str]) -> Parser:
    """The parser of all commands, with what the loaded extensions have registered. `words` are those of the command line."""
    parser = Parser(
        prog="sweep.py",
        description=__doc__,
        epilog=f"{FILE_PREFIX}FILE stands for the options that FILE holds, over any number of lines, with # before comments.",
        fromfile_prefix_chars=FILE_PREFIX,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (function, example) in COMMANDS.items():
        help = function.__doc__
        sub = commands.add_parser(
            name,
            help=help,
            description=help,
            usage=f"sweep.py {name} [OPTION ...]",
            epilog=f"example: python sweep.py {name} {example}",
        )
        if name == "check":
            _add_check(sub)
            continue
        if name == "show_partition":
            _add_picture(sub)
        elif name == "verify":
            _add_share(sub)
        else:
            _add_sweep(sub, name)
        if name in ("launch", "verify"):
            group = sub.add_argument_group("how it is run", "None of these changes a result.")
            command_launchers.add_arguments(group, without=NOT_OF_VERIFY if name == "verify" else ())
            sub.hint = functools.partial(_made_with, words)
        else:
            add_options(sub, ExtensionOptions)
        settings = sub.add_argument_group(
            "what a trial trains", "Several values of a setting make a sweep of each combination."
        )
        add_options(settings, Settings, given_only=True, several=() if name == "show_partition" else names_of(Settings))
    return parser


def _made_with(words: list[str]) -> str:
    """What to add to the message that an option has no such name: with which extensions the sweeps in the output directory were
    made that this process does not know."""
    parser = Parser(add_help=False, fromfile_prefix_chars=FILE_PREFIX)
    parser.add_argument("--output_dir", default=OUTPUT_DIR)
    needed: dict[str, str] = {}
    with contextlib.suppress(OSError, ValueError):  # it may name no directory
        there = study.sweeps_there(pathlib.Path(parser.parse_known_args(words)[0].output_dir))
        needed = {each.needed: each.name for each in there if isinstance(each, ForeignSettings)}
    return "".join(f"; the sweep {name} there was made with {options}" for options, name in needed.items())


def _add_sweep(parser: Parser, command: str) -> None:
    """Add the options that choose jobs."""
    group = parser.add_argument_group("the sweep")
    _add_output_dir(group)
    every = "; default: all that are there" if command in DELETE else ""
    group.add_argument(
        "--num_hparams",
        type=integer(1, MAX_TRIALS),
        metavar="INT",
        help=f"hyper-parameter sets{every or f' (default: {NUM_HPARAMS})'}",
    )
    group.add_argument(
        "--num_trials",
        type=integer(1, MAX_TRIALS),
        default=None if every else NUM_TRIALS,
        metavar="INT",
        help=f"seeds for each set{every or f' (default: {NUM_TRIALS})'}",
    )
    group.add_argument(
        "--hparams_seed", type=integer(0), metavar="INT", help="number of the first set; 0 is the defaults (default: 0)"
    )
    group.add_argument(
        "--hparams",
        type=json_object_or_file,
        metavar="JSON",
        help="""domains in place of the registry's, or a file of them: '{"batch_size": 32, "mu": [0.01, 0.1],
        "learning_rate": {"low": 0.01, "high": 1, "log": true}}' (a value, a choice, a range)""",
    )
    group.add_argument(
        "--search",
        type=one_of(KINDS),
        default=RANDOM,
        metavar="NAME",
        help="random: sets drawn from the domains; grid: every combination of the lists in --hparams (default: random)",
    )
    if command == "status":
        view = parser.add_argument_group("how it is shown").add_mutually_exclusive_group()
        view.add_argument("--watch", action="store_true", help="keep reporting progress until the sweep ends")
        view.add_argument("--json", action="store_true", help="for programs: a list of jobs with their trials")
    else:
        if command == "launch":
            halved = parser.add_argument_group(
                "halving", "Sets start with few rounds of one trial, and the best go on to more."
            )
            add_options(halved, halving.HalvingOptions)
            group.add_argument(
                "--again", action="store_true", help="also run trials that would fail again, such as diverged ones"
            )
        group.add_argument("--skip_confirmation", action="store_true", help="do not ask")
        group.add_argument(
            "--take_over",
            action="store_true",
            help="take over locks whose holder cannot be seen from here; give it only if you know that the holder is dead",
        )


def _add_output_dir(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--output_dir", type=directory, default=OUTPUT_DIR, metavar="DIR",
        help=f"holds all sweeps of a study (default: {OUTPUT_DIR})",
    )  # fmt: skip


def _add_share(parser: Parser) -> None:
    """Add the options that choose the trials to verify."""
    _add_output_dir(parser)
    parser.add_argument(
        "--fraction", type=number(0, 1, above=True), default=0.1, metavar="FLOAT",
        help="share of the done trials, at least one of them (default: 0.1)",
    )  # fmt: skip


def _add_data_dir(parser: Parser) -> None:
    parser.add_argument(
        "--data_dir",
        type=directory,
        default="data",
        metavar="DIR",
        help="where data sets are stored or downloaded to (default: data)",
    )


def _add_check(parser: Parser) -> None:
    parser.add_argument(
        "extension", type=python_file, nargs="*", metavar="FILE", help="your own code, as for --extension of other commands"
    )
    _add_data_dir(parser)


def _add_picture(parser: Parser) -> None:
    _add_data_dir(parser)
    parser.add_argument(
        "--picture",
        type=output_file(partition_table.PICTURES),
        metavar="FILE",
        help=f"also draw it, into FILE, which ends in {', '.join(partition_table.PICTURES)}; default: no picture",
    )


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    stays = "results and checkpoints stay, and the same command resumes from them"
    message = f"ending; {'nothing is left behind' if args.command == 'verify' else stays}."
    try:
        with interrupted_by_signals(message, process_ends=argv is None):
            return COMMANDS[args.command][0](args)
    except UsageError as error:
        say(f"sweep.py {args.command}: error: {error}")
        return USAGE_ERROR
    except BrokenPipeError:
        raise  # see exit_with
    except Interrupted as interrupted:
        return 128 + interrupted.signum
    except (Exception, SystemExit) as error:
        if extension.own_frames(error):
            extension.print_traceback(error)
        elif not isinstance(error, OSError):
            raise
        say(f"sweep.py {args.command}: error: {extension.explain(error)}")
        return FAILED


# Helpers of the commands


Grouped = typing.TypeVar("Grouped")


def grouped(items: list[Grouped], key: typing.Callable[[Grouped], typing.Any]) -> dict[typing.Any, list[Grouped]]:
    """{key(item): those items}, in their order."""
    groups: dict[typing.Any, list[Grouped]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def combinations_of(args: argparse.Namespace) -> list[study.Given]:
    """Every combination of the settings that were given."""
    return study.combinations({name: getattr(args, name) for name in names_of(Settings) if hasattr(args, name)})


def chosen_sweeps(args: argparse.Namespace) -> list[Settings]:
    """The sweeps that a command is about. `launch`: one for each combination of the settings that were given. The others: those
    in the output directory that have what was given. `status` also shows a combination that no sweep there has."""
    output_dir, combinations = pathlib.Path(args.output_dir), combinations_of(args)
    if args.command == "launch":
        return study.sweeps_of(combinations, output_dir)
    there = study.sweeps_there(output_dir)
    chosen = {each.name: each for each in there if any(study.matches(each, given) for given in combinations)}
    if args.command == "status":
        missing = [given for given in combinations if not any(study.matches(each, given) for each in there)]
        chosen = {each.name: each for each in study.sweeps_of(missing, output_dir)} | chosen
    return list(chosen.values())


def show(jobs: list[Job]) -> None:
    """Print every job, the last failure of each of its trials that is not done, who runs one, what is broken of one that is
    done, and how many jobs there are of each state."""
    for job in jobs:
        print(job)
        for trial, state in zip(job.trials, job.states):
            if state in (Job.INCOMPLETE, Job.FAILED) and (failures := trial.failures()):
                print(f"  {trial.directory.name} failed: {failures[-1]['role']} {failures[-1]['reason']}")
            for path in trial.broken_results() if state == Job.DONE else ():
                cure = f"delete {DONE} beside it, and a launch computes it again"
                print(f"  {trial.directory.name}: {path} is missing or truncated; {cure}")
            if state == Job.RUNNING and not job.is_queued(trial) and (found := holder(trial.directory)) is not None:
                print(f"  {trial.directory.name} is run by {found}")
            if state != Job.DONE and trial.directory in job.queued and (detail := job.queued[trial.directory].detail):
                print(f"  {trial.directory.name}: {detail}")
    open = [job for job in jobs if job.state not in (Job.DONE, Job.STOPPED, Job.FAILED)]
    for sweep, launch in {job.settings.name: job.next_launch for job in open}.items():
        if launch is not None:
            print(f"Next rung of {sweep}: {launch.detail}")
    states = [job.state for job in jobs]
    counts = f"{len(jobs)} jobs: {states.count(Job.DONE)} done, {states.count(Job.INCOMPLETE)} incomplete, "
    counts += f"{states.count(Job.NOT_LAUNCHED)} not launched"
    for state in (Job.STOPPED, Job.FAILED, Job.QUEUED, Job.RUNNING):
        if state in states:
            counts += f", {states.count(state)} {state.lower()}"
    print(f"\n{counts}.\n", flush=True)


def say_what_is_launched(jobs: list[Job], trials: list[Trial], text: str) -> None:
    """Say how many jobs there are, and by `text` of how many sweeps, with how many trials and rounds."""
    rounds = sum(trial.settings.rounds - trial.rounds_kept() for trial in trials)
    say(f"About to launch {len(jobs)} jobs.")
    say(text.format(len({trial.sweep_dir for trial in trials}), len(trials), rounds))


def check(trials: list[Trial], run: RunOptions) -> None:
    """Raises UsageError if `trials` could not be run. Data are loaded and split once for all sweeps that do it alike."""
    load, smallest = functools.cache(datasets.load), dict[tuple, int]()
    for settings, of_sweep in grouped(trials, lambda trial: trial.settings).items():
        if isinstance(settings, ForeignSettings):
            raise UsageError(f"{settings.name} was made with {settings.needed}: give it")
        spec = datasets.REGISTRY[settings.dataset]
        models.check(settings.model_arch, spec)
        augmentation.check(settings.augmentation, spec)
        if settings.dp_clip is not None:
            models.check_has_no_statistics(settings.model_arch, spec)
        if run.save_model:
            check_has_model(settings)
        if run.tensorboard:
            check_tensorboard()
        data = load(settings.dataset, run.data_dir)
        seeds = sorted({each.trial_seed for each in of_sweep})
        alike = (*(getattr(settings, name) for name in partition.SPLIT_BY), *seeds)
        if alike not in smallest:
            splits = (each for seed in seeds for each in partition.split(data, settings, seed))
            smallest[alike] = min(len(each.train) for each in splits)
        if smallest[alike] == 1 or any(each.hparams.get("batch_size") == 1 for each in of_sweep):
            models.check_batch_of_one(settings.model_arch, spec)


def say_what_is_extended(trials: list[Trial], run: RunOptions) -> None:
    """Print how many of `trials`, which have results of fewer rounds, resume and how many start again."""
    if not trials:
        return
    kept = sum(trial.rounds_kept() > 0 for trial in trials)
    say(
        f"{len(trials)} trials have results of fewer rounds, which stay until the results of all rounds replace them: "
        f"{kept} resume from kept checkpoints, {len(trials) - kept} start again."
    )
    if kept and not run.keep_checkpoints:
        say("These checkpoints are removed as their trials end: --keep_checkpoints keeps new ones.")
    for option in ("save_model", "tensorboard"):
        there = sum(bool(trial.extras()[option]) for trial in trials)
        if there and not getattr(run, option):
            say(f"The files of --{option} for {there} of them are removed with their results: --{option} writes new ones.")


def say_what_is_kept(trials: list[Trial], run: RunOptions, output_dir: pathlib.Path) -> None:
    """Print how much disk space the kept checkpoints of `trials` take."""
    from federated.running.rounds import checkpoint_bytes  # torch takes a second to import

    existing = next(path for path in (output_dir.absolute(), *output_dir.absolute().parents) if path.is_dir())
    size, free = sum(checkpoint_bytes(trial, run.save_model) for trial in trials), shutil.disk_usage(existing).free
    say(f"The checkpoints of {len(trials)} trials are kept: about {size / 1e6:.1f} MB, of {free / 1e6:.0f} MB free.")


def delete(jobs: list[Job], args: argparse.Namespace) -> None:
    """Cancel the queued trials of `jobs` and delete the jobs, except running ones."""
    for job in [job for job in jobs if any(each.state() == Job.RUNNING for each in job.trials if not job.is_queued(each))]:
        say(f"Not deleted, it is running: {job.output_dir}")
        jobs.remove(job)
    active = sum(each.is_active() for job in jobs for each in job.queued.values())
    say(f"About to {f'cancel {active} trials that are queued or running, and ' if active else ''}delete {len(jobs)} jobs.")
    if shorter := sum(len(job.shorter()) for job in jobs):
        say(f"{shorter} of their trials have results of fewer rounds, which are deleted, too.")
    sweeps = {job.output_dir.parent.name for job in jobs}
    if jobs and confirmed(args):
        output_dir, directories = pathlib.Path(args.output_dir), {job.output_dir for job in jobs}
        launchers: list[Launcher] = [launcher() for launcher in REGISTRY.values()]
        for launcher in launchers:
            # First, as they would submit what is cancelled then; and one that runs may submit another
            while launches := [
                each for each in launcher.next_launches(output_dir) if each.is_active() and sweeps & each.sweeps
            ]:
                names = ", ".join(sorted(frozenset().union(*(each.sweeps for each in launches))))
                say(f"Cancelling the launch of the next rung of {names}: launch again to continue with the sets that stay.")
                launcher.cancel(launches)
            queued = launcher.queued(output_dir).items()
            if to_cancel := [each for path, each in queued if path.parent in directories and each.is_active()]:
                launcher.cancel(to_cancel)
        Job.delete(jobs)
        for launcher in launchers:
            launcher.tidy(output_dir)


def confirmed(args: argparse.Namespace) -> bool:
    """Ask for confirmation, unless --skip_confirmation. Raises UsageError if there is no terminal."""
    if args.skip_confirmation:
        return True
    if not sys.stdin.isatty():
        raise UsageError("there is no terminal to ask for confirmation: give --skip_confirmation")
    sys.stderr.write("Are you sure? (y/n) ")
    sys.stderr.flush()
    with contextlib.suppress(EOFError):  # Ctrl-D
        if input().lower().strip()[:1] == "y":
            return True
    say("Nevermind!")
    return False


def as_json(jobs: list[Job]) -> str:
    """The output of status as JSON, for programs."""

    queued = {directory: each for job in jobs for directory, each in job.queued.items()}

    def of_trial(trial: Trial, state: str) -> dict:
        last, failures = last_round(trial), trial.failures() if state in (Job.INCOMPLETE, Job.FAILED) else []
        return {
            "trial_seed": trial.trial_seed,
            "state": state,
            "directory": str(trial.directory),
            "rounds_done": trial.settings.rounds if state == Job.DONE else trial.rounds_done(),
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
                "halving": dataclasses.asdict(job.standing) if job.standing is not None else None,
                "next_launch": job.next_launch.detail if job.next_launch is not None else None,
                "trials": list(map(of_trial, job.trials, job.states)),
            }
            for job in jobs
        ],
        indent=1,
    )


if __name__ == "__main__":
    exit_with(main)
