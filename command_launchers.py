"""Launchers: each gets the trials that are not done and runs them. A new one is a class here and an entry in REGISTRY."""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import json
import os
import pathlib
import resource
import shlex
import shutil
import sys
import tempfile
import time

from federated import algorithms, machine, models, slurm, version
from federated.lock import Lock, Locked, read_lock
from federated.options import UsageError, command_line, defaults_of, host_and_port, one_of, shown, whole
from federated.processes import (
    GIVER_VARIABLE,
    MOST_PROCESSES,
    Cold,
    Failure,
    RunningTrial,
    Warm,
    add_run_arguments,
    add_server_arguments,
    run_trials,
    trial_commands,
)
from federated.running.listener import key_from_environment, unix_address
from federated.settings import Settings, write_sweep_file
from federated.trial import FAILED, INCOMPLETE, QUEUED, RUNNING, Trial

# A trial's process is counted as this much memory where the number of trials at once is not given.
PROCESS_BYTES = 1 << 29


def add_arguments(group):
    """The options of every launcher, none of which changes a result, and those that single launchers add."""
    group.add_argument(
        "--command_launcher",
        type=one_of(REGISTRY),
        default="local_parallel",
        metavar="NAME",
        help=f"{', '.join(REGISTRY)} (default: local_parallel)",
    )
    group.add_argument(
        "--host",
        type=host_and_port,
        metavar="HOST:PORT",
        help="servers listen here, with the key in FEDERATED_KEY, one trial at a time (default: private Unix sockets)",
    )
    group.add_argument(
        "--jobs",
        type=whole(1, 1024),
        metavar="INT",
        help="trials at once (default: as many as the cores hold); slurm: jobs at once",
    )
    add_trial_arguments(group)
    for launcher in REGISTRY.values():
        launcher.add_arguments(group)


def add_trial_arguments(group):
    """Those options of launchers that go on to where a trial runs."""
    group.add_argument(
        "--trials_per_device", type=whole(1, 1024), default=1, metavar="INT", help="trials at once on each GPU (default: 1)"
    )
    group.add_argument(
        "--client_processes",
        type=whole(1, MOST_PROCESSES),
        metavar="INT",
        help="client processes of a trial (default: one a participant up to the trial's share of the cores)",
    )
    group.add_argument(
        "--retries",
        type=whole(0, 1000),
        default=0,
        metavar="INT",
        help="further attempts at a trial that failed by accident (default: 0)",
    )
    add_run_arguments(group)
    add_server_arguments(group)


def check_arguments(args):
    """Raises UsageError where an option was given that only a launcher has which is not to run: it would go unheard."""
    name = args.command_launcher
    for other, launcher in REGISTRY.items():
        if other in (name, args.dry_run_of if name == "dry_run" else None):
            continue
        for option, default in defaults_of(launcher.add_arguments).items():
            if getattr(args, option) != default:
                raise UsageError(f"--{option}: --command_launcher {name} has no use for it, only {other} has")


@dataclasses.dataclass(frozen=True)
class Held:
    """What a launcher that returns before its trials have run tells of one of them."""

    job: str  # as its cancel() takes it
    state: str  # QUEUED, RUNNING, or INCOMPLETE where the job has ended
    told: str  # what status prints, such as why it waits or has ended; may be empty

    def is_active(self) -> bool:
        return self.state != INCOMPLETE


class Launcher:
    """launch() is all that a launcher needs. One that queues trials and returns also tells of them and cancels them."""

    def launch(self, trials: list[Trial], args: argparse.Namespace, report):
        """Run `trials`, of which there is one at least. args are sweep.py's options. report(trial, outcome) is to be called
        for each trial that ended meanwhile, with True or a federated.processes.Failure."""
        raise NotImplementedError

    def commands(self, trials, args) -> list[str]:
        """What launch() would have a shell do, for dry_run."""
        return []

    def add_arguments(self, group):
        """Add the options that only this launcher has."""

    def held(self, output_dir: pathlib.Path) -> dict[pathlib.Path, Held]:
        """What is known of trials that it queued, by the trial's directory. Raises UsageError where that cannot be known."""
        return {}

    def cancel(self, held: list[Held]):
        """Return once none of these, which are active, is queued or running."""

    def tidy(self, output_dir: pathlib.Path):
        """Remove what it wrote and no trial there needs any more."""


