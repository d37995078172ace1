"""Copies of the code, so that jobs in a queue run what was launched, whatever is edited meanwhile."""

import contextlib
import os
import pathlib
import shutil

from federated.options import UsageError
from federated.version import CODE, HERE, PROJECT, REVISION, digest_of, files_of, git_revision


def take(directory: pathlib.Path) -> pathlib.Path:
    """Copy the code that this process runs, and the data with it, to DIRECTORY/CODE, unless it is there. Raises UsageError if
    the files have changed since this process imported them."""
    copied = directory / CODE
    if not copied.exists():
        copy = directory / f".{CODE}.{os.getpid()}.tmp"
        shutil.copytree(HERE / "federated", copy / "federated", ignore=shutil.ignore_patterns("__pycache__", ".*"))
        for path in [HERE / PROJECT, *(path for path in files_of(HERE) if path.parent == HERE)]:
            shutil.copy(path, copy)
        (copy / REVISION).write_text(git_revision() or "")
        if digest_of(copy) == CODE:
            with contextlib.suppress(OSError):  # another launch was faster
                copy.rename(copied)
        shutil.rmtree(copy, ignore_errors=True)
        if not copied.exists():
            raise UsageError("the project's files have changed since this command was started: start it again")
    if digest_of(copied) != CODE:
        raise UsageError(f"the frozen code in {str(copied)!r} was changed: jobs that use it may run; remove it once none does")
    return copied
