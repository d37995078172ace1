"""Which code runs: told by its content, since a revision says nothing of edits that are not committed."""

import functools
import hashlib
import pathlib
import subprocess

HERE = pathlib.Path(__file__).resolve().parent.parent


def _digest():
    digest = hashlib.sha256()
    for path in sorted([*HERE.glob("*.py"), *(HERE / "federated").rglob("*.py")]):
        digest.update(f"{path.relative_to(HERE)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


# Of the files as they are when this process, or the one it was forked from, imports them
CODE = _digest()


@functools.cache
def git_revision() -> str | None:
    """The commit of the checkout, with "-dirty" where files differ from it; None where there is no checkout."""
    described = subprocess.run(
        ["git", "-C", HERE, "describe", "--always", "--dirty", "--abbrev=40"], capture_output=True, text=True, check=False
    )
    return described.stdout.strip() or None
