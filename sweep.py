"""Tune a federated-learning algorithm: run seeded hyper-parameter sets, each over several trials."""

import argparse
import contextlib
import dataclasses
import itertools
import json
import pathlib
import shutil
import sys
import threading
import time

from tqdm import tqdm

import command_launchers
from command_launchers import REGISTRY, Held
from federated import augmentation, datasets, models, partition, partition_table, watch
from federated import trial as trials_of
from federated.lock import Locked, take_over
from federated.options import USAGE_ERROR, Parser, UsageError, directory, json_object, output_file, whole
from federated.processes import Interrupted, interrupt_on_signals
from federated.settings import (
    Settings,
    add_arguments,
    check_has_model,
    check_same_settings,
    check_tensorboard,
    remove_sweep_file,
    settings_from,
    stored_settings,
)
from federated.trial import DONE, Trial, hparams_hash
from hparams_registry import check_hparams, default_hparams, random_hparams

FAILED, ALL_LOCKED = 1, 3  # exit codes of launch, besides 0 and USAGE_ERROR

MOST_TRIALS = 100_000  # of one sweep


class Job:
    """One hyper-parameter set with all its trials."""

    NOT_LAUNCHED = trials_of.NOT_LAUNCHED
    INCOMPLETE = trials_of.INCOMPLETE
    QUEUED = trials_of.QUEUED
    RUNNING = trials_of.RUNNING
    DONE = trials_of.COMPLETE

    def __init__(
        self,
        settings: Settings,
        hparams: dict,
        hparams_seed: int,
        num_trials: int,
        sweep_dir: pathlib.Path,
        held: dict[pathlib.Path, Held],
    ):
        """`held` is what launchers tell of trials that they queued, by the trials' directories."""
        self.settings, self.hparams, self.hparams_seed = settings, hparams, hparams_seed
        self.output_dir = sweep_dir / hparams_hash(hparams)
        self.trials = [
            Trial(settings, hparams, hparams_seed, seed, self.output_dir / f"trial_{seed}") for seed in range(num_trials)
        ]
        self.held = held
        self.states = [self._state_of(trial) for trial in self.trials]
        if self.RUNNING in self.states:
            self.state = self.RUNNING
        elif self.QUEUED in self.states:
            self.state = self.QUEUED
        elif len(set(self.states)) == 1:
            self.state = self.states[0]
        else:
            self.state = self.INCOMPLETE

    def _state_of(self, trial):
        return self.held[trial.directory].state if self.holds(trial) and not trial.is_done() else trial.state()

    def holds(self, trial: Trial) -> bool:
        """Whether a launcher has queued `trial` and it has not ended since."""
        return trial.directory in self.held and self.held[trial.directory].is_active()

    def __str__(self):
        done = f"{self.states.count(self.DONE)}/{len(self.trials)} trials done"
        return f"{self.state}: {self.output_dir} set {self.hparams_seed}, {done}, {json.dumps(self.hparams)}"

    def left(self) -> list[Trial]:
        """The trials that are neither done nor held by a launcher."""
        return [trial for trial in self.trials if not self.holds(trial) and not trial.is_done()]

    @staticmethod
    def launch(jobs, launcher_fn):
        """Have `launcher_fn` make the directories of all trials of `jobs` that are neither done nor queued, and run them."""
        say("Launching...")
        for job in jobs:
            for trial in filter(Trial.is_done, job.trials):
                trial.forget_attempts()  # of processes that were killed before they could
        launcher_fn([trial for job in jobs for trial in job.left()])
        say(f"Launched {len(jobs)} jobs!")

    @staticmethod
    def delete(jobs):
        """Delete what this sweep made of `jobs`; what runs stays."""
        say("Deleting...")
        deleted = 0
        for job in jobs:
            try:
                deleted += job._delete()
            except Locked as error:
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


