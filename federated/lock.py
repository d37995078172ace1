"""The lock of a trial, so that a live one is neither run twice nor deleted: its server holds it, which gets it from who starts
the server."""

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import re
import socket
import subprocess

from federated import slurm

LOCK = "lock"  # the file in the trial's directory


@dataclasses.dataclass(frozen=True)
class Owner:
    """The process that holds a lock."""

    host: str  # and its Slurm job, as slurm.here() tells
    pid: int
    started: str  # tells it from a later process with the same pid

    @classmethod
    def this_process(cls):
        return cls(slurm.here(), os.getpid(), process_start(os.getpid()))

    def is_remote(self) -> bool:
        return slurm.host_of(self.host) != socket.gethostname()

    def may_live(self) -> bool:
        """False only where the owner is known to be dead: on another host, that is only known of Slurm jobs that ended."""
        if self.is_remote():
            return not slurm.is_over(self.host)
        return process_start(self.pid) == self.started

    def __str__(self):
        return f"process {self.pid} on {self.host}"


class Locked(Exception):
    """Another process holds the trial."""


def read_lock(directory: pathlib.Path) -> Owner | None:
    try:
        with open(directory / LOCK) as file:
            return _owner_in(file)
    except OSError:
        return None


def process_start(pid: int) -> str | None:
    """When the process `pid` of this host was started, in the system's own words; None where there is none."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
        state, start = re.match(r".*\) (\S)(?: \S+){18} (\d+)", stat, re.DOTALL).groups()
        return None if state in "ZX" else start
    except FileNotFoundError:
        if os.path.exists("/proc/self/stat"):
            return None
    except ProcessLookupError:
        return None
    listed = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return listed.stdout.strip() or None


class Lock:
    """Holds the lock of a trial's directory. Raises Locked where a process that may live holds it, unless that is `giver`,
    which has taken it to hand it on to this process."""

    def __init__(self, directory: pathlib.Path, giver: int | None = None):
        self._directory, self._owner = directory, Owner.this_process()
        with _open_lock(directory) as file:
            owner = _owner_in(file)
            given = owner is not None and (owner.host, owner.pid) == (self._owner.host, giver)
            if owner is not None and owner.may_live() and not given:
                raise Locked(f"{str(directory)!r} is being run by {owner}")
            file.truncate(0)
            file.write(json.dumps(dataclasses.asdict(self._owner)))

    def release(self, clean_up=lambda: None):
        """Call `clean_up` and remove the lock, if it was not handed on or who it was handed to is dead."""
        if not (self._directory / LOCK).exists():
            clean_up()
            return
        with _open_lock(self._directory) as file:
            owner = _owner_in(file)
            if owner is None or owner == self._owner or not owner.may_live():
                clean_up()
                (self._directory / LOCK).unlink(missing_ok=True)


def take_over(directory: pathlib.Path):
    """Remove the lock of a process on another host, of which only the user can know that it is dead."""
    owner = read_lock(directory)
    if owner is not None and owner.is_remote():
        with _open_lock(directory) as file:
            if _owner_in(file) == owner:
                (directory / LOCK).unlink()


@contextlib.contextmanager
def _open_lock(directory):
    """The lock file, made where it is missing, held so that one process at a time looks at it and changes it. POSIX record
    locks work on network file systems too."""
    while True:
        with open(directory / LOCK, "a+") as file:
            fcntl.lockf(file, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):  # removed while this process waited
                if os.path.samestat(os.fstat(file.fileno()), os.stat(directory / LOCK)):
                    yield file
                    return


def _owner_in(file) -> Owner | None:
    file.seek(0)
    try:
        return Owner(**json.load(file))
    except (ValueError, TypeError):
        return None
