"""How a trial's process can end, and what is said of it."""

import errno
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from helpers import failure

from federated.running.exits import (
    DEVICE_MEMORY_EXIT,
    LOCKED_EXIT,
    OUT_OF_MEMORY_EXIT,
    SYSTEM_ERROR_EXIT,
    exit_code_of,
    is_accident,
    lacks_room,
    meaning_of,
)


def test_every_error_of_the_system_has_its_words():
    for number in errno.errorcode.keys() - {errno.ENOMEM, 120 - SYSTEM_ERROR_EXIT}:
        assert meaning_of(SYSTEM_ERROR_EXIT + number).startswith(f"ended with the system's error {os.strerror(number)!r}")
    assert meaning_of(OUT_OF_MEMORY_EXIT).startswith("ran out of memory (")


def test_every_signal_has_its_words():
    for each in signal.Signals:
        assert meaning_of(-each).startswith(f"was killed by {each.name}")
    assert meaning_of(-40) == "was killed by signal 40"


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), errno.EDQUOT),
        (MemoryError(), errno.ENOMEM),
        (MemoryError("Unable to allocate 3.2 GiB for an array"), errno.ENOMEM),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), errno.ENOMEM),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), errno.ENOMEM),
        (RuntimeError("can't start new thread"), errno.EAGAIN),
    ],
)
def test_what_is_an_error_of_the_system_by_another_name(error, number, capsys):
    def work():
        raise error

    assert exit_code_of(work) == SYSTEM_ERROR_EXIT + number
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("text", ["CUDA out of memory. Tried to allocate 2 GiB.\nGPU 0 has 1 GiB", "CUDA error: out of memory"])
def test_memory_of_a_device_is_not_that_of_the_machine(text, capsys):
    def work():
        raise RuntimeError(text)

    assert exit_code_of(work) == DEVICE_MEMORY_EXIT
    assert capsys.readouterr().err == " ".join(text.split()) + "\n"
    assert meaning_of(DEVICE_MEMORY_EXIT).startswith("ran out of the GPU's memory (")


def test_what_is_retried_and_what_needs_room():
    room = {errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE}
    codes = [*range(-64, 0), *range(1, 256)]
    assert {code - SYSTEM_ERROR_EXIT for code in codes if lacks_room(code)} == {*room, 255 - SYSTEM_ERROR_EXIT}
    accidents = {SYSTEM_ERROR_EXIT + number for number in (*room, errno.EIO, errno.ESTALE)} | {4, 255}
    assert {code for code in codes if is_accident(code)} == {*range(-64, 0), *accidents}
    assert is_accident(None) and not is_accident(LOCKED_EXIT) and not lacks_room(None)


QUOTA = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

ssize_t write(int fd, const void *bytes, size_t count) {
    char link[40], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    path[length > 0 ? length : 0] = 0;
    if (strstr(path, "/.checkpoint.npz.")) {
        errno = EDQUOT;
        return -1;
    }
    return syscall(SYS_write, fd, bytes, count);
}
"""


@pytest.mark.slow
@pytest.mark.usefixtures("leaves_nothing")
def test_a_quota_is_named(launch, tmp_path):
    """Of which a checkpoint takes the rest."""
    if not shutil.which("cc"):
        pytest.skip("needs a C compiler")
    library = tmp_path / "quota.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, "-x", "c", "-"], input=QUOTA, text=True, check=True)
    full = launch(
        tmp_path / "out", "--num_hparams", 1, "--checkpoint_seconds", 0, env={**os.environ, "LD_PRELOAD": str(library)}
    )
    reason = (
        "ended with the system's error 'Disk quota exceeded' (your space or number of files is used up where the trial lies)"
    )
    assert full.returncode == 1 and "Traceback" not in full.stderr and f"server {reason}: " in full.stderr, full.stderr
    recorded = failure(tmp_path / "out")
    assert recorded["reason"] == reason and recorded["log"][-1] == "[Errno 122] Disk quota exceeded"


@pytest.mark.process
def test_data_that_are_cut_while_they_are_mapped_are_named(tmp_path):
    array = tmp_path / "images.npy"
    np.save(array, np.ones(1 << 20, np.uint8))
    program = "import os, sys, numpy; a = numpy.load(sys.argv[1], mmap_mode='c'); os.truncate(sys.argv[1], 0); a.sum()"
    ended = subprocess.run([sys.executable, "-c", program, array], check=False)
    assert meaning_of(ended.returncode).startswith("was killed by SIGBUS (a file that it reads was truncated")


@pytest.mark.slow
@pytest.mark.process
def test_ends_have_codes_where_those_of_children_are_ignored_at_the_start(launch, tmp_path):
    ignored = lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # noqa: E731
    options = ("--local_optimizer", "sgd", "--num_hparams", 1, "--hparams", '{"learning_rate": 1e30}')
    failed = launch(tmp_path / "out", *options, "--command_launcher", "local_sequential", preexec_fn=ignored)
    assert failed.returncode == 1 and "trial_0 failed: server diverged" in failed.stderr, failed.stderr
