"""The launcher slurm: arrays of Slurm jobs. An element is a job on one node that runs its trials as local_parallel does.

OUTPUT_DIR/.slurm/<job name>/job.sh         an array, as sbatch got it
…/trials.jsonl                              the trials of its element k in line k + 1
…/<array job id>_<k>.log                    what element k printed
OUTPUT_DIR/.slurm/<job name>/launch.json    instead of trials.jsonl: the launch of the next rung, an array of one element
OUTPUT_DIR/.code/<version.code()>/          the code it runs

Which jobs there are is asked of Slurm by their names, so that nothing here can contradict it. Whether a trial is done its own
files say.
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import json
import os
import pathlib
import shlex
import shutil
import sys
import time
import typing

from federated import slurm, version
from federated.files import read_regular
from federated.lock import Lock, LockedError, read_lock
from federated.options import UsageError, command_words, integer, option, say, shown
from federated.running import resources, snapshot
from federated.running.launcher import PROCESS_BYTES, Launcher, QueuedLaunch, QueuedTrial, check_writable, client_processes
from federated.running.supervisor import Done, Failure, ReportOutcome
from federated.settings import RunOptions, Settings
from federated.trial import FAILED, INCOMPLETE, QUEUED, RUNNING, Trial

RECORDS, CODE = ".slurm", ".code"  # below the output directory
SCRIPT, LIST, LAUNCH = "job.sh", "trials.jsonl", "launch.json"
RESUMES = ("--requeue", "--open-mode=append")
WAIT_SECONDS = 2.0  # between two polls of the queue
LOCK_SECONDS = 600.0  # a launch that has begun to submit its jobs is done by then


def words(text: str) -> str:
    """Words that a shell can split."""
    try:
        text.encode()
        if "\0" in text:
            raise ValueError("it has a NUL")
        shlex.split(text)
        return text
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not what a shell splits into words: {error}") from error


@dataclasses.dataclass(frozen=True)
class SlurmOptions:
    slurm_args: str | None = option(None, words, "slurm: sbatch's options, as in --slurm_args='--time=2:00:00'", metavar="ARGS")
    trials_per_job: int = option(1, integer(1, 100_000), "slurm: trials of a job")
    wait: bool = option(False, None, "slurm: block until the trials have ended, and report each")


@dataclasses.dataclass(frozen=True)
class Array:
    """A job array to submit."""

    directory: pathlib.Path
    files: dict[str, str]  # their contents by name, in the directory
    command: list[str]
    what: str  # it does
    after: str = ""  # the arrays that have to end before, as a shell that has submitted them knows their ids

    def command_after(self, ids: str) -> list[str]:
        """The command, if it has to wait for the arrays of these `ids`, each after a colon."""
        return [*self.command[:-1], *([f"--dependency=afterany{ids}"] if ids else []), self.command[-1]]

    def shell_commands(self) -> list[str]:
        """What submits it in a shell."""
        commands = [shlex.join(["mkdir", "-p", str(self.directory)])]
        for name, content in self.files.items():
            commands.append(f"cat > {shlex.quote(str(self.directory / name))} <<'END_OF_FILE'\n{content}END_OF_FILE")
        *before, last = self.command_after("")
        words = [shlex.join(before), *([f"--dependency=afterany{self.after}"] if self.after else []), shlex.quote(last)]
        return [*commands, f"job=$({' '.join(words)}) && jobs=$jobs:$job && echo $job"]


class Slurm(Launcher):
    """See the top of this file."""

    Options = SlurmOptions

    def launch(self, trials: list[Trial], output_dir: pathlib.Path, run: RunOptions, report: ReportOutcome) -> None:
        arrays = self._arrays(trials, output_dir, run)  # raises UsageError before anything is made
        check_writable(trials)
        with self._alone(output_dir) as records:
            queued = self.queued(output_dir)
            left = [trial for trial in trials if trial.directory not in queued or not queued[trial.directory].is_active()]
            if len(left) < len(trials):
                say(f"{len(trials) - len(left)} of these trials were submitted by another launch just now.")
                arrays = self._arrays(left, output_dir, run)
            snapshot.take(records.parent / CODE)
            job = ""
            for array in arrays:
                job = self._submit(array, f":{job}" if array.after else "")
        if arrays:
            say(f"Watch with: squeue --array --name={','.join(array.directory.name for array in arrays)}")
        say("or the command status of sweep.py. The same launch again submits what is neither done nor queued.")
        if self.options.wait:
            self._wait(trials, output_dir, report)

    @contextlib.contextmanager
    def _alone(self, output_dir: pathlib.Path) -> typing.Iterator[pathlib.Path]:
        """While no other launch submits jobs: the directory of what was submitted. Raises UsageError if another does; in a job,
        where nobody would try again, only if that takes long."""
        records = output_dir.absolute() / RECORDS
        records.mkdir(exist_ok=True)
        deadline = time.monotonic() + (LOCK_SECONDS if slurm.JOB_VARIABLE in os.environ else 0)
        while True:
            try:
                lock = Lock(records)
                break
            except LockedError as error:
                if time.monotonic() > deadline:
                    raise UsageError(f"another launch submits jobs just now: {error}") from error
                time.sleep(0.1)
        try:
            yield records
        finally:
            lock.release()

    def commands(self, trials: list[Trial], output_dir: pathlib.Path, run: RunOptions) -> list[str]:
        code = output_dir.absolute() / CODE
        freeze = f"import pathlib; from federated import extension; extension.load({run.extension!r}); "
        freeze += f"from federated.running import snapshot; snapshot.take(pathlib.Path({str(code)!r}))"
        commands = [f"cd {shlex.quote(str(version.HERE))}", shlex.join([sys.executable, "-c", freeze]), "jobs="]
        return commands + [line for array in self._arrays(trials, output_dir, run) for line in array.shell_commands()]

    def next_commands(self, output_dir: pathlib.Path, next_launch: QueuedLaunch) -> list[str]:
        return [] if self.options.wait else self._next_launch(output_dir, next_launch).shell_commands()

    def launch_next(self, output_dir: pathlib.Path, next_launch: QueuedLaunch) -> bool:
        if self.options.wait:
            return False
        with self._alone(output_dir) as records:
            if not self._is_carried_on(self.next_launches(output_dir), next_launch):
                queued = self.queued(output_dir).items()
                active = {
                    each.job for path, each in queued if each.is_active() and path.parent.parent.name in next_launch.sweeps
                }
                snapshot.take(records.parent / CODE)
                arrays = sorted({job.partition("_")[0] for job in active})
                self._submit(self._next_launch(output_dir, next_launch), "".join(f":{array}" for array in arrays))
        return True

    @staticmethod
    def _is_carried_on(launches: list[QueuedLaunch], next_launch: QueuedLaunch) -> bool:
        """Whether other queued launches do what `next_launch` would: those that came after the one that this process runs, else
        those of the same command line."""
        this = next((number for number, each in enumerate(launches) if each.is_this), None)
        if this is None:  # one that runs already may have looked before
            others = [each for each in launches if each.state == QUEUED and each.words == next_launch.words]
        else:
            others = [each for each in launches[this + 1 :] if each.is_active()]
        return next_launch.sweeps <= {sweep for each in others for sweep in each.sweeps}

    def _next_launch(self, output_dir: pathlib.Path, next_launch: QueuedLaunch) -> Array:
        """The job that runs a launch."""
        directory = output_dir.absolute() / RECORDS / f"next-{_now()}"
        known = {
            "words": next_launch.words,
            "sweeps": sorted(next_launch.sweeps),
            "begun": sorted([str(path.relative_to(output_dir)), rounds] for path, rounds in next_launch.begun),
        }
        size = ["--nodes=1", "--ntasks=1", "--cpus-per-task=1", f"--mem={2 * PROCESS_BYTES >> 20}M"]
        command = [
            *("sbatch", "--parsable", *_without_sizes(self._sbatch_options()), *size, *RESUMES),
            *_named(directory, "0"),
        ]
        what = "launches the next rung"
        script = self._script(directory, {"launch": directory / LAUNCH}, f"its only element {what}")
        return Array(directory, {SCRIPT: script, LAUNCH: json.dumps(known) + "\n"}, command, what, "$jobs")

    def _arrays(self, trials: list[Trial], output_dir: pathlib.Path, run: RunOptions) -> list[Array]:
        """What is to be submitted: the trials by elements, and those in chunks that Slurm takes."""
        if run.host:
            raise UsageError("--host: a Slurm job runs the processes of a trial on one node, which need no port")
        if "\\" in str(output_dir.absolute()):  # with one in it, Slurm fills in no job id in the name of a log
            raise UsageError(f"--output_dir: Slurm takes the backslash in {str(output_dir)!r} for its own: name another")
        try:
            max_elements = int(slurm.config("MaxArraySize"))
        except slurm.UnavailableError as error:
            raise UsageError(f"Slurm does not answer: {error}") from error
        size = self.options.trials_per_job
        elements = [trials[start : start + size] for start in range(0, len(trials), size)]
        chunks = [elements[start : start + max_elements] for start in range(0, len(elements), max_elements)]
        launch = f"sweep-{_now()}"
        needs = self._needs(trials, run) if trials else []
        arrays = []
        for number, chunk in enumerate(chunks):
            directory = output_dir.absolute() / RECORDS / f"{launch}-{number:03d}"
            command = [
                # The environment (SBATCH_...) overrides what a script asks for, but not what stands here.
                *("sbatch", "--parsable", *needs, *self._sbatch_options()),
                *_named(directory, f"0-{len(chunk) - 1}" + (f"%{run.jobs}" if run.jobs else "")),
            ]
            lines = [json.dumps([_to_json(trial, output_dir) for trial in element]) + "\n" for element in chunk]
            there = dataclasses.replace(run, data_dir=os.path.abspath(run.data_dir), jobs=None)  # the array limits jobs
            options = {"trials": directory / LIST, **dataclasses.asdict(there)}
            script = self._script(directory, options, f"element K runs the trials of line K + 1 of {LIST}")
            files = {SCRIPT: script, LIST: "".join(lines)}
            after = ":$job" if run.jobs and number else ""  # the limit is one of each array
            arrays.append(Array(directory, files, command, f"{sum(map(len, chunk))} trials", after))
        return arrays

    def _sbatch_options(self) -> list[str]:
        """Those of the user."""
        return shlex.split(self.options.slurm_args or "")

    def _needs(self, trials: list[Trial], run: RunOptions) -> list[str]:
        """The options of sbatch for what a job needs, which --slurm_args overrides."""
        cpus, memory, cores = 0, 0, resources.cores()
        for trial in trials:
            processes = client_processes(trial, run, 1, [], cores)
            cpus = max(cpus, processes * trial.settings.threads)
            # The server, the job and the fork server: some clusters count shared memory for each of them.
            memory = max(memory, (processes + 3) * PROCESS_BYTES)
        size = ["--nodes=1", "--ntasks=1", f"--cpus-per-task={cpus}", f"--mem={memory >> 20}M"]
        return [*size, "--signal=B:TERM@60", *RESUMES]  # the signal comes before the time limit

    def _script(self, directory: pathlib.Path, options: dict[str, typing.Any], what: str) -> str:
        """The script of an array: slurm_job.py with `options`."""
        code = directory.parent.parent / CODE / version.code()
        command = [sys.executable, str(code / "slurm_job.py")]
        command += command_words(options | {"extension": snapshot.extensions(code)})
        return f"""#!/bin/bash
