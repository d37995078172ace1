"""Output directories that cannot be written to, and too few file descriptors: one named failure, and nothing left behind."""

import os
import resource
import subprocess

import pytest
from helpers import both_launchers, without_the_power_of_root


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
    limit = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))  # noqa: E731
    many = ("--num_trials", 16, "--jobs", 16, "--num_clients", 4, "--client_processes", 4, "--num_hparams", 1)
    result = launch(tmp_path / "out", *many, preexec_fn=limit)
    assert result.returncode == 2
    assert "Too many open files: 16 trials at once need 208, of 40" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()
