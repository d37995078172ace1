"""Trial lock: keeps a live trial from being started twice or deleted.

The launcher acquires it, and the server process that it starts inherits it. The kernel frees a lock once the last process that
has it is gone, whatever killed it. So wherever a holder's lock would be seen, the kernel says whether it lives: host names and
process ids may be the same in two containers.
"""

import contextlib
import dataclasses
import errno
import fcntl
import functools
import json
import os
import pathlib
import socket
import subprocess
import time
import typing
import uuid

from federated import slurm
from federated.files import open_regular

LOCK = "lock"  # the file in the trial's directory
_MAX_BYTES = 1 << 16  # of what is read of it
_BOOT_ID = pathlib.Path("/proc/sys/kernel/random/boot_id")
# File systems that only one kernel can mount at a time, in the words of stat(1)
_ONE_KERNEL = {"ext2/ext3", "xfs", "btrfs", "zfs", "f2fs", "bcachefs", "overlayfs"}


@functools.cache
def _boot() -> str:
    """The id of the kernel that runs now; another one after each boot, the same in all its containers."""
    try:
        return _BOOT_ID.read_text().strip()
    except FileNotFoundError:  # macOS
        return subprocess.run(
            ["sysctl", "-n", "kern.bootsessionuuid"], capture_output=True, text=True, check=True
        ).stdout.strip()


