"""Every script ends without a word if the reader of its output goes away."""

import os
import subprocess
import sys

import pytest
from helpers import HUNG, PROJECT, SMALL, make_trial

PIPE_CLOSED = 141  # as a shell reports SIGPIPE

pytestmark = pytest.mark.process


def without_reader(script, *arguments, cwd):
    """Run a script whose output nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, PROJECT / script, *map(str, arguments)]
    with open(writing, "wb") as output:
        return subprocess.run(command, stdout=output, stderr=subprocess.PIPE, text=True, cwd=cwd, timeout=HUNG, check=False)


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("sweep.py", ["status"]),
        ("sweep.py", ["status", "--json"]),
        ("sweep.py", ["launch", "--skip_confirmation"]),
        ("sweep.py", ["delete_all", "--skip_confirmation"]),
        ("sweep.py", ["show_partition"]),
        ("collect_results.py", ["--output_dir", "out"]),
        ("collect_results.py", ["--output_dir", "out", "--format", "csv"]),
        ("collect_results.py", ["--output_dir", "out", "--best_command"]),
        pytest.param("server_benchmark.py", ["--output_dir", "trial", *SMALL], marks=pytest.mark.slow),
    ],
)
def test_a_reader_that_has_gone(tmp_path, script, arguments):
    make_trial(tmp_path / "out", 0, 0, [[0.5]] * 2, [0.5])
    ended = without_reader(script, *arguments, cwd=tmp_path)
    assert (ended.returncode, ended.stderr) == (PIPE_CLOSED, "")
    assert not list(tmp_path.rglob("lock"))


@pytest.mark.parametrize(
    "command",
    ["sweep.py launch", "collect_results.py", "server_benchmark.py", "client_benchmark.py", "slurm_job.py"],
)
def test_help_that_nobody_reads(tmp_path, command):
    """Without a buffer argparse itself passes over what cannot be written."""
    ended = without_reader(*command.split(), "--help", cwd=tmp_path)
    assert ended.returncode in (0, PIPE_CLOSED) and ended.stderr == ""
