"""The version, the digest of the code, and what they count."""

import re
import tomllib

import pytest
from conftest import PROJECT

from federated import version
from federated.running import provenance
from federated.version import digest_of, files_of

DECLARED = tomllib.loads((PROJECT / "pyproject.toml").read_text())


def test_every_script_belongs_to_the_project():
    assert sorted(path.stem for path in PROJECT.glob("*.py")) == sorted(DECLARED["tool"]["setuptools"]["py-modules"])


@pytest.mark.parametrize(
    "script", ["sweep.py", "collect_results.py", "server_benchmark.py", "client_benchmark.py", "slurm_job.py"]
)
def test_scripts_print_their_version(run, script):
    printed = run(script, "--version")
    assert printed.returncode == 0
    assert printed.stdout == f"FedSweep {DECLARED['project']['version']}, code {version.CODE}\n"


def test_results_name_the_version():
    assert provenance.describe()["version"] == DECLARED["project"]["version"]


@pytest.mark.parametrize("git", [None, "#!/bin/sh\nexit 1\n"])
def test_a_revision_is_only_nice_to_have(monkeypatch, tmp_path, git):
    """There may be no git, or one that does not trust the checkout's owner."""
    if git is not None:
        (tmp_path / "git").write_text(git)
        (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    version.git_revision.cache_clear()
    try:
        assert version.git_revision() is None
    finally:
        version.git_revision.cache_clear()


def test_the_digest_counts_the_projects_own_files(copy_of_project):
    before = digest_of(copy_of_project)
    assert before == version.CODE and re.fullmatch("[0-9a-f]{16}", before)
    (copy_of_project / "mine.py").write_text("print('a stranger beside the scripts')\n")
    assert digest_of(copy_of_project) == before
    for path in files_of(copy_of_project):
        text = path.read_text()
        path.write_text(text + "# edited\n")
        assert digest_of(copy_of_project) != before
        path.write_text(text)
    assert digest_of(copy_of_project) == before
