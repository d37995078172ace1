"""The launcher slurm: arrays of Slurm jobs. An element is a job on one node that runs its trials as local_parallel does.

OUTPUT_DIR/.slurm/<job name>/job.sh         an array, as sbatch got it
…/trials.jsonl                              the trials of its element k in line k + 1
…/<array job id>_<k>.log                    what element k printed
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

from federated import slurm, version
from federated.files import read_regular
from federated.lock import Lock, LockedError, read_lock
from federated.options import UsageError, command_words, integer, option, say, shown
from federated.running import snapshot
from federated.running.launcher import PROCESS_BYTES, Launcher, QueuedTrial, check_writable, client_processes
from federated.running.supervisor import Done, Failure, Report
from federated.settings import RunOptions, Settings
from federated.trial import FAILED, INCOMPLETE, QUEUED, RUNNING, Trial

RECORDS, CODE = ".slurm", ".code"  # below the output directory
SCRIPT, LIST = "job.sh", "trials.jsonl"
AFTER_JOB = "--dependency=afterany:$job"  # takes the place of the id of the array before
WAIT_SECONDS = 2.0  # between two polls of the queue


def words(text: str) -> tuple[str, ...]:
    """Words as a shell would split them."""
    try:
        text.encode()
        if "\0" in text:
            raise ValueError("it has a NUL")
        return tuple(shlex.split(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not what a shell splits into words: {error}") from error


@dataclasses.dataclass(frozen=True)
class SlurmOptions:
    slurm_args: tuple[str, ...] | None = option(
        None, words, "slurm: sbatch's options, as in --slurm_args='--time=2:00:00'", metavar="ARGS"
    )
    trials_per_job: int = option(1, integer(1, 100_000), "slurm: trials of a job")
    wait: bool = option(False, None, "slurm: block until the trials have ended, and report each")


@dataclasses.dataclass(frozen=True)
class Array:
    """A job array to submit."""

    directory: pathlib.Path
    files: dict[str, str]  # their contents by name, in the directory
    command: list[str]
    trials: int


class Slurm(Launcher):
    """See the top of this file."""

    Options = SlurmOptions

    def launch(self, trials: list[Trial], output_dir: pathlib.Path, run: RunOptions, report: Report) -> None:
        arrays = self._arrays(trials, output_dir, run)  # raises UsageError before anything is made
        check_writable(trials)
        records = output_dir.absolute() / RECORDS
        records.mkdir(exist_ok=True)
        try:
            lock = Lock(records)
        except LockedError as error:
            raise UsageError(f"another launch submits jobs just now: {error}") from error
        try:
            queued = self.queued(output_dir)
            if any(trial.directory in queued and queued[trial.directory].is_active() for trial in trials):
                raise UsageError("another launch has submitted some of these trials just now: launch again")
            snapshot.take(records.parent / CODE)
            job = ""
            for array in arrays:
                job = self._submit(array, job)
                say(f"Submitted job {job}: {array.trials} trials, its script and logs in {str(array.directory)!r}")
        finally:
            lock.release()
        say(f"Watch with: squeue --array --name={','.join(array.directory.name for array in arrays)}")
        say("or the command status of sweep.py. The same launch again submits what is neither done nor queued.")
        if self.options.wait:
            self._wait(trials, output_dir, report)

    def commands(self, trials: list[Trial], output_dir: pathlib.Path, run: RunOptions) -> list[str]:
        code = output_dir.absolute() / CODE
        freeze = f"import pathlib; from federated import extension; extension.load({run.extension!r}); "
        freeze += f"from federated.running import snapshot; snapshot.take(pathlib.Path({str(code)!r}))"
        commands = [f"cd {shlex.quote(str(version.HERE))}", shlex.join([sys.executable, "-c", freeze])]
        for array in self._arrays(trials, output_dir, run):
            commands.append(shlex.join(["mkdir", "-p", str(array.directory)]))
            for name, content in array.files.items():
                commands.append(f"cat > {shlex.quote(str(array.directory / name))} <<'END_OF_FILE'\n{content}END_OF_FILE")
            quoted = (part if part == AFTER_JOB else shlex.quote(part) for part in array.command)
            commands.append(f"job=$({' '.join(quoted)}) && echo $job")
        return commands

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
        launch = f"sweep-{datetime.datetime.now():%Y%m%d-%H%M%S-%f}"
        needs = self._needs(trials, run)
        arrays = []
        for number, chunk in enumerate(chunks):
            directory = output_dir.absolute() / RECORDS / f"{launch}-{number:03d}"
            limit = f"%{run.jobs}" if run.jobs else ""
            command = [
                # The environment (SBATCH_...) overrides what a script asks for, but not what stands here.
                *("sbatch", "--parsable", *needs, *(self.options.slurm_args or ())),
                *([AFTER_JOB] if run.jobs and number else []),  # the limit is one of each array
                f"--job-name={directory.name}",
                f"--array=0-{len(chunk) - 1}{limit}",
                *(f"--{stream}={str(directory).replace('%', '%%')}/%A_%a.log" for stream in ("output", "error")),
                str(directory / SCRIPT),
            ]
            lines = [json.dumps([_to_json(trial, output_dir) for trial in element]) + "\n" for element in chunk]
            files = {SCRIPT: self._script(directory, run), LIST: "".join(lines)}
            arrays.append(Array(directory, files, command, sum(map(len, chunk))))
        return arrays

    def _needs(self, trials: list[Trial], run: RunOptions) -> list[str]:
        """The options of sbatch for what a job needs, which --slurm_args overrides."""
        cpus, memory = 0, 0
        for trial in trials:
            processes = client_processes(trial, run, 1, [])
            cpus = max(cpus, processes * trial.settings.threads)
            # The server, the job and the fork server: some clusters count shared memory for each of them.
            memory = max(memory, (processes + 3) * PROCESS_BYTES)
        size = ["--nodes=1", "--ntasks=1", f"--cpus-per-task={cpus}", f"--mem={memory >> 20}M"]
        return [*size, "--signal=B:TERM@60", "--requeue", "--open-mode=append"]  # the signal comes before the time limit

    def _script(self, directory: pathlib.Path, run: RunOptions) -> str:
        code = directory.parent.parent / CODE / version.code()
        data_dir, extension = os.path.abspath(run.data_dir), snapshot.extensions(code)
        there = dataclasses.replace(run, data_dir=data_dir, extension=extension, jobs=None)  # jobs are limited by the array
        command = [sys.executable, str(code / "slurm_job.py")]
        command += command_words({"trials": directory / LIST, **dataclasses.asdict(there)})
        return f"""#!/bin/bash
