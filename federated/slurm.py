"""Slurm, asked by its own commands: sbatch, squeue, scancel and scontrol. Accounting is not needed."""

import dataclasses
import os
import pathlib
import re
import socket
import subprocess
import time

from federated.files import read_end
from federated.options import UsageError

# Set in the jobs of the slurm launcher: names the job and its cluster.
JOB_VARIABLE = "FEDERATED_SLURM_JOB"
_IN_JOB, _ON_CLUSTER = " in Slurm job ", " of cluster "

# States of squeue in which a job has processes, or no longer will have any; in all others it waits.
RUNNING = {"RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT"}
ENDED = {
    "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "BOOT_FAIL", "DEADLINE",
    "REVOKED",
}  # fmt: skip


# Variables that change what Slurm's commands do and print, or that belong to a job this process is in. SBATCH_ACCOUNT and
# others of sbatch stay: they are how users say where their jobs run.
_FOREIGN = re.compile("(SQUEUE|SCANCEL|SCONTROL|SLURM)_.*|SBATCH_(CLUSTERS|WAIT|TEST_ONLY|DEBUG|IGNORE_PBS)")
_NEEDED = {"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT"}  # to reach Slurm at all


class UnavailableError(Exception):
    """Slurm does not answer."""


def _run(*command) -> str:
    """What a command of Slurm prints, whatever the user's environment has it do otherwise. Raises UnavailableError with its
    last line if it fails."""
    own = {name: value for name, value in os.environ.items() if name in _NEEDED or not _FOREIGN.fullmatch(name)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, env=own)
    except FileNotFoundError as error:
        raise UnavailableError(f"there is no {command[0]} in PATH") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"{command[0]} ended with exit code {done.returncode}"]
        raise UnavailableError(lines[-1])
    return done.stdout


def submit(command: list[str]) -> str:
    """Run an sbatch command with --parsable. Returns the job id. Raises UsageError if Slurm refuses the job."""
    try:
        return _run(*command).strip().partition(";")[0]
    except UnavailableError as error:
        raise UsageError(f"Slurm does not take the job: {error}") from error


@dataclasses.dataclass(frozen=True)
class Element:
    """An element of a job array."""

    job: str  # as ARRAY_INDEX
    state: str  # squeue's, such as PENDING
    reason: str  # squeue's, such as Priority; may be empty

    def __str__(self) -> str:
        return f"{self.state} ({self.reason})" if self.reason else self.state

    def is_plain(self) -> bool:
        """Whether it ended by itself, for good or bad."""
        return self.state in ("COMPLETED", "FAILED")


def elements(names: list[str]) -> dict[tuple[str, int], Element]:
    """{(job name, array index): element} of the jobs called `names` that Slurm still knows. Raises UnavailableError."""
    listed = _run(
        "squeue", "--all", "--noheader", "--array", "--states=all", f"--name={','.join(names)}", "--format=%F|%K|%T|%j|%r"
    )
    found = {}
    for line in listed.splitlines():
        array, index, state, name, reason = line.split("|", 4)
        found[name, int(index)] = Element(f"{array}_{index}", state, "" if reason == "None" else reason)
    return found


def cancel(jobs: list[str]) -> None:
    """Cancel elements, given as ARRAY_INDEX, and wait until they have ended. Raises UnavailableError if they do not."""
    refused = "they are still there"
    for start in range(0, len(jobs), 1000):  # as many as a command line takes
        try:
            _run("scancel", *jobs[start : start + 1000])
        except UnavailableError as error:  # also if an element has ended meanwhile
            refused = str(error)
    deadline = time.monotonic() + CANCEL_SECONDS
    while set(jobs).intersection(_run("squeue", "--all", "--noheader", "--array", "--format=%F_%K").split()):
        if time.monotonic() > deadline:
            raise UnavailableError(refused)
        time.sleep(0.5)


def requeue(job: str) -> None:
    """End an element, given as ARRAY_INDEX, and have it run again. Raises UnavailableError, as where it is not allowed to."""
    _run("scontrol", "requeue", job)


_TAIL_BYTES = 1 << 16  # of a log
CANCEL_SECONDS = 120.0  # a job gets half a minute to end by itself, unless the cluster's KillWait is another


def last_errors(log: pathlib.Path) -> list[str]:
    """The last errors of Slurm's daemons in the log of a job, such as an exceeded memory limit; empty if it is gone."""
    try:
        said = re.findall(r"^slurmstepd\S*: error: (.*)$", read_end(log, _TAIL_BYTES).decode(errors="replace"), re.MULTILINE)
    except OSError:
        return []
    return list(dict.fromkeys(reversed(said)))[1::-1]  # they repeat themselves


def config(name: str) -> str:
    """A value of the cluster's configuration. Raises UnavailableError."""
    for line in _run("scontrol", "show", "config").splitlines():
        key, _, value = line.partition("=")
        if key.strip() == name:
            return value.strip()
    raise UnavailableError(f"scontrol show config has no {name}")


def this_job() -> str:
    """The job that this process is part of, for JOB_VARIABLE."""
    return f"{os.environ['SLURM_JOB_ID']}{_ON_CLUSTER}{os.environ['SLURM_CLUSTER_NAME']}"


def this_element() -> str:
    """The array element that this process is, as ARRAY_INDEX."""
    return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"


def is_being_ended() -> bool:
    """Whether Slurm has begun to end the job that this process is part of, and so can say why."""
    try:
        return _run("squeue", "--all", "--noheader", "--format=%T", f"--jobs={this_element()}").strip() != "RUNNING"
    except UnavailableError:
        return False


def here() -> str:
    """This host, and the job of the slurm launcher in which this process is."""
    job = os.environ.get(JOB_VARIABLE)
    return socket.gethostname() + (_IN_JOB + job if job else "")


def host_of(place: str) -> str:
    """The host in a text that here() returned."""
    return place.partition(_IN_JOB)[0]


def is_over(place: str) -> bool:
    """True if the Slurm job of `place` (from another host, as here() said it) has ended or was requeued to this host; False if
    that is unknown."""
    job = place.partition(_IN_JOB)[2]
    if not job:
        return False
    if job == os.environ.get(JOB_VARIABLE):
        return True  # a job has one host at a time
    number, _, cluster = job.partition(_ON_CLUSTER)
    try:
        if config("ClusterName") != cluster:
            return False
        listed = _run("squeue", "--all", "--noheader", "--array", f"--states={','.join(sorted(RUNNING))}", "--format=%A")
    except UnavailableError:
        return False
    return number not in listed.split()