def held_trials(args) -> dict[pathlib.Path, dict[pathlib.Path, Held]]:
    """{job's directory: {trial's directory: what the launcher that queued it tells}}"""
    held = {}
    for launcher in REGISTRY.values():
        try:
            for trial, told in launcher.held(pathlib.Path(args.output_dir)).items():
                held.setdefault(trial.parent, {})[trial] = told
        except UsageError as error:
            if args.command != "status":
                raise
            say(f"Ignored: {error}")
    return held


def make_jobs(args, sweeps: list[Settings]) -> list[Job]:
    """The jobs of sets hparams_seed, hparams_seed + 1, … of each sweep; a set that equals an earlier one is left out."""
    if args.num_hparams * args.num_trials > MOST_TRIALS:
        raise UsageError(f"--num_hparams {args.num_hparams} x --num_trials {args.num_trials} is more than {MOST_TRIALS} trials")
    jobs, held = {}, held_trials(args)
    for settings, fixed in zip(sweeps, fixed_hparams(args.hparams, sweeps)):
        draw = (settings.algorithm, settings.dataset)
        optimizer = settings.local_optimizer
        for seed in range(args.hparams_seed, args.hparams_seed + args.num_hparams):
            hparams = default_hparams(*draw, optimizer) if seed == 0 else random_hparams(*draw, seed, optimizer)
            hparams |= fixed
            sweep_dir = pathlib.Path(args.output_dir) / settings.name
            if (output_dir := sweep_dir / hparams_hash(hparams)) not in jobs:
                jobs[output_dir] = Job(settings, hparams, seed, args.num_trials, sweep_dir, held.get(output_dir, {}))
    return list(jobs.values())


def fixed_hparams(values: dict, sweeps: list[Settings]) -> list[dict]:
    """Those of `values` that each sweep has. Raises UsageError where one is wrong, or none of them has it."""
    draws = [(settings.algorithm, settings.dataset, settings.local_optimizer) for settings in sweeps]
    known = [default_hparams(*draw) for draw in draws]
    for name in values:
        if not any(name in each for each in known):
            check_hparams({name: values[name]}, *draws[0])  # says so
    return [
        check_hparams({name: value for name, value in values.items() if name in each}, *draw)
        for draw, each in zip(draws, known)
    ]


