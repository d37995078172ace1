"""Trial lock: keeps a live trial from being started twice or deleted.

The launcher acquires it, and the server process that it starts inherits it. The kernel frees a lock once the last process that
has it is gone, whatever killed it. So a process that can see the holder's kernel lock knows from it whether the holder lives.
Host names and process ids would not do: two containers may have the same ones.
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
_MAX_BYTES = 1 << 16  # that are read of it
_BOOT_ID = pathlib.Path("/proc/sys/kernel/random/boot_id")
# File systems that only one kernel can mount at a time, as stat(1) names them
_ONE_KERNEL = {"ext2/ext3", "xfs", "btrfs", "zfs", "f2fs", "bcachefs", "overlayfs"}


@functools.cache
def _boot() -> str:
    """The boot id of the kernel: new after each boot, and the same in all containers."""
    try:
        return _BOOT_ID.read_text().strip()
    except FileNotFoundError:  # macOS
        return subprocess.run(
            ["sysctl", "-n", "kern.bootsessionuuid"], capture_output=True, text=True, check=True
        ).stdout.strip()


@dataclasses.dataclass(frozen=True)
class Holder:
    """The process that holds a lock, as the lock's file names it.

    host    its host and Slurm job, see slurm.here()
    boot    its kernel's boot id; None if an earlier version of this project wrote the file
    device  the file system's number in its kernel
    since   the time at which it acquired the lock, by its clock
    id      the lock's random id, which does not change when a process inherits the lock
    """

    host: str
    pid: int
    boot: str | None = None
    device: int | None = dataclasses.field(default=None, compare=False)
    since: str | None = dataclasses.field(default=None, compare=False)
    id: str | None = dataclasses.field(default=None, compare=False)

    @classmethod
    def this_process(cls) -> "Holder":
        """This process. It equals the holder that its locks' files name."""
        return cls(slurm.here(), os.getpid(), _boot())

    def is_seen(self, file: typing.IO) -> bool:
        """Whether this process can see the holder's kernel lock of `file`: both must have the same kernel and the same mount
        of the directory."""
        return (self.boot, self.device) == (_boot(), os.fstat(file.fileno()).st_dev)

    def is_gone(self) -> bool:
        """True only if Slurm knows that the holder is dead."""
        if self.boot == _boot() and self.host == slurm.here():
            return False  # it belongs to this Slurm job
        return slurm.is_over(self.host)

    def was_before_boot(self, path: pathlib.Path) -> bool:
        """Whether the holder of the lock at `path` ran on this host before its last boot. An equal host name proves it only on
        a file system that no other host can mount."""
        if self.boot in (None, _boot()) or slurm.host_of(self.host) != socket.gethostname():
            return False
        command = ["stat", "--file-system", "--format=%T", "--", str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() in _ONE_KERNEL

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" + (f" since {self.since}" if self.since else "")


_UNNAMED = Holder("an unknown host", 0)  # it has acquired the lock, but not yet written its name


class LockedError(Exception):
    """Another live process holds the trial's lock."""


def read_lock(directory: pathlib.Path) -> Holder | None:
    """The holder that the lock's file in `directory` names; None if there is none."""
    try:
        with open_regular(directory / LOCK) as file:
            return _holder_in(file)
    except OSError:
        return None


def holder(directory: pathlib.Path) -> str | None:
    """The process that holds the lock in `directory` and may live, as a text; None if there is none. If it cannot be seen from
    here, the text says what the user can do."""
    try:
        with open_regular(directory / LOCK) as file:
            return _live_holder(file, directory / LOCK, _is_locked(file))
    except OSError:
        return None


def is_held(directory: pathlib.Path) -> bool:
    """True if a process that may live holds the lock in `directory`."""
    return holder(directory) is not None


def _live_holder(file: typing.IO, path: pathlib.Path, is_locked: bool) -> str | None:
    """As `holder`, for the open `file` of the lock at `path`. `is_locked`: another process has the kernel's lock of it."""
    named = _holder_in(file)
    if named is None:
        return str(_UNNAMED) if is_locked else None
    if named.is_seen(file):
        return str(named) if is_locked else None
    if named.is_gone() or (not is_locked and named.was_before_boot(path)):
        return None
    if is_locked:
        return str(named)
    return f"{named}, which cannot be seen from here: if you know that it is dead, use --take_over"


class Lock:
    """The lock of a trial's directory. This process holds it, and so do those that inherit its file descriptor."""

    def __init__(self, directory: pathlib.Path, inherited: int | None = None) -> None:
        """Acquire the lock, or use the one whose file descriptor this process has `inherited`. Raises LockedError if another
        process that may live holds it."""
        self._directory = directory
        self._file = os.fdopen(inherited, "r+") if inherited is not None else _acquire(directory)
        before = _holder_in(self._file) if inherited is not None else None
        lock_id = uuid.uuid4().hex if before is None else before.id
        device, now = os.fstat(self.fileno()).st_dev, time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self._holder = dataclasses.replace(Holder.this_process(), device=device, since=now, id=lock_id)
        self._file.truncate(0)
        self._file.seek(0)
        self._file.write(json.dumps(dataclasses.asdict(self._holder)))
        self._file.flush()

    def fileno(self) -> int:
        return self._file.fileno()

    @property
    def id(self) -> str:
        """The lock's random id, the same in all processes that inherit it."""
        assert self._holder.id is not None
        return self._holder.id

    def release(self, clean_up: typing.Callable[[], None] = lambda: None) -> None:
        """Run `clean_up` and remove the lock, unless another process has taken it over."""
        path = self._directory / LOCK
        if not path.exists():
            clean_up()
        elif (named := read_lock(self._directory)) is not None and named.id == self.id:
            clean_up()
            path.unlink(missing_ok=True)
        self._file.close()


def take_over(directory: pathlib.Path) -> None:
    """Remove the lock if its holder cannot be seen from here. Only the user can know that such a holder is dead."""
    with contextlib.suppress(FileNotFoundError), open_regular(directory / LOCK) as file:
        named = _holder_in(file)
        if named is not None and not named.is_seen(file):
            (directory / LOCK).unlink()


def _acquire(directory: pathlib.Path) -> typing.TextIO:
    """Open the lock's file, or make it, and acquire the kernel's lock. Raises LockedError, or OSError if it is no file."""
    path = directory / LOCK
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    while True:
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(open(path, "a+"))
            is_locked = not try_lock(file)
            if (found := _live_holder(file, path, is_locked)) is not None:
                raise LockedError(f"{str(directory)!r} is being run by {found}")
            if is_at(file, path):
                if not is_locked:
                    stack.pop_all()
                    return file
                path.unlink(missing_ok=True)  # Slurm says that its holder is dead, on a host that still has the lock


def try_lock(file: typing.IO) -> bool:
    """Acquire the kernel's lock of `file`. Returns False if another process has it."""
    while True:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        if _is_locked(file):
            return False  # else the other process was only checking, see _is_locked: try again


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


def _holder_in(file: typing.IO) -> Holder | None:
    file.seek(0)
    try:
        values = json.loads(file.read(_MAX_BYTES))
        return (
            None
            if not isinstance(values["host"], str)
            else Holder(**{field.name: values.get(field.name) for field in dataclasses.fields(Holder)})
        )
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
