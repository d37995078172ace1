"""Reading files with care and writing them whole."""

import contextlib
import errno
import os
import pathlib
import stat
import typing
from collections.abc import Callable


def write_atomically(path: pathlib.Path, content: str | Callable[[typing.BinaryIO], object]) -> None:
    """Write a file whole or not at all, even if this process is killed. `content` is a text, or a function that writes to the
    open file; the file gets its name afterwards."""
    temporary = path.with_name(f".{path.name}.{os.urandom(8).hex()}.tmp")  # a pid may be in use on another host, too
    try:
        with open(temporary, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def open_regular(path: pathlib.Path) -> typing.Iterator[typing.BinaryIO]:
    """Open a regular file for reading. Raises OSError, also for pipes and devices: reading these may never end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        with open(descriptor, "rb", closefd=False) as file:
            yield file
    finally:
        os.close(descriptor)


def read_regular(path: pathlib.Path, max_bytes: int) -> bytes:
    """The content of a regular file. Raises OSError if it cannot be read, ValueError if it has more than `max_bytes`."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise ValueError(f"it is larger than {max_bytes >> 20} MB")
        return file.read(size)


LOG_BYTES = 10 << 20  # stay at each end of a log that is cut


def bound_log(path: pathlib.Path) -> None:
    """Cut the middle out of a log that has become too long: the first and the last LOG_BYTES stay. The process that writes the
    log appends to it and may continue; lines that it writes just before the cut may be lost. Raises OSError."""
    size = path.stat().st_size
    if size <= 3 * LOG_BYTES:
        return
    with open(path, "r+b", buffering=0) as file:
        descriptor, source = file.fileno(), size - LOG_BYTES
        target = LOG_BYTES + os.pwrite(descriptor, f"\n… {size - 2 * LOG_BYTES} bytes left out …\n".encode(), LOG_BYTES)
        # Also what is written meanwhile, but a process that writes faster than this copies does not go on for ever
        while source < size + LOG_BYTES and (chunk := os.pread(descriptor, 1 << 20, source)):
            target += os.pwrite(descriptor, chunk, target)
            source += len(chunk)
        os.truncate(descriptor, target)


def read_end(path: pathlib.Path, max_bytes: int) -> bytes:
    """The last bytes of a regular file, at most `max_bytes`. Raises OSError."""
    with open_regular(path) as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - max_bytes))
        return file.read(max_bytes)