def parse(argv):
    parser = Parser(prog="sweep.py", description=__doc__, formatter_class=argparse.HelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add_command(name, help, example):
        shown = f"example: python sweep.py {name} {example}"
        return commands.add_parser(name, help=help, description=help, epilog=shown, formatter_class=argparse.HelpFormatter)

    for command, (help, example) in COMMANDS.items():
        sub = add_command(command, help, example)
        group = sub.add_argument_group("the sweep")
        group.add_argument("--output_dir", type=directory, default="sweep_logs", metavar="DIR", help="(default: sweep_logs)")
        group.add_argument(
            "--num_hparams", type=whole(1, MOST_TRIALS), default=5, metavar="INT", help="hyper-parameter sets (default: 5)"
        )
        group.add_argument(
            "--num_trials", type=whole(1, MOST_TRIALS), default=3, metavar="INT", help="seeds for each set (default: 3)"
        )
        group.add_argument(
            "--hparams_seed",
            type=whole(0),
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
            look = sub.add_argument_group("how it is shown").add_mutually_exclusive_group()
            look.add_argument("--watch", action="store_true", help="go on telling how far it is until it ends")
            look.add_argument("--json", action="store_true", help="for programs: a list of jobs with their trials")
        else:
            group.add_argument("--skip_confirmation", action="store_true", help="do not ask")
            group.add_argument(
                "--take_over",
                action="store_true",
                help="take over the trials that processes on other hosts hold; only you can know that those are dead",
            )
        if command == "launch":
            run = sub.add_argument_group("how it is run", "None of these changes a result.")
            command_launchers.add_arguments(run)
        add_arguments(sub, given_only=True, several=SEVERAL)
    help = "print how many samples of each label each client has, in the trial of seed 0"
    sub = add_command(SHOW_PARTITION, help, "--dataset mnist --partition dirichlet --picture labels.png")
    sub.add_argument("--data_dir", type=directory, default="data", metavar="DIR", help="where data sets lie (default: data)")
    sub.add_argument(
        "--picture",
        type=output_file(partition_table.PICTURES),
        metavar="FILE",
        help=f"draw it too, into FILE, which ends in {', '.join(partition_table.PICTURES)}; default: no picture",
    )
    add_arguments(sub, given_only=True)
    return parser.parse_args(argv)


# name: (what it does, an example)
COMMANDS = {
    "launch": ("run what is not done yet", "--algorithm Fedavg Fedprox --dataset mnist --num_hparams 20"),
    "status": ("show the jobs and their states", "--algorithm Fedavg Fedprox --dataset mnist --watch"),
    "delete_incomplete": ("delete jobs that were begun and are not done", "--dataset mnist"),
    "delete_all": ("delete all jobs of the sweep", "--dataset mnist"),
}
SHOW_PARTITION = "show_partition"  # of settings; it needs no sweep


def main(argv=None) -> int:
    args = parse(argv)
    interrupt_on_signals("ending; what is done and the checkpoints stay, and the same command goes on from here.")
    try:
        if args.command == SHOW_PARTITION:
            show_partition(settings_from(args), args.data_dir, args.picture)
            return 0
        if args.command == "launch":
            command_launchers.check_arguments(args)
        sweeps = sweeps_of(args)
        jobs = make_jobs(args, sweeps)
        if vars(args).get("take_over"):
            for job in jobs:
                for trial in job.trials:
                    take_over(trial.directory)
            jobs = make_jobs(args, sweeps)
        if args.command == "status" and args.json:
            print(as_json(jobs))
            return 0
        show(jobs)
        if args.command == "status" and args.watch:
            follow(lambda: make_jobs(args, sweeps))
        if args.command == "launch":
            return launch(jobs, args)
        if args.command == "delete_incomplete":
            delete([job for job in jobs if job.state in (Job.INCOMPLETE, Job.QUEUED, Job.RUNNING)], args)
        if args.command == "delete_all":
            delete([job for job in jobs if job.state != Job.NOT_LAUNCHED], args)
    except UsageError as error:
        say(f"sweep.py {args.command}: error: {error}")
        return USAGE_ERROR
    except OSError as error:
        say(f"sweep.py {args.command}: error: {error}")
        return FAILED
    except Interrupted as interrupted:
        return 128 + interrupted.signum
    return 0


# Options that may name several, each of which is a sweep of its own
SEVERAL = ("algorithm", "dataset")


def sweeps_of(args) -> list[Settings]:
    """The settings of the sweep of each algorithm on each data set."""
    named = [getattr(args, name, [Settings.__dataclass_fields__[name].default]) for name in SEVERAL]
    sweeps = {}
    for values in itertools.product(*named):
        settings = settings_of(args, argparse.Namespace(**(vars(args) | dict(zip(SEVERAL, values)))))
        sweeps.setdefault(settings.name, settings)
    return list(sweeps.values())


def settings_of(args, one: argparse.Namespace) -> Settings:
    """The settings of one sweep: those given, and where a sweep only is looked at, else those it was made with."""
    given = settings_from(one)
    sweep_dir = pathlib.Path(args.output_dir) / given.name
    try:
        stored = stored_settings(sweep_dir)
    except UsageError as error:
        if args.command != "status":
            raise
        say(f"Ignored: {error}")
        stored = None
    if args.command != "launch" and stored is not None:
        named = {name: getattr(one, name) for name in vars(args) if hasattr(given, name)}
        given = dataclasses.replace(stored, **named)
    check_same_settings(sweep_dir, given, stored)
    return given


def show(jobs):
    """Print every job, the last failure of each of its trials that is not done and what is broken of one that is, and how many
    jobs there are of each state."""
    for job in jobs:
        print(job)
        for trial, state in zip(job.trials, job.states):
            if state == Job.INCOMPLETE and (failures := trial.failures()):
                print(f"  {trial.directory.name} failed: {failures[-1]['role']} {failures[-1]['reason']}")
            for path in trial.broken_results() if state == Job.DONE else ():
                print(f"  {trial.directory.name}: {path} is missing or cut; delete {DONE} beside it to have it computed again")
            if state != Job.DONE and trial.directory in job.held and (told := job.held[trial.directory].told):
                print(f"  {trial.directory.name}: {told}")
    states = [job.state for job in jobs]
    counts = f"{len(jobs)} jobs: {states.count(Job.DONE)} done, {states.count(Job.INCOMPLETE)} incomplete, "
    counts += f"{states.count(Job.NOT_LAUNCHED)} not launched"
    for state in (Job.QUEUED, Job.RUNNING):
        if state in states:
            counts += f", {states.count(state)} {state.lower()}"
    print(f"\n{counts}.\n", flush=True)


def show_partition(settings, data_dir, picture):
    """Print the table of labels by client, and draw it where `picture` names a file."""
    data = datasets.load(settings.dataset, data_dir)
    parts = partition.split(data, settings, 0)
    if picture is not None:
        partition_table.save_picture(data, parts, f"{settings.dataset}, {settings.partition}", picture)
    print(partition_table.table(data, parts))


def launch(jobs, args) -> int:
    to_launch = [job for job in jobs if {Job.NOT_LAUNCHED, Job.INCOMPLETE} & set(job.states)]
    if not to_launch:
        if any(job.state in (Job.QUEUED, Job.RUNNING) for job in jobs):
            say("Nothing to launch! What is not done is queued or being run by another sweep.")
            return ALL_LOCKED
        say("Nothing to launch! Exiting...All jobs are done.")
        return 0
    say(f"About to launch {len(to_launch)} jobs.")
    for settings in {job.settings: None for job in to_launch}:
        check(settings, args)
    if not confirmed(args):
        return 0
    with Progress([trial for job in to_launch for trial in job.left()]) as progress:
        Job.launch(to_launch, lambda trials: REGISTRY[args.command_launcher].launch(trials, args, progress.report))
    return progress.exit_code()


def check(settings: Settings, args):
    """Raises UsageError where trials with `settings` could not be run."""
    spec = datasets.REGISTRY[settings.dataset]
    models.check(settings.model_arch, spec)
    augmentation.check(settings.augmentation, spec)
    if args.save_model:
        check_has_model(settings)
    if args.tensorboard:
        check_tensorboard()
    data = datasets.load(settings.dataset, args.data_dir)
    for seed in range(args.num_trials):
        partition.split(data, settings, seed)


def delete(jobs, args):
    for job in [job for job in jobs if any(trial.state() == Job.RUNNING for trial in job.trials if not job.holds(trial))]:
        say(f"Not deleted, it is running: {job.output_dir}")
        jobs.remove(job)
    held = sum(each.is_active() for job in jobs for each in job.held.values())
    say(f"About to {f'cancel {held} trials that are queued or running, and ' if held else ''}delete {len(jobs)} jobs.")
    if jobs and confirmed(args):
        output_dir, directories = pathlib.Path(args.output_dir), {job.output_dir for job in jobs}
        for launcher in REGISTRY.values():
            if held := [
                each for path, each in launcher.held(output_dir).items() if path.parent in directories and each.is_active()
            ]:
                launcher.cancel(held)
        Job.delete(jobs)
        for launcher in REGISTRY.values():
            launcher.tidy(output_dir)


def confirmed(args) -> bool:
    """Ask, unless told not to. Raises UsageError where nobody is there to answer."""
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


class Progress:
    """Tells how far trials are: on a terminal by a bar that is drawn anew each second, elsewhere by lines, as each trial ends
    and every so often."""

    def __init__(self, trials):
        self._waiting = {trial.directory: trial for trial in trials}
        self._total, self._done, self._failed, self._locked = len(trials), 0, 0, 0
        self._pace, self._bar = watch.Pace(len(trials)), None
        self._speaking, self._over = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._tell_now_and_then, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        self._thread.join()
        if self._bar is not None:
            self._bar.close()

    def _tell_now_and_then(self):
        on_terminal = sys.stderr.isatty()
        while not self._over.wait(REDRAW_SECONDS if on_terminal else LINE_SECONDS):
            line = self._line()
            with self._speaking:
                if not on_terminal:
                    say(line)
                    continue
                if self._bar is None:
                    self._bar = tqdm(total=self._total, leave=False, bar_format="{percentage:3.0f}%|{bar:20}| {desc}")
                self._bar.n = self._done + self._failed + self._locked
                self._bar.set_description_str(line)

    def _line(self):
        return self._pace.line(self._done, self._failed, list(filter(watch.is_running, list(self._waiting.values()))))

    def report(self, trial, outcome):
        self._waiting.pop(trial.directory, None)
        is_done, is_locked = outcome is True, outcome is not True and outcome.is_locked()
        self._done += is_done
        self._locked += is_locked
        self._failed += not (is_done or is_locked)
        if is_locked:
            self._say(f"{trial.directory} is left to the sweep that runs it")
        elif not is_done:
            self._say(f"{trial.directory} failed: {outcome} (see {trial.log(outcome.role)})")
        elif not sys.stderr.isatty():
            ended = self._done + self._failed + self._locked
            left = self._pace.seconds / ended * (self._total - ended)
            self._say(f"{ended}/{self._total} trials, {left:.0f} s left: {trial.directory} done")

    def _say(self, text):
        with self._speaking:
            if self._bar is None:
                say(text)
            else:
                self._bar.write(text, file=sys.stderr)

    def exit_code(self) -> int:
        if self._failed:
            say(f"{self._failed} of {self._total} trials failed.")
            return FAILED
        return ALL_LOCKED if self._locked else 0


REDRAW_SECONDS, LINE_SECONDS = 1, 10


def follow(make_jobs):
    """Tell how far a sweep is that runs elsewhere, until nothing of it is left to be run or to run."""
    pace, on_terminal, told = None, sys.stdout.isatty(), None
    while True:
        trials = [(trial, state) for job in make_jobs() for trial, state in zip(job.trials, job.states)]
        pace = pace or watch.Pace(len(trials), first=None)
        done = sum(state == Job.DONE for _, state in trials)
        running = [trial for trial, state in trials if state == Job.RUNNING]
        failed = sum(state == Job.INCOMPLETE and bool(trial.failures()) for trial, state in trials)
        line = pace.line(done, failed, running)
        if on_terminal:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r{line[:width]:<{width}}", end="", flush=True)
        elif line != told:
            print(line, flush=True)
            told = line
        if done + failed == len(trials):
            print(end="\n" * on_terminal)
            return
        time.sleep(REDRAW_SECONDS if on_terminal else LINE_SECONDS)


def as_json(jobs) -> str:
    """What status shows, for programs."""

    held = {directory: each for job in jobs for directory, each in job.held.items()}

    def of_trial(trial, state):
        last, failures = watch.last_round(trial), trial.failures() if state == Job.INCOMPLETE else []
        return {
            "trial_seed": trial.trial_seed,
            "state": state,
            "directory": str(trial.directory),
            **(dataclasses.asdict(last) if last is not None else {}),
            "failures": [{"role": failure["role"], "reason": failure["reason"]} for failure in failures],
            "queue": held[trial.directory].told if trial.directory in held else None,
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


def say(text):
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
