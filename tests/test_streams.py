"""Standard streams that are closed, that take nothing, or whose encoding lacks a character stop no command."""

import os
import pty
import subprocess
import sys

import pytest
from helpers import HUNG, PROJECT, SMALL, TINY, make_trial, wait_until

pytestmark = pytest.mark.process
SCRIPT = ["bash", PROJECT / "run_sweep.sh"]


def redirected(redirection, *command):
    """The command line that runs `command` with a redirection of bash."""
    return ["bash", "-c", f'exec "$@" {redirection}', "-", *map(str, command)]


def python(script, *arguments):
    return [sys.executable, PROJECT / script, *arguments]


def run_in(directory, command, environment=None, **options):
    """Run a command with additions to the environment. Returns what subprocess.run would."""
    options = {"text": True, "env": {**os.environ, **(environment or {})}, **options}
    return subprocess.run(command, capture_output=True, cwd=directory, timeout=HUNG, check=False, **options)


MIXES = [">&-", "<&-", "2>&-", ">&- <&-", "1</dev/null", "2</dev/null"]


@pytest.mark.slow
@pytest.mark.parametrize("closed", [">&- <&- 2>&-", *MIXES])
def test_no_command_needs_the_streams_that_are_closed(tmp_path, closed):
    """No file of the sweep's gets their numbers, and what it prints elsewhere stays."""
    make_trial(tmp_path / "other", 0, 0, [[0.5]] * 2, [0.5])
    for command, done in (
        (python("sweep.py", "launch", "--skip_confirmation", "--output_dir", "out", *TINY), 2),
        ([*SCRIPT, "--output_dir", "out", *TINY, "--num_hparams", "3"], 3),
        (python("sweep.py", "status", "--output_dir", "out"), 3),
        (python("collect_results.py", "--output_dir", "other"), 3),
        (python("sweep.py", "delete_all", "--skip_confirmation", "--output_dir", "out"), 0),
    ):
        ended = run_in(tmp_path, redirected(closed, *command))
        assert ended.returncode == 0, (command, ended.stderr)
        assert len(list(tmp_path.glob("out/*/*/*/done"))) == done
        assert "Traceback" not in ended.stderr and "Bad file descriptor" not in ended.stderr
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000


@pytest.mark.slow
def test_the_script_ends_by_naming_the_page(tmp_path):
    """Also if a trial has failed, as one that has diverged."""
    options = ("--local_optimizer", "sgd", "--hparams", '{"learning_rate": 1e30}', "--num_hparams", "1")
    for arguments, code in (((), 0), (options, 1)):
        ended = run_in(tmp_path, [*SCRIPT, "--output_dir", "my out", *TINY, *arguments])
        assert ended.returncode == code, ended.stderr
        assert ended.stderr.splitlines()[-1] == "Page: my out/report.html"
    page = (tmp_path / "my out" / "report.html").read_text("utf-8")
    assert "Failed trials" in page and "not finite" in page
    unhelped = run_in(tmp_path, [*SCRIPT, "--output_dir", "nothing", "--help"])
    assert unhelped.returncode == 0 and "error" not in unhelped.stderr and not (tmp_path / "nothing").exists()


@pytest.mark.slow
def test_processes_started_by_hand_need_no_streams(tmp_path):
    address = tmp_path / "private" / "socket"
    server = python("server_benchmark.py", "--output_dir", "trial", "--host", address, "--client_processes", 1, *SMALL)
    with subprocess.Popen(redirected(">&- <&- 2>&-", *server), cwd=tmp_path) as serving:
        wait_until(address.exists)
        client = run_in(tmp_path, redirected(">&- <&- 2>&-", *python("client_benchmark.py", "--host", address)))
        assert client.returncode == 0 and serving.wait(HUNG) == 0
    assert (tmp_path / "trial" / "done").exists()


@pytest.mark.parametrize(
    ("environment", "shown"),
    [
        ({"PYTHONIOENCODING": "latin-1"}, b"0.6000 \xb1 0.0000"),
        pytest.param({"PYTHONIOENCODING": "ascii"}, b"0.6000 ? 0.0000", marks=pytest.mark.slow),
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, b"0.6000 ? 0.0000"),
    ],
)
def test_a_character_that_the_encoding_lacks_stops_no_command(tmp_path, environment, shown):
    for seed in range(2):
        make_trial(tmp_path / "out", 0, seed, [[0.6]] * 2, [0.6])
    make_trial(tmp_path / "single", 0, 0, [[0.6]] * 2, [0.6])  # has no interval, but a dash
    outputs = []
    for command in (["--output_dir", "out", "--html", "page.html"], ["--output_dir", "single"], ["--help"]):
        ended = run_in(tmp_path, python("collect_results.py", *command), environment, text=False)
        assert ended.returncode == 0, ended.stderr
        outputs.append(ended.stdout)
    assert shown in outputs[0] and "0.6000 ± 0.0000" in (tmp_path / "page.html").read_text("utf-8")


def test_output_that_finds_no_room_is_named(tmp_path):
    make_trial(tmp_path / "out", 0, 0, [[0.5]] * 2, [0.5])
    ended = run_in(tmp_path, redirected(">/dev/full", *python("collect_results.py", "--output_dir", "out")))
    assert (ended.returncode, ended.stderr) == (1, "collect_results.py: error: standard output: No space left on device\n")


def test_an_end_of_file_is_no_yes(tmp_path):
    """Ctrl-D on a terminal."""
    ours, theirs = pty.openpty()
    with open(theirs) as terminal:
        os.write(ours, b"\4")
        ended = run_in(tmp_path, python("sweep.py", "launch", "--output_dir", "out", *TINY), stdin=terminal)
    os.close(ours)
    assert ended.returncode == 0 and ended.stderr.endswith("Nevermind!\n"), ended.stderr
    assert not (tmp_path / "out").exists()