@dataclasses.dataclass(frozen=True)
class Owner:
    """The process that holds a lock, as the lock's file says it.

    host    with its Slurm job, as slurm.here() says it
    boot    its kernel; None if an earlier version of this project wrote the file
    device  the file system, by the number that its kernel gave it
    since   when it acquired the lock, by its clock
    id      random: the lock's, which the process that inherits it keeps
    """

    host: str
    pid: int
    boot: str | None = None
    device: int | None = dataclasses.field(default=None, compare=False)
    since: str | None = dataclasses.field(default=None, compare=False)
    id: str | None = dataclasses.field(default=None, compare=False)

    @classmethod
    def this_process(cls) -> "Owner":
        """This process, equal to what its locks' files say."""
        return cls(slurm.here(), os.getpid(), _boot())

    def is_seen(self, file: typing.IO) -> bool:
        """Whether the kernel's lock of `file` is seen here while this owner has it: with the same kernel, unless each has
        mounted the directory by itself."""
        return (self.boot, self.device) == (_boot(), os.fstat(file.fileno()).st_dev)

    def is_gone(self) -> bool:
        """True only if Slurm knows that this process is dead."""
        if self.boot == _boot() and self.host == slurm.here():
            return False  # also in this Slurm job
        return slurm.is_over(self.host)

    def was_before_boot(self, path: pathlib.Path) -> bool:
        """Whether this process, whose lock's file is at `path`, ran on this host before it was booted. The same name on a disk
        of its own makes it sure."""
        if self.boot in (None, _boot()) or slurm.host_of(self.host) != socket.gethostname():
            return False
        command = ["stat", "--file-system", "--format=%T", "--", str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() in _ONE_KERNEL

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" + (f" since {self.since}" if self.since else "")


_UNNAMED = Owner("an unknown host", 0)  # it has just acquired the lock


class LockedError(Exception):
    """Another live process holds the trial."""


def read_lock(directory: pathlib.Path) -> Owner | None:
    """The owner that the lock's file in `directory` names; None if there is none."""
    try:
        with open_regular(directory / LOCK) as file:
            return _owner_in(file)
    except OSError:
        return None


def holder(directory: pathlib.Path) -> str | None:
    """The process that holds the lock in `directory` and may live, and what to do if nothing shows from here that it does; None
    if there is none."""
    try:
        with open_regular(directory / LOCK) as file:
            return _holder(file, directory / LOCK, _is_locked(file))
    except OSError:
        return None


def is_held(directory: pathlib.Path) -> bool:
    """True if a process that may live holds the lock in `directory`."""
    return holder(directory) is not None


def _holder(file: typing.IO, path: pathlib.Path, is_locked: bool) -> str | None:
    """As `holder`, of the lock's `file` at `path`; `is_locked` says whether another process has the kernel's lock of it."""
    owner = _owner_in(file)
    if owner is None:
        return str(_UNNAMED) if is_locked else None
    if owner.is_seen(file):
        return str(owner) if is_locked else None
    if owner.is_gone() or (not is_locked and owner.was_before_boot(path)):
        return None
    if is_locked:
        return str(owner)
    return f"{owner}, which cannot be seen from here: if you know that it is dead, use --take_over"


class Lock:
    """The lock of a trial's directory, held by this process, and by those that inherit its file descriptor."""

    def __init__(self, directory: pathlib.Path, inherited: int | None = None) -> None:
        """Acquire the lock, or take the one that this process has `inherited` as a file descriptor. Raises LockedError if
        another process that may live holds it."""
        self._directory = directory
        self._file = os.fdopen(inherited, "r+") if inherited is not None else _acquire(directory)
        before = _owner_in(self._file) if inherited is not None else None
        lock_id = uuid.uuid4().hex if before is None else before.id
        device, now = os.fstat(self.fileno()).st_dev, time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self._owner = dataclasses.replace(Owner.this_process(), device=device, since=now, id=lock_id)
        self._file.truncate(0)
        self._file.seek(0)
        self._file.write(json.dumps(dataclasses.asdict(self._owner)))
        self._file.flush()

    def fileno(self) -> int:
        return self._file.fileno()

    @property
    def id(self) -> str:
        """Random, and the same in the processes that inherit the lock."""
        assert self._owner.id is not None
        return self._owner.id

    def release(self, clean_up: typing.Callable[[], None] = lambda: None) -> None:
        """Run `clean_up` and remove the lock, unless another process has taken it over."""
        path = self._directory / LOCK
        if not path.exists():
            clean_up()
        elif (owner := read_lock(self._directory)) is not None and owner.id == self.id:
            clean_up()
            path.unlink(missing_ok=True)
        self._file.close()


def take_over(directory: pathlib.Path) -> None:
    """Remove the lock of a process that cannot be seen from here. Only the user can know that this process is dead."""
    with contextlib.suppress(FileNotFoundError), open_regular(directory / LOCK) as file:
        owner = _owner_in(file)
        if owner is not None and not owner.is_seen(file):
            (directory / LOCK).unlink()


def _acquire(directory: pathlib.Path) -> typing.TextIO:
    """The lock's file, made if missing, with the kernel's lock. Raises LockedError, or OSError if something else is there."""
    path = directory / LOCK
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    while True:
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(open(path, "a+"))
            is_locked = not try_lock(file)
            if (found := _holder(file, path, is_locked)) is not None:
                raise LockedError(f"{str(directory)!r} is being run by {found}")
            if is_at(file, path):
                if not is_locked:
                    stack.pop_all()
                    return file
                path.unlink(missing_ok=True)  # its owner is on a host that Slurm has given up


def try_lock(file: typing.IO) -> bool:
    """Acquire the kernel's lock of `file`. Returns False if another process has it."""
    while True:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        if _is_locked(file):
            return False  # else another process has only just looked whether it is locked


def _is_locked(file: typing.IO) -> bool:
    """Whether another process has the kernel's lock of `file`."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(file, fcntl.LOCK_UN)
    return False


def is_at(file: typing.IO, path: pathlib.Path) -> bool:
    """Whether `path` still names `file`, which another process may have removed."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _owner_in(file: typing.IO) -> Owner | None:
    file.seek(0)
    try:
        values = json.loads(file.read(_MAX_BYTES))
        return (
            None
            if not isinstance(values["host"], str)
            else Owner(**{field.name: values.get(field.name) for field in dataclasses.fields(Owner)})
        )
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
