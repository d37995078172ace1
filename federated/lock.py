"""Trial lock: keeps a live trial from being started twice or deleted.

The launcher acquires it and hands it over to the server process.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import re
import socket
import subprocess
import typing

from federated import slurm

LOCK = "lock"  # the file in the trial's directory


@dataclasses.dataclass(frozen=True)
class Owner:
    """The process that holds a lock."""

    host: str  # with its Slurm job, as slurm.here() says it
    pid: int
    started: str | None  # distinguishes it from a later process with the same pid

    @classmethod
    def this_process(cls) -> "Owner":
        return cls(slurm.here(), os.getpid(), process_start(os.getpid()))

    def is_remote(self) -> bool:
        return slurm.host_of(self.host) != socket.gethostname()

    def may_live(self) -> bool:
        """False only if the holder is known to be dead. On another host this can be known only through a Slurm job that has
        ended."""
        if self.is_remote():
            return not slurm.is_over(self.host)
        return process_start(self.pid) == self.started

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class LockedError(Exception):
    """Another live process holds the trial."""


def read_lock(directory: pathlib.Path) -> Owner | None:
    """The holder of the lock in `directory`; None if there is none."""
    try:
        with open(directory / LOCK) as file:
            return _owner_in(file)
    except OSError:
        return None


def is_held(directory: pathlib.Path) -> bool:
    """True if a process that may live holds the lock in `directory`."""
    owner = read_lock(directory)
    return owner is not None and owner.may_live()


def process_start(pid: int) -> str | None:
    """When the process `pid` of this host was started, in the system's own words; None if there is none."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
        if (fields := re.match(r".*\) (\S)(?: \S+){18} (\d+)", stat, re.DOTALL)) is not None:
            state, start = fields.groups()
            return None if state in "ZX" else start
    except FileNotFoundError:
        if os.path.exists("/proc/self/stat"):
            return None
    except ProcessLookupError:
        return None
    listed = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return listed.stdout.strip() or None


class Lock:
    """The lock of a trial's directory, held by this process."""

    def __init__(self, directory: pathlib.Path, launcher_pid: int | None = None) -> None:
        """Acquire the lock. Raises LockedError if another live process holds it, unless that is `launcher_pid`, which acquired
        it for this process."""
        self._directory, self._owner = directory, Owner.this_process()
        with _open_lock(directory) as file:
            owner = _owner_in(file)
            is_handed_over = owner is not None and (owner.host, owner.pid) == (self._owner.host, launcher_pid)
            if owner is not None and owner.may_live() and not is_handed_over:
                raise LockedError(f"{str(directory)!r} is being run by {owner}")
            file.truncate(0)
            file.write(json.dumps(dataclasses.asdict(self._owner)))

    def release(self, clean_up: typing.Callable[[], None] = lambda: None) -> None:
        """Run `clean_up` and remove the lock, unless it was handed over to a process that is still alive."""
        if not (self._directory / LOCK).exists():
            clean_up()
            return
        with _open_lock(self._directory) as file:
            owner = _owner_in(file)
            if owner is None or owner == self._owner or not owner.may_live():
                clean_up()
                (self._directory / LOCK).unlink(missing_ok=True)


def take_over(directory: pathlib.Path) -> None:
    """Remove the lock of a process on another host. Only the user can know that this process is dead."""
    owner = read_lock(directory)
    if owner is not None and owner.is_remote():
        with _open_lock(directory) as file:
            if _owner_in(file) == owner:
                (directory / LOCK).unlink()


@contextlib.contextmanager
def _open_lock(directory: pathlib.Path) -> typing.Iterator[typing.TextIO]:
    """The lock file, made if missing, held so that one process at a time reads and changes it. POSIX record locks work on
    network file systems too."""
    while True:
        with open(directory / LOCK, "a+") as file:
            fcntl.lockf(file, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):  # removed while this process waited
                if os.path.samestat(os.fstat(file.fileno()), os.stat(directory / LOCK)):
                    yield file
                    return


def _owner_in(file: typing.TextIO) -> Owner | None:
    file.seek(0)
    try:
        return Owner(**json.load(file))
    except (ValueError, TypeError):
        return None