class LocalSequential(Launcher):
    """One trial after another on this machine, each process started as a user would start it."""

    start = Cold

    def most(self, trials, args):
        """How many trials it runs at once at most."""
        return 1

    def launch(self, trials, args, report):
        settings = trials[0].settings  # of which all have the same device, precision and threads
        if settings.device == "cuda" or settings.precision != "fp32":  # else no need to wait for torch's import
            from federated.learning.device import resolve_device

            resolve_device(settings)
        if args.host:
            key_from_environment()  # raises UsageError before anything is made
        gpus, jobs = self._places(trials, args)
        if self.start is Warm:
            check_open_files(jobs, max(client_processes(trial, args, jobs, gpus) for trial in trials))
        check_writable(trials)

        def begin(trial, place):
            environment = {GIVER_VARIABLE: str(os.getpid()), **device_of(gpus, place)}
            start_here = functools.partial(self.start, environment=environment)
            return RunningTrial(trial, start_here, client_processes(trial, args, jobs, gpus), args)

        run_trials(trials, begin, jobs, args.retries, report)

    def commands(self, trials, args):
        gpus, jobs = self._places(trials, args)
        commands = []
        for number, trial in enumerate(trials):
            address = args.host or unix_address(str(trial.directory.resolve()))
            roles = trial_commands(trial, address, client_processes(trial, args, jobs, gpus), args)
            device = [f"{name}={value}" for name, value in device_of(gpus, number % jobs).items()]
            commands.append(" &\n".join(" ".join([*device, shlex.join(command)]) for command in roles.values()))
        return commands

    def _places(self, trials, args):
        """The GPUs, and how many trials run at once."""
        settings = trials[0].settings
        gpus = [] if settings.device == "cpu" else machine.gpus()
        if args.jobs:
            jobs = args.jobs
        elif gpus:
            jobs = len(gpus) * args.trials_per_device
        else:
            jobs = min(machine.cores() // settings.threads, machine.memory() // (2 * PROCESS_BYTES))
        return gpus, max(1, min(jobs, self.most(trials, args), len(trials)))


class LocalParallel(LocalSequential):
    """As many trials at once as this machine holds, forked from a process that has imported what they need."""

    @property
    def start(self):
        return Warm

    def most(self, trials, args):
        return 1 if args.host else len(trials)

    def launch(self, trials, args, report):
        preload(trials, ["federated.learning.tensorboard_events"] if args.tensorboard else [])
        super().launch(trials, args, report)


class DryRun(Launcher):
    """Print the commands of another launcher, run nothing."""

    def add_arguments(self, group):
        others = [name for name, launcher in REGISTRY.items() if type(launcher).commands is not Launcher.commands]
        group.add_argument(
            "--dry_run_of",
            type=one_of(others),
            default="local_parallel",
            metavar="NAME",
            help=f"the launcher whose commands dry_run prints: {', '.join(others)} (default: local_parallel)",
        )

    def launch(self, trials, args, report):
        for command in REGISTRY[args.dry_run_of].commands(trials, args):
            print(command)


class Slurm(Launcher):
    """Arrays of Slurm jobs. An element is a job on one node that runs its trials as local_parallel does.

    OUTPUT_DIR/.slurm/<job name>/job.sh         an array, as sbatch got it
    …/trials.jsonl                              the trials of its element k in line k + 1
    …/<array job id>_<k>.log                    what element k printed
    OUTPUT_DIR/.code/<version.CODE>/            the code it runs

    Which jobs there are is asked of Slurm by their names, so that nothing here can contradict it. Whether a trial is done its
    own files tell.
    """

    RECORDS, CODE = ".slurm", ".code"
    SCRIPT, LIST = "job.sh", "trials.jsonl"

    def add_arguments(self, group):
        group.add_argument(
            "--slurm_args",
            type=words,
            metavar="ARGS",
            help="slurm: sbatch's options, as in --slurm_args='--time=2:00:00'",
        )
        group.add_argument(
            "--trials_per_job",
            type=whole(1, 100_000),
            default=1,
            metavar="INT",
            help="slurm: trials of a job (default: 1)",
        )
        group.add_argument("--wait", action="store_true", help="slurm: stay until the trials have ended, and tell of each")

    def launch(self, trials, args, report):
        arrays = self._arrays(trials, args)  # raises UsageError before anything is made
        check_writable(trials)
        records = pathlib.Path(args.output_dir).absolute() / self.RECORDS
        records.mkdir(exist_ok=True)
        try:
            lock = Lock(records)
        except Locked as error:
            raise UsageError(f"another launch submits jobs just now: {error}") from error
        try:
            held = self.held(pathlib.Path(args.output_dir))
            if any(trial.directory in held and held[trial.directory].is_active() for trial in trials):
                raise UsageError("another launch has submitted some of these trials just now: launch again")
            version.freeze(records.parent / self.CODE)
            job = None
            for array in arrays:
                job = self._submit(array, job)
                say(f"Submitted job {job}: {array.trials} trials, its script and logs in {str(array.directory)!r}")
        finally:
            lock.release()
        say(f"Watch with: squeue --array --name={','.join(array.directory.name for array in arrays)}")
        say("or the command status of sweep.py. The same launch again submits what is neither done nor queued.")
        if args.wait:
            self._wait(trials, args, report)

    def commands(self, trials, args):
        code = pathlib.Path(args.output_dir).absolute() / self.CODE
        freeze = f"import pathlib, federated.version; federated.version.freeze(pathlib.Path({str(code)!r}))"
        commands = [f"cd {shlex.quote(str(version.HERE))}", shlex.join([sys.executable, "-c", freeze])]
        for array in self._arrays(trials, args):
            commands.append(shlex.join(["mkdir", "-p", str(array.directory)]))
            for name, content in array.files.items():
                commands.append(f"cat > {shlex.quote(str(array.directory / name))} <<'END_OF_FILE'\n{content}END_OF_FILE")
            words = (part if part == AFTER_JOB else shlex.quote(part) for part in array.command)
            commands.append(f"job=$({' '.join(words)}) && echo $job")
        return commands

    def _arrays(self, trials, args) -> list:
        """What is to be submitted: the trials by elements, and those in chunks that Slurm takes."""
        if args.host:
            raise UsageError("--host: a Slurm job runs the processes of a trial on one node, which need no port")
        try:
            most = int(slurm.config("MaxArraySize"))
        except slurm.UnavailableError as error:
            raise UsageError(f"Slurm does not answer: {error}") from error
        elements = [trials[start : start + args.trials_per_job] for start in range(0, len(trials), args.trials_per_job)]
        chunks = [elements[start : start + most] for start in range(0, len(elements), most)]
        output_dir = pathlib.Path(args.output_dir).absolute()
        launch = f"sweep-{datetime.datetime.now():%Y%m%d-%H%M%S-%f}"
        needs = self._needs(trials, args)
        arrays = []
        for number, chunk in enumerate(chunks):
            directory = output_dir / self.RECORDS / f"{launch}-{number:03d}"
            limit = f"%{args.jobs}" if args.jobs else ""
            command = [
                *("sbatch", "--parsable", *(args.slurm_args or [])),
                *([AFTER_JOB] if args.jobs and number else []),  # the limit is one of each array
                f"--job-name={directory.name}",
                f"--array=0-{len(chunk) - 1}{limit}",
                f"--output={str(directory / '%A_%a.log').replace('%', '%%').replace('%%A_%%a', '%A_%a')}",
                str(directory / self.SCRIPT),
            ]
            lines = [json.dumps([described(trial, args.output_dir) for trial in element]) + "\n" for element in chunk]
            files = {self.SCRIPT: self._script(directory, needs, args), self.LIST: "".join(lines)}
            arrays.append(Array(directory, files, command, sum(map(len, chunk))))
        return arrays

    def _needs(self, trials, args) -> str:
        """The options of sbatch for what a job needs."""
        cpus, memory = 0, 0
        for trial in trials:
            processes = client_processes(trial, args, 1, [])
            cpus = max(cpus, processes * trial.settings.threads)
            # The server, the job itself and what it forks from: some clusters count what they share for each of them.
            memory = max(memory, (processes + 3) * PROCESS_BYTES)
        return f"--cpus-per-task={cpus} --mem={memory >> 20}M"

    def _script(self, directory, needs, args) -> str:
        args = argparse.Namespace(**vars(args) | {"data_dir": os.path.abspath(args.data_dir)})
        command = [sys.executable, str(directory.parent.parent / self.CODE / version.CODE / "slurm_job.py")]
        command += ["--trials", str(directory / self.LIST), *command_line(add_trial_arguments, args)]
        return f"""#!/bin/bash
# An array of sweep.py's launcher slurm: element K runs the trials of line K + 1 of {self.LIST}, with the code as it was at
# the launch. The signal comes before the time limit; what is asked for here --slurm_args overrides.
#SBATCH --nodes=1 --ntasks=1 {needs}
#SBATCH --signal=B:TERM@60 --requeue --open-mode=append
exec {shlex.join(command)}
"""

    def _submit(self, array, previous) -> str:
        array.directory.mkdir()
        for name, content in array.files.items():
            (array.directory / name).write_text(content)
        try:
            return slurm.submit([part.replace("$job", previous) if part == AFTER_JOB else part for part in array.command])
        except UsageError:
            self._remove(array.directory)
            raise

    def _wait(self, trials, args, report):
        waiting = {trial.directory: trial for trial in trials}
        failures = {trial.directory: len(trial.failures()) for trial in trials}
        ended = set()
        while waiting:
            time.sleep(WAIT_SECONDS)
            try:
                held = self.held(pathlib.Path(args.output_dir))
            except UsageError as error:
                say(f"{error}; waiting")
                continue
            for directory, trial in list(waiting.items()):
                if trial.is_done():
                    report(waiting.pop(directory), True)
                elif directory in held and held[directory].is_active():
                    ended.discard(directory)
                elif directory not in ended:
                    ended.add(directory)  # a file that was written on another host may take a moment to be seen
                else:
                    told = held[directory].told if directory in held else "its job is gone"
                    outcome = Failure("server", told)
                    if len(trial.failures()) > failures[directory]:
                        last = trial.failures()[-1]
                        outcome = Failure(last["role"], last["reason"], log=last["log"])
                    report(waiting.pop(directory), outcome)

    def held(self, output_dir):
        listed, logs = {}, {}
        for record in self._records(output_dir):
            for index, line in enumerate((record / self.LIST).read_text().splitlines()):
                element = json.loads(line)
                listed.update(
                    dict.fromkeys((output_dir / each["directory"] for each in element), (record, index, len(element)))
                )
            for log in record.glob("*_*.log"):
                logs[record, int(log.stem.partition("_")[2])] = log
        if not listed:
            return {}
        try:
            known = slurm.elements(sorted({record.name for record, _, _ in listed.values()}))
        except slurm.UnavailableError as error:
            raise UsageError(
                f"Slurm does not answer ({error}), and trials may be queued there: ask again once it does, or where no job is "
                f"left, remove {str(output_dir / self.RECORDS)!r}"
            ) from error
        held, errors_in = {}, functools.cache(slurm.last_errors)  # of the many trials of a job
        for directory, (record, index, size) in listed.items():
            element, log = known.get((record.name, index)), logs.get((record, index))
            if element is not None and element.state not in slurm.ENDED:
                held[directory] = self._held(directory, element, size)
            elif element is not None or log is not None:
                held[directory] = self._ended(directory, element, log, errors_in(log) if log is not None else [])
        return held

    def _held(self, directory, element, size):
        """Of a trial in an element of `size` trials that has not ended."""
        if element.state not in slurm.RUNNING:
            return Held(element.job, QUEUED, f"job {element.job} is queued: {element}")
        if size == 1 or read_lock(directory) is not None:
            return Held(element.job, RUNNING, f"job {element.job} runs it")
        return Held(element.job, QUEUED, f"job {element.job} runs other trials first")

    def _ended(self, directory, element, log, errors):
        """Of a trial whose job ended, with the `errors` in its log. `element` is None once Slurm has forgotten the job, `log`
        where it never ran."""
        job = element.job if element is not None else log.stem
        # How its processes ended tells more than that the job did by itself.
        if (directory / FAILED).exists() and not errors and (element is None or element.is_plain()):
            return Held(job, INCOMPLETE, "")
        told = [str(element)] * (element is not None) + errors or [f"see {str(log)!r}"]
        return Held(job, INCOMPLETE, f"job {job} ended: {'; '.join(told)}")

    def cancel(self, held):
        try:
            slurm.cancel(sorted({each.job for each in held}))
        except slurm.UnavailableError as error:
            raise UsageError(f"Slurm does not cancel all jobs ({error}): nothing was deleted") from error

    def tidy(self, output_dir):
        for record in self._records(output_dir):
            lines = map(json.loads, (record / self.LIST).read_text().splitlines())
            if not any((output_dir / each["directory"]).exists() for element in lines for each in element):
                self._remove(record)
        scripts = [(record / self.SCRIPT).read_text() for record in self._records(output_dir)]
        for code in (output_dir / self.CODE).glob("*"):
            if not any(code.name in script for script in scripts):
                shutil.rmtree(code)
        for name in (self.RECORDS, self.CODE):
            with contextlib.suppress(OSError):
                (output_dir / name).rmdir()

    def _records(self, output_dir):
        """The directories of the arrays that were submitted, the first one first."""
        return sorted(path.parent for path in (output_dir / self.RECORDS).glob(f"sweep-*/{self.LIST}"))

    def _remove(self, record):
        for path in [record / self.SCRIPT, record / self.LIST, *record.glob("*_*.log")]:
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            record.rmdir()


# Takes the place of the id of the array before
AFTER_JOB = "--dependency=afterany:$job"

WAIT_SECONDS = 2.0  # between two looks at the queue


@dataclasses.dataclass(frozen=True)
class Array:
    """A job array to submit."""

    directory: pathlib.Path
    files: dict[str, str]  # their contents by name, in the directory
    command: list[str]
    trials: int


REGISTRY = {
    "local_sequential": LocalSequential(),
    "local_parallel": LocalParallel(),
    "slurm": Slurm(),
    "dry_run": DryRun(),
}


def words(text):
    """Words as a shell would split them."""
    try:
        text.encode()
        if "\0" in text:
            raise ValueError("it has a NUL")
        return shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not what a shell splits into words: {error}") from error


def described(trial, output_dir) -> dict:
    """A trial for a list of them."""
    return dataclasses.asdict(trial) | {"directory": str(trial.directory.relative_to(output_dir))}


def listed_trials(path: pathlib.Path, line: int) -> list[Trial]:
    """The trials of a line, counted from 0, of the list at OUTPUT_DIR/*/*/LIST."""
    trials = json.loads(path.read_text().splitlines()[line])
    output_dir = path.parent.parent.parent
    return [
        Trial(**each | {"settings": Settings(**each["settings"]), "directory": output_dir / each["directory"]})
        for each in trials
    ]


def check_writable(trials):
    """Raises UsageError where the sweeps cannot write their files, before any trial is started."""
    for sweep_dir, settings in {trial.directory.parent.parent: trial.settings for trial in trials}.items():
        try:
            write_sweep_file(sweep_dir, settings)
            with tempfile.TemporaryFile(dir=sweep_dir):
                pass
        except OSError as error:
            raise UsageError(
                f"--output_dir: {str(sweep_dir)!r} cannot be written to ({error.strerror}): name another"
            ) from error


def check_open_files(jobs=0, processes=0):
    """Raises UsageError where `jobs` trials at once, of so many client processes each, need more than may be open: the
    process to fork from would end in the middle of a sweep. A trial has its lock, each of its processes two pipes."""
    needed, most = 32 + jobs * (1 + 2 * (1 + processes)), resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if most < needed:
        raise UsageError(
            f"Too many open files: {jobs} trials at once need {needed}, of {most}: raise `ulimit -n` or lower --jobs"
        )


def preload(trials, more=()):
    """Have trials fork from a process that has imported what they need, and the modules `more`."""
    check_open_files()
    modules = dict.fromkeys(
        ("server_benchmark", "client_benchmark", "federated.running.rounds", "federated.learning.worker", *more)
    )
    for trial in trials:
        modules[algorithms.load(trial.settings.algorithm).__module__] = None
        modules.update(dict.fromkeys(models.imports_of(trial.settings.model_arch)))
    Warm.preload(list(modules))


def device_of(gpus, place) -> dict[str, str]:
    """The environment that shows a trial its own GPU, if there are any. `place` counts the trials that run at once."""
    return {"CUDA_VISIBLE_DEVICES": gpus[place % len(gpus)]} if gpus else {}


def client_processes(trial, args, jobs, gpus):
    """Of a trial: as asked for, else one on a GPU, else one a participant up to the trial's share of the cores."""
    settings = trial.settings
    share = 1 if gpus else max(1, machine.cores() // (jobs * settings.threads))
    return min(args.client_processes or share, settings.participants)


def say(text):
    print(text, file=sys.stderr, flush=True)
