"""Identifies the code that runs by a digest of its content: a Git revision does not show uncommitted edits."""

import contextlib
import dataclasses
import functools
import hashlib
import pathlib
import subprocess
import tomllib
import typing

HERE = pathlib.Path(__file__).resolve().parent.parent
PROJECT = "pyproject.toml"  # names the version and the scripts
REVISION = "REVISION"  # a file that only snapshots have


def _project(directory: pathlib.Path) -> dict:
    with open(directory / PROJECT, "rb") as file:
        return tomllib.load(file)


def files_of(directory: pathlib.Path) -> list[pathlib.Path]:
    """The project's own Python files in a checkout: the scripts that pyproject.toml names, and the modules of the package.
    Other files there, such as an editor's lock files or a virtual environment, do not count."""
    scripts = [directory / f"{name}.py" for name in _project(directory)["tool"]["setuptools"]["py-modules"]]
    return sorted([*scripts, *_modules(directory / "federated")])


def _modules(package: pathlib.Path) -> typing.Iterator[pathlib.Path]:
    for path in package.iterdir():
        if (path / "__init__.py").is_file():
            yield from _modules(path)
        elif path.suffix == ".py" and path.stem.isidentifier() and path.is_file():
            yield path


def digest_of(directory: pathlib.Path) -> str:
    """A digest of the code in a checkout: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for path in files_of(directory):
        digest.update(f"{path.relative_to(directory)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


VERSION: str = _project(HERE)["project"]["version"]
# The digest of the files as this process, or the one that it was forked from, imported them
CODE = digest_of(HERE)


@dataclasses.dataclass(frozen=True)
class Extension:
    """A file of the user's own code that this process has loaded, with the files that it imports from its own directory.

    path    the absolute path of the file
    files   {path: content as it was loaded} of all these files
    """

    path: pathlib.Path
    files: dict[pathlib.Path, bytes]

    @property
    def digest(self) -> str:
        """A digest of the contents and of their paths below the file's directory: 16 hexadecimal digits."""
        digest = hashlib.sha256()
        for path, content in sorted(self.files.items()):
            digest.update(f"{path.relative_to(self.path.parent)}\0".encode() + content + b"\0")
        return digest.hexdigest()[:16]

    @property
    def origin(self) -> str:
        """The path of the user's file. In a snapshot it is the path of the file that was copied."""
        if self.path.parent.parent == HERE / EXTENSIONS:
            with contextlib.suppress(FileNotFoundError):
                return str(pathlib.Path(self.path.parent.with_suffix(ORIGIN).read_text(), self.path.name))
        return str(self.path)


EXTENSIONS, ORIGIN = "extensions", ".origin"  # in snapshots: directories 0, 1, …, and each one's original path
LOADED: dict[str, Extension] = {}  # by path, in the order in which federated.extension loaded them


def code() -> str:
    """A digest of all code that this process runs: CODE if it has loaded no extension."""
    if not LOADED:
        return CODE
    digests = sorted(each.digest for each in LOADED.values())
    return hashlib.sha256("\0".join([CODE, *digests]).encode()).hexdigest()[:16]


@functools.cache
def git_revision() -> str | None:
    """The commit of this Git checkout, with "-dirty" if files differ from it. None if this is no checkout, even if it lies in
    another repository, or if git is missing. A snapshot returns the commit of the checkout that it was copied from."""
    with contextlib.suppress(FileNotFoundError):
        return (HERE / REVISION).read_text() or None
    if not (HERE / ".git").exists():
        return None
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    except OSError:
        return None