# An array of sweep.py's launcher slurm: {what}, with the code as it was at the launch.
exec {shlex.join(command)}
"""

    def _submit(self, array: Array, after: str) -> str:
        """Submit it, to run after the arrays of these ids. Returns its id."""
        array.directory.mkdir()
        for name, content in array.files.items():
            (array.directory / name).write_text(content)
        try:
            job = slurm.submit(array.command_after(after))
        except UsageError:
            _remove(array.directory)
            raise
        say(f"Submitted job {job}: {array.what}, its script and logs in {str(array.directory)!r}")
        return job

    def _wait(self, trials: list[Trial], output_dir: pathlib.Path, report: ReportOutcome) -> None:
        waiting = {trial.directory: trial for trial in trials}
        failures = {trial.directory: len(trial.failures()) for trial in trials}
        ended: set[pathlib.Path] = set()
        queued: dict[pathlib.Path, QueuedTrial] = {}
        while waiting:
            queued = self._poll(output_dir)
            for directory, trial in list(waiting.items()):
                if trial.is_done():
                    report(waiting.pop(directory), Done())
                elif directory in queued and queued[directory].is_active():
                    ended.discard(directory)
                elif directory not in ended:
                    ended.add(directory)  # a file that was written on another host may take a moment to be seen
                else:
                    detail = queued[directory].detail if directory in queued else "its job is gone"
                    outcome = Failure("server", detail)
                    if len(trial.failures()) > failures[directory]:
                        last = trial.failures()[-1]
                        outcome = Failure(last["role"], last["reason"], log=last["log"])
                    report(waiting.pop(directory), outcome)
        # A trial is done a moment before its job has ended, and halving's next rung launches it again.
        directories = {trial.directory for trial in trials}
        while any(found.is_active() for directory, found in queued.items() if directory in directories):
            queued = self._poll(output_dir)

    def _poll(self, output_dir: pathlib.Path) -> dict[pathlib.Path, QueuedTrial]:
        """The queue a while later, as soon as Slurm answers."""
        while True:
            time.sleep(WAIT_SECONDS)
            try:
                return self.queued(output_dir)
            except UsageError as error:
                say(f"{error}; waiting")

    def queued(self, output_dir: pathlib.Path) -> dict[pathlib.Path, QueuedTrial]:
        records = _records(output_dir)
        elements = [(record, index, each) for record in records for index, each in enumerate(_elements(record))]
        known = _elements_known(records, output_dir)
        logs = {(record, int(log.stem.partition("_")[2])): log for record in records for log in record.glob("*_*.log")}
        # Of several elements with a trial the last one counts, unless one is active: other hosts may have other clocks
        elements.sort(key=lambda element: _is_active(known.get((element[0].name, element[1]))))
        listed = {output_dir / path: (record, index, len(each)) for record, index, each in elements for path in each}
        queued, errors_in = {}, functools.cache(slurm.last_errors)  # of the many trials of a job
        for directory, (record, index, size) in listed.items():
            found, its_log = known.get((record.name, index)), logs.get((record, index))
            if found is not None and _is_active(found):
                queued[directory] = _active(directory, found, size)
            elif found is not None or its_log is not None:
                queued[directory] = _ended(directory, found, its_log, errors_in(its_log) if its_log is not None else [])
        return queued

    def next_launches(self, output_dir: pathlib.Path) -> list[QueuedLaunch]:
        records = sorted(path.parent for path in (output_dir / RECORDS).glob(f"next-*/{LAUNCH}"))
        known = _elements_known(records, output_dir)
        launches = []
        for record in records:
            found, log = known.get((record.name, 0)), next(record.glob("*_*.log"), None)
            job = found.job if found is not None else log.stem if log is not None else ""
            if found is not None and _is_active(found):
                state = RUNNING if found.state in slurm.RUNNING else QUEUED
                detail = f"job {job} launches it: {found}"
            else:
                state, how = INCOMPLETE, f" ({found})" if found is not None else ""
                name = f"job {job}" if job else "the job"
                detail = f"{name} that was to launch it has ended{how}: see {str(log or record)!r}, and launch again"
            launches.append(dataclasses.replace(_listed_launch(record), job=job, state=state, detail=detail))
        launches.sort(key=lambda launch: int(launch.job.partition("_")[0] or 0))
        this = slurm.this_element() if slurm.JOB_VARIABLE in os.environ else None
        return [dataclasses.replace(each, is_this=each.job == this) for each in launches]

    def cancel(self, queued: typing.Sequence[QueuedTrial]) -> None:
        try:
            slurm.cancel(sorted({each.job for each in queued}))
        except slurm.UnavailableError as error:
            raise UsageError(f"Slurm does not cancel all jobs ({error}): nothing was deleted") from error

    def tidy(self, output_dir: pathlib.Path) -> None:
        active = {path for path, each in self.queued(output_dir).items() if each.is_active()}  # it may have made nothing yet
        for record in _records(output_dir):
            paths = {output_dir / each for element in _elements(record) for each in element}
            if not paths & active and not any(path.exists() for path in paths):
                _remove(record)
        for launch in (output_dir / RECORDS).glob(f"next-*/{LAUNCH}"):
            if not any((output_dir / sweep).exists() for sweep in _listed_launch(launch.parent).sweeps):
                _remove(launch.parent)
        scripts = [_content(script) for script in (output_dir / RECORDS).glob(f"*/{SCRIPT}")]
        for code in (output_dir / CODE).glob("*"):
            if not any(code.name in script for script in scripts):
                shutil.rmtree(code)
        for name in (RECORDS, CODE):
            with contextlib.suppress(OSError):
                (output_dir / name).rmdir()


def _now() -> str:
    """The time, for names that sort by it."""
    return f"{datetime.datetime.now():%Y%m%d-%H%M%S-%f}"


def _named(directory: pathlib.Path, elements: str) -> list[str]:
    """The last words of an sbatch command: the name, the logs and the script of the array in `directory`."""
    logs = [f"--{stream}={str(directory).replace('%', '%%')}/%A_%a.log" for stream in ("output", "error")]
    return [f"--job-name={directory.name}", f"--array={elements}", *logs, str(directory / SCRIPT)]


def _without_sizes(words: list[str]) -> list[str]:
    """Options of sbatch without those for what trials need."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for short in ("-N --nodes", "-n --ntasks", "-c --cpus-per-task", "-G --gpus"):
        parser.add_argument(*short.split())
    names = (
        "cpus-per-gpu gpus-per-node gpus-per-socket gpus-per-task gres mem mem-per-cpu mem-per-gpu mincpus ntasks-per-node tmp"
    )
    for name in names.split():
        parser.add_argument(f"--{name}")
    parser.add_argument("--exclusive", nargs="?")
    return parser.parse_known_args(words)[1]


