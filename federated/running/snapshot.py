"""Snapshots: copies of the code, so that queued jobs run the code that was launched, even if it is edited meanwhile."""

import contextlib
import os
import pathlib
import shutil

from federated.options import UsageError
from federated.version import (
    CODE,
    EXTENSIONS,
    HERE,
    LOADED,
    ORIGIN,
    PROJECT,
    REVISION,
    code,
    digest_of,
    files_of,
    git_revision,
)


def take(directory: pathlib.Path) -> pathlib.Path:
    """Copy the code that this process runs, extensions included, and the project's data to DIRECTORY/<version.code()>, unless
    they are there. Raises UsageError if the project's files have changed since this process imported them."""
    copied = directory / code()
    if not copied.exists():
        copy = directory / f".{code()}.{os.getpid()}.tmp"
        shutil.copytree(HERE / "federated", copy / "federated", ignore=shutil.ignore_patterns("__pycache__", ".*"))
        for path in [HERE / PROJECT, *(path for path in files_of(HERE) if path.parent == HERE)]:
            shutil.copy(path, copy)
        (copy / REVISION).write_text(git_revision() or "")
        for path, content in _extension_files(copy).items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        if digest_of(copy) == CODE:
            with contextlib.suppress(OSError):  # another launch was faster
                copy.rename(copied)
        shutil.rmtree(copy, ignore_errors=True)
        if not copied.exists():
            raise UsageError("the project's files have changed since this command was started: start it again")
    is_same = digest_of(copied) == CODE
    if not (
        is_same and all(path.is_file() and path.read_bytes() == content for path, content in _extension_files(copied).items())
    ):
        raise UsageError(f"the snapshot of the code in {str(copied)!r} was changed: remove it once no job that uses it runs")
    return copied


def extensions(copy: pathlib.Path) -> tuple[str, ...]:
    """The paths of the loaded extensions in a copy of the code."""
    roots = _roots(copy)
    return tuple(str(roots[each.path.parent] / each.path.name) for each in LOADED.values())


def _roots(copy: pathlib.Path) -> dict[pathlib.Path, pathlib.Path]:
    """{directory of loaded extensions: its place in a copy of the code}."""
    directories = dict.fromkeys(each.path.parent for each in LOADED.values())
    return {directory: copy / EXTENSIONS / str(number) for number, directory in enumerate(directories)}


def _extension_files(copy: pathlib.Path) -> dict[pathlib.Path, bytes]:
    """The files of the loaded extensions in a copy of the code, with their contents."""
    files, roots = dict[pathlib.Path, bytes](), _roots(copy)
    for each in LOADED.values():
        root = roots[each.path.parent]
        files |= {root / path.relative_to(each.path.parent): content for path, content in each.files.items()}
        files[root.with_suffix(ORIGIN)] = str(pathlib.Path(each.origin).parent).encode()
    return files
