"""Which code runs. A digest of its content says so, as a revision says nothing of edits that are not committed."""

import contextlib
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