def _elements_known(records: list[pathlib.Path], output_dir: pathlib.Path) -> dict[tuple[str, int], slurm.Element]:
    """The elements of these arrays that Slurm still knows. Raises UsageError if it does not answer."""
    try:
        return slurm.elements([record.name for record in records]) if records else {}
    except slurm.UnavailableError as error:
        raise UsageError(
            f"Slurm does not answer ({error}), and trials may be queued there: ask again once it does, or if no job is "
            f"left, remove {str(output_dir / RECORDS)!r}"
        ) from error


def _is_active(element: slurm.Element | None) -> bool:
    """Whether an element has not ended."""
    return element is not None and element.state not in slurm.ENDED


def _active(directory: pathlib.Path, element: slurm.Element, size: int) -> QueuedTrial:
    """A trial in an element of `size` trials that has not ended."""
    if element.state not in slurm.RUNNING:
        return QueuedTrial(element.job, QUEUED, f"job {element.job} is queued: {element}")
    if size == 1 or read_lock(directory) is not None:
        return QueuedTrial(element.job, RUNNING, f"job {element.job} runs it")
    return QueuedTrial(element.job, QUEUED, f"job {element.job} runs other trials first")


def _ended(directory: pathlib.Path, element: slurm.Element | None, log: pathlib.Path | None, errors: list[str]) -> QueuedTrial:
    """A trial whose job ended, with the `errors` in its log. `element` is None once Slurm has forgotten the job, `log` if the
    job never ran."""
    job = element.job if element is not None else log.stem if log is not None else ""
    # failed.json says more than the job's state
    if (directory / FAILED).exists() and not errors and (element is None or element.is_plain()):
        return QueuedTrial(job, INCOMPLETE, "")
    details = [str(element)] * (element is not None) + errors or [f"see {str(log)!r}"]
    return QueuedTrial(job, INCOMPLETE, f"job {job} ended: {'; '.join(details)}")