# An array of sweep.py's launcher slurm: element K runs the trials of line K + 1 of {LIST}, with the code as it was at
# the launch.
exec {shlex.join(command)}
"""

    def _submit(self, array: Array, previous: str) -> str:
        array.directory.mkdir()
        for name, content in array.files.items():
            (array.directory / name).write_text(content)
        try:
            return slurm.submit([part.replace("$job", previous) if part == AFTER_JOB else part for part in array.command])
        except UsageError:
            _remove(array.directory)
            raise

    def _wait(self, trials: list[Trial], output_dir: pathlib.Path, report: Report) -> None:
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
        listed, logs = {}, {}
        for record in _records(output_dir):
            for index, element in enumerate(_elements(record)):
                listed.update(dict.fromkeys((output_dir / each for each in element), (record, index, len(element))))
            for log in record.glob("*_*.log"):
                logs[record, int(log.stem.partition("_")[2])] = log
        if not listed:
            return {}
        try:
            known = slurm.elements(sorted({record.name for record, _, _ in listed.values()}))
        except slurm.UnavailableError as error:
            raise UsageError(
                f"Slurm does not answer ({error}), and trials may be queued there: ask again once it does, or if no job is "
                f"left, remove {str(output_dir / RECORDS)!r}"
            ) from error
        queued, errors_in = {}, functools.cache(slurm.last_errors)  # of the many trials of a job
        for directory, (record, index, size) in listed.items():
            found, its_log = known.get((record.name, index)), logs.get((record, index))
            if found is not None and found.state not in slurm.ENDED:
                queued[directory] = _active(directory, found, size)
            elif found is not None or its_log is not None:
                queued[directory] = _ended(directory, found, its_log, errors_in(its_log) if its_log is not None else [])
        return queued

    def cancel(self, queued: list[QueuedTrial]) -> None:
        try:
            slurm.cancel(sorted({each.job for each in queued}))
        except slurm.UnavailableError as error:
            raise UsageError(f"Slurm does not cancel all jobs ({error}): nothing was deleted") from error

    def tidy(self, output_dir: pathlib.Path) -> None:
        for record in _records(output_dir):
            if not any((output_dir / each).exists() for element in _elements(record) for each in element):
                _remove(record)
        scripts = [_content(record / SCRIPT) for record in _records(output_dir)]
        for code in (output_dir / CODE).glob("*"):
            if not any(code.name in script for script in scripts):
                shutil.rmtree(code)
        for name in (RECORDS, CODE):
            with contextlib.suppress(OSError):
                (output_dir / name).rmdir()


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
    for path in [record / SCRIPT, record / LIST, *record.glob("*_*.log")]:
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
