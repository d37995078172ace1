"""Reading files with care and writing them whole."""

import errno
import os
import pathlib
import stat
import typing
from collections.abc import Callable


def write_atomically(path: pathlib.Path, content: str | Callable[[typing.BinaryIO], object]) -> None:
    """Write a file that is whole or absent, whatever happens meanwhile. `content` is a text, or a function that is given the
    file to write to and called before the file gets its name."""
    temporary = path.with_name(f".{path.name}.{os.urandom(8).hex()}.tmp")  # a pid may be one on another host too
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


def read_regular(path: pathlib.Path, max_bytes: int) -> bytes:
    """The content of a regular file. A pipe or a device, which may never end, is not opened for reading.

    Raises OSError if the file cannot be read or is not regular, ValueError if it has more than `max_bytes`.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        if status.st_size > max_bytes:
            raise ValueError(f"it is larger than {max_bytes >> 20} MB")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(status.st_size)
    finally:
        os.close(descriptor)