def _records(output_dir: pathlib.Path) -> list[pathlib.Path]:
    """The directories of the arrays that were submitted, the first one first."""
    return sorted(path.parent for path in (output_dir / RECORDS).glob(f"sweep-*/{LIST}"))


def _elements(record: pathlib.Path) -> list[list[str]]:
    """The directories of the trials of each element of an array, below the output directory. Raises UsageError if its list
    cannot be read."""
    try:
        return [[each["directory"] for each in json.loads(line)] for line in _content(record / LIST).splitlines()]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UsageError(f"{str(record / LIST)!r} is no list of trials: if none of its jobs is left, remove it") from error


def _content(path: pathlib.Path) -> str:
    """The text of a file of the launcher. Raises UsageError if it cannot be read."""
    try:
        return read_regular(path, _MAX_BYTES).decode()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{str(path)!r} cannot be read ({reason}): if none of its jobs is left, remove it") from error


_MAX_BYTES = 1 << 30


def _remove(record: pathlib.Path) -> None:
    for path in [record / SCRIPT, record / LIST, record / LAUNCH, *record.glob("*_*.log")]:
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        record.rmdir()


def _to_json(trial: Trial, output_dir: pathlib.Path) -> dict:
    """A trial for a list of them. The sweep's file has the search space already."""
    directory = str(trial.directory.relative_to(output_dir))
    return dataclasses.asdict(dataclasses.replace(trial, space=None)) | {"directory": directory}


def listed_trials(path: pathlib.Path, line: int) -> list[Trial]:
    """The trials of a line, counted from 0, of the list at OUTPUT_DIR/RECORDS/<job name>/LIST."""
    trials = json.loads(_content(path).splitlines()[line])
    output_dir = path.parent.parent.parent
    return [
        Trial(**each | {"settings": Settings(**each["settings"]), "directory": output_dir / each["directory"]})
        for each in trials
    ]


def _listed_launch(record: pathlib.Path) -> QueuedLaunch:
    """What the directory of a launch says of it. Raises UsageError if it cannot be read."""
    try:
        known, output_dir = json.loads(_content(record / LAUNCH)), record.parent.parent
        begun = frozenset((output_dir / path, int(rounds)) for path, rounds in known["begun"])
        return QueuedLaunch("", INCOMPLETE, "", frozenset(known["sweeps"]), tuple(known["words"]), begun)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UsageError(f"{str(record / LAUNCH)!r} is no launch: if its job has ended, remove it") from error


def words_of_launch(path: pathlib.Path) -> list[str]:
    """The words of the command line that the list at OUTPUT_DIR/RECORDS/<job name>/LAUNCH holds."""
    return list(_listed_launch(path.parent).words)
