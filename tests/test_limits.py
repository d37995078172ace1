"""Output directories that cannot be written to, and too few file descriptors: one named failure, and nothing left behind."""

import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from helpers import HUNG, PROJECT, TINY, both_launchers, without_the_power_of_root


@pytest.fixture
def read_only(tmp_path):
    """A directory on a file system that is mounted read-only."""
    place = tmp_path / "read_only"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", place], capture_output=True, check=False).returncode:
        pytest.skip("mounting needs root")
    yield place
    subprocess.run(["umount", place], check=True)


def refused(result, path):
    lines = [line for line in result.stderr.splitlines() if "error" in line.lower()]
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    (line,) = lines
    assert str(path) in line
    return line


@both_launchers
def test_a_read_only_output_directory(launch_here, call, read_only, launcher):
    line = refused(launch_here(read_only / "out", "--command_launcher", launcher), read_only)
    assert "Read-only file system" in line and "name another" in line
    assert "Read-only" in refused(call("server_benchmark.py", "--output_dir", read_only / "trial"), read_only)


@pytest.mark.parametrize("place", ["/proc/none", "/sys/none"])
def test_an_output_directory_where_no_files_can_be(launch_here, call, place):
    refused(launch_here(place), place)
    refused(call("server_benchmark.py", "--output_dir", place), place)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [0o000, 0o500])
def test_an_output_directory_of_somebody_else(launch, run, tmp_path, mode):
    out = tmp_path / "out"
    out.mkdir()
    out.chmod(mode)
    limited = {"preexec_fn": without_the_power_of_root}
    reason = "may not be read" if mode == 0 else "Permission denied"
    assert reason in refused(launch(out, **limited), out)
    for command in ("status", "delete_all"):
        result = run("sweep.py", command, "--output_dir", out, **limited)
        assert "Traceback" not in result.stderr
        if mode == 0:
            assert reason in refused(result, out)
    result = run("collect_results.py", "--output_dir", out, **limited)
    assert result.returncode in (1, 2) and str(out) in result.stderr and len(result.stderr.splitlines()) == 1
    out.chmod(0o700)
    assert list(out.iterdir()) == []


def test_a_working_directory_that_has_vanished(launch, tmp_path):
    gone = tmp_path / "gone"

    def go_there():
        gone.mkdir()
        os.chdir(gone)
        gone.rmdir()

    result = launch("out", preexec_fn=go_there)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1 and "'out' is not a directory" in result.stderr


@pytest.mark.parametrize("most", [12, 24, 34])
@both_launchers
@pytest.mark.usefixtures("leaves_nothing")
def test_too_few_file_descriptors(launch, tmp_path, most, launcher):
    limit = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # noqa: E731
    result = launch(tmp_path / "out", "--command_launcher", launcher, "--num_hparams", 1, preexec_fn=limit)
    assert "Traceback" not in result.stderr, result.stderr
    if result.returncode != 0:
        assert result.returncode in (1, 2)
        assert "Too many open files" in result.stderr


def test_too_few_file_descriptors_for_so_many_trials(launch, tmp_path):
    """Sixteen trials of five processes would have the process to fork from run out of them on the way."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (44, 44))  # noqa: E731
    many = ("--num_trials", 16, "--jobs", 16, "--num_clients", 4, "--client_processes", 4, "--num_hparams", 1)
    result = launch(tmp_path / "out", *many, preexec_fn=limit)
    assert result.returncode == 2
    assert "Too many open files: 16 trials at once need 368, the limit is 44" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_as_many_trials_at_once_as_may_open_their_files(launch, tmp_path):
    """If the user names no number: two, as on two cores, would need 50."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (44, 44))  # noqa: E731
    launched = launch(tmp_path / "out", "--client_processes", 1, preexec_fn=limit)
    assert launched.returncode == 0, launched.stderr


def test_too_little_memory_for_any_trial_is_one_line(launch, tmp_path):
    limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (300 << 20, 300 << 20))  # noqa: E731
    result = launch(tmp_path / "out", preexec_fn=limit)
    *_, line = result.stderr.splitlines()
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert "error: no trial can be started: " in line and "memory (the machine's, the cgroup's or `ulimit -v`" in line
    assert not (tmp_path / "out").exists()


@pytest.fixture
def few_processes():
    """few_processes(limit, *options) launches a tiny sweep as a user who may have that many processes and threads, and has
    root's power over files only, to read the interpreter's. Returns its directory, too."""
    user = 54321  # somebody who has none
    power = "-all,+dac_override,+dac_read_search"
    become = ["setpriv", f"--reuid={user}", f"--inh-caps={power}", f"--ambient-caps={power}", "--bounding-set=-sys_admin"]
    if subprocess.run([*become, "true"], capture_output=True, check=False).returncode:
        pytest.skip("becoming another user needs root")
    with tempfile.TemporaryDirectory() as place:
        os.chown(place, user, -1)
        out = Path(place) / "out"

        def launched(limit, *options):
            command = [
                sys.executable,
                PROJECT / "sweep.py",
                "launch",
                "--skip_confirmation",
                "--output_dir",
                out,
                *TINY,
                *options,
            ]
            limited = [*become, "bash", "-c", f'ulimit -u {limit} && exec "$@"', "-", *map(str, command)]
            return out, subprocess.run(limited, capture_output=True, text=True, timeout=HUNG, check=False)

        yield launched


@pytest.mark.slow
@pytest.mark.process
def test_few_processes_hold_fewer_trials_at_once(few_processes):
    """Four trials at once would need about 24 processes and threads, one about 10."""
    options = ["--num_hparams", "1", "--num_trials", "5", "--jobs", "4", "--client_processes", "1", "--rounds", "400"]
    out, launched = few_processes(16, *options)
    assert launched.returncode == 0 and "Traceback" not in launched.stderr, launched.stderr
    assert " is put off, at most " in launched.stderr and "Resource temporarily unavailable" in launched.stderr
    assert len(list(out.glob("*/*/*/done"))) == 5


@pytest.mark.process
@pytest.mark.parametrize("limit", [1, 2, 3])
def test_processes_for_no_trial_are_one_line(few_processes, limit):
    """Not even for a thread, for what trials are forked from, or for a fork of that."""
    out, result = few_processes(limit)
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert "no more processes or threads may start: raise `ulimit -u`" in result.stderr.splitlines()[-1]
    assert not out.exists()
