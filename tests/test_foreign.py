"""What happens to lie where the project's files lie is not taken for them."""

import os
import shutil
import subprocess
import sys

import pytest
from helpers import HUNG, TINY

from federated.version import digest_of

NAMES = ("results.json", "clients.npz", "done", "failed.json", "server.log", "checkpoint.npz", "lock")


def a_pipe(path):
    os.mkfifo(path)


def an_endless_device(path):
    path.symlink_to("/dev/zero")


def a_directory(path):
    path.mkdir()


KINDS = pytest.mark.parametrize("kind", [a_pipe, an_endless_device, a_directory])


@pytest.fixture
def trial(finished_sweep, tmp_path):
    """The first trial of a finished sweep in tmp_path/out."""
    shutil.copytree(finished_sweep, tmp_path / "out")
    return next((tmp_path / "out").glob("*/*/trial_0"))


def put(kind, path):
    path.unlink(missing_ok=True)
    kind(path)


@KINDS
@pytest.mark.parametrize("name", NAMES)
def test_only_regular_files_are_read(call, trial, kind, name):
    """Collecting and looking end, and a launch computes the trial again or says what is in its way."""
    out = trial.parents[2]
    if name not in ("results.json", "clients.npz"):
        (trial / "done").unlink()
    put(kind, trial / name)
    for command in (("collect_results.py",), ("sweep.py", "status", "--json"), ("sweep.py", "status")):
        looked = call(*command, "--output_dir", out)
        assert looked.returncode == 0 and "Traceback" not in looked.stderr, (command, looked.stderr)
    deleted = call("sweep.py", "delete_all", "--output_dir", out, "--skip_confirmation")
    assert deleted.returncode == (name == "lock") and "Traceback" not in deleted.stderr
    if name == "lock":  # which nobody can hold
        assert f"it is not a regular file: '{trial / name}'" in deleted.stderr


@KINDS
def test_settings_are_read_from_a_regular_file(call, trial, kind):
    out = trial.parents[2]
    put(kind, trial.parents[1] / "sweep.json")
    assert "it is not a regular file" in call("collect_results.py", "--output_dir", out).stderr
    looked = call("sweep.py", "status", "--output_dir", out)
    assert looked.returncode == 0 and "Traceback" not in looked.stderr
    launched = call("sweep.py", "launch", "--output_dir", out, "--skip_confirmation", *TINY)
    assert launched.returncode == 2 and len(launched.stderr.splitlines()) == 1


@KINDS
def test_a_list_of_queued_trials_is_a_regular_file(call, tmp_path, kind):
    """Which trials are queued cannot be known, so that only looking goes on."""
    record = tmp_path / "out" / ".slurm" / "sweep-20260101-000000-000000-000"
    record.mkdir(parents=True)
    kind(record / "trials.jsonl")
    options = ("--output_dir", tmp_path / "out")
    looked = call("sweep.py", "status", *options)
    assert looked.returncode == 0 and f"Ignored: '{record}/trials.jsonl' cannot be read" in looked.stderr
    for command in ("launch", "delete_all"):
        refused = call("sweep.py", command, *options, "--skip_confirmation")
        assert refused.returncode == 2 and "if none of its jobs is left, remove it" in refused.stderr.splitlines()[-1]


def test_the_digest_passes_over_what_others_left(copy_of_project):
    before = digest_of(copy_of_project)
    package = copy_of_project / "federated"
    (package / "algorithms" / ".#fedavg.py").symlink_to("somebody@host.1234:1700000000")  # Emacs, while it edits
    (package / "algorithms" / "#fedavg.py#").write_text("half")
    (package / "algorithms" / "pipe.py").mkdir()
    os.mkfifo(package / "fifo.py")
    for other in (".ipynb_checkpoints/fedavg-checkpoint.py", "venv/lib/python3.11/site-packages/torch/nn.py", "old/fedavg.py"):
        (package / other).parent.mkdir(parents=True)
        (package / other).write_text("strange = True\n")
    assert digest_of(copy_of_project) == before


@pytest.mark.process
def test_an_editors_lock_file_breaks_no_command(copy_of_project, tmp_path):
    (copy_of_project / "federated" / "algorithms" / ".#fedavg.py").symlink_to("somebody@host.1234:1700000000")
    command = [sys.executable, copy_of_project / "sweep.py", "status", "--output_dir", tmp_path / "out"]
    looked = subprocess.run(command, capture_output=True, text=True, timeout=HUNG, check=False)
    assert looked.returncode == 0, looked.stderr


@pytest.mark.process
def test_a_repository_around_a_copy_is_not_its_own(copy_of_project, tmp_path):
    """A copy without .git, as from an archive, that lies in somebody's repository."""
    git = ["git", "-C", tmp_path, "-c", "user.name=me", "-c", "user.email=me@here"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "--message", "theirs"], check=True)
    assert not (copy_of_project / ".git").exists()
    program = "from federated.version import git_revision; print(git_revision())"
    printed = subprocess.run(
        [sys.executable, "-c", program], cwd=copy_of_project, capture_output=True, text=True, timeout=HUNG, check=True
    )
    assert printed.stdout == "None\n"
