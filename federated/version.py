"""Which code runs: told by its content, since a revision says nothing of edits that are not committed."""

import contextlib
import functools
import hashlib
import os
import pathlib
import shutil
import subprocess

from federated.options import UsageError

HERE = pathlib.Path(__file__).resolve().parent.parent
REVISION = "REVISION"  # a file that only frozen copies have


def _digest(project):
    digest = hashlib.sha256()
    for path in sorted([*project.glob("*.py"), *(project / "federated").rglob("*.py")]):
        digest.update(f"{path.relative_to(project)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


# Of the files as they are when this process, or the one it was forked from, imports them
CODE = _digest(HERE)


@functools.cache
def git_revision() -> str | None:
    """The commit of the checkout, with "-dirty" where files differ from it; None where there is no checkout. A frozen copy
    tells that of the checkout it was made from."""
    with contextlib.suppress(FileNotFoundError):
        return (HERE / REVISION).read_text() or None
    described = subprocess.run(
        ["git", "-C", HERE, "describe", "--always", "--dirty", "--abbrev=40"], capture_output=True, text=True, check=False
    )
    return described.stdout.strip() or None


def freeze(directory: pathlib.Path) -> pathlib.Path:
    """Copy the code that this process runs, and the data with it, to DIRECTORY/CODE, where that is not there yet. Raises
    UsageError where the files are others by now."""
    frozen = directory / CODE
    if not frozen.exists():
        copy = directory / f".{CODE}.{os.getpid()}.tmp"
        shutil.copytree(HERE / "federated", copy / "federated", ignore=shutil.ignore_patterns("__pycache__"))
        for path in HERE.glob("*.py"):
            shutil.copy(path, copy)
        (copy / REVISION).write_text(git_revision() or "")
        if _digest(copy) == CODE:
            with contextlib.suppress(OSError):  # another launch was faster
                copy.rename(frozen)
        shutil.rmtree(copy, ignore_errors=True)
        if not frozen.exists():
            raise UsageError("the project's files have changed since this command was started: start it again")
    if _digest(frozen) != CODE:
        raise UsageError(f"the frozen code in {str(frozen)!r} was changed: jobs that use it may run; remove it once none does")
    return frozen
