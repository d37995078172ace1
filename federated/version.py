"""Which code runs. A digest of its content says so, as a revision says nothing of edits that are not committed."""

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
REVISION = "REVISION"  # a file that only frozen copies have


def _project(directory: pathlib.Path) -> dict:
    with open(directory / PROJECT, "rb") as file:
        return tomllib.load(file)


def files_of(directory: pathlib.Path) -> list[pathlib.Path]:
    """The project's own Python files in a checkout: the scripts that pyproject.toml names, and the modules of the package.
    What else lies around, such as an editor's lock files or a virtual environment, is not among them."""
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
# Of the files as they are when this process, or the one it was forked from, imports them
CODE = digest_of(HERE)


@dataclasses.dataclass(frozen=True)
class Extension:
    """A file of the user's own code that this process has loaded, with what it imports from its own directory.

    path    of the file, absolute
    files   all of them, the content of each as it was loaded
    """

    path: pathlib.Path
    files: dict[pathlib.Path, bytes]

    @property
    def digest(self) -> str:
        """Of the contents, and of where they lie below the file's directory: 16 hexadecimal digits."""
        digest = hashlib.sha256()
        for path, content in sorted(self.files.items()):
            digest.update(f"{path.relative_to(self.path.parent)}\0".encode() + content + b"\0")
        return digest.hexdigest()[:16]

    @property
    def origin(self) -> str:
        """Where the user has the file. A frozen copy returns the path of what it was made from."""
        if self.path.parent.parent == HERE / EXTENSIONS:
            with contextlib.suppress(FileNotFoundError):
                return str(pathlib.Path(self.path.parent.with_suffix(ORIGIN).read_text(), self.path.name))
        return str(self.path)


EXTENSIONS, ORIGIN = "extensions", ".origin"  # in frozen copies: directories 0, 1, …, and where each was
LOADED: dict[str, Extension] = {}  # by path, in the order in which federated.extension loaded them


def code() -> str:
    """A digest of all code that this process runs: CODE if it has loaded no extension."""
    if not LOADED:
        return CODE
    digests = sorted(each.digest for each in LOADED.values())
    return hashlib.sha256("\0".join([CODE, *digests]).encode()).hexdigest()[:16]


@functools.cache
def git_revision() -> str | None:
    """The commit of the checkout, with "-dirty" if files differ from it; None if there is no checkout, whatever repository may
    lie around it, or no git to ask. A frozen copy returns that of the checkout it was made from."""
    with contextlib.suppress(FileNotFoundError):
        return (HERE / REVISION).read_text() or None
    if not (HERE / ".git").exists():
        return None
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    except OSError:
        return None
