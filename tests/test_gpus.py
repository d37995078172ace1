"""Which GPUs trials get, and how many share one. No GPU is needed: what the machine says of them is made up."""

import collections
import pathlib
import subprocess
import sys

import pytest
import torch
from helpers import HUNG, TINY, failure, results

from federated.running import resources
from federated.running.device_sharing import DeviceSharing


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """machine(torch's count, CUDA_VISIBLE_DEVICES, lines of nvidia-smi -L or None if there is none)."""

    def machine(count, named=None, listed=None):
        monkeypatch.setattr(resources, "_DRIVER_FILES", [tmp_path])
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if named is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
        program = tmp_path / "nvidia-smi"
        program.unlink(missing_ok=True)
        if listed is not None:
            program.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in listed))
            program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))

    return machine


@pytest.mark.parametrize(
    ("count", "named", "gpus"),
    [
        (2, None, ["0", "1"]),
        (2, "5,3", ["5", "3"]),
        (1, " GPU-8932f937 ", ["GPU-8932f937"]),
        (1, "3,-1,4", ["3"]),
        (0, "", []),
        (0, "NoDevFiles", []),  # as Slurm has it for a job without
        (1, "9,0", ["9"]),  # torch stops where one is missing
        (1, "MIG-a,MIG-b", ["MIG-a", "MIG-b"]),  # CUDA shows the first to a process, each trial gets one
        (0, "MIG-a", []),
    ],
)
def test_the_gpus_are_those_of_the_environment(machine, count, named, gpus):
    machine(count, named)
    assert resources.gpus() == gpus


def test_without_a_driver_there_is_none(machine, monkeypatch):
    machine(2, listed=["GPU 0"])
    monkeypatch.setattr(resources, "_DRIVER_FILES", ["/nowhere"])
    assert resources.gpus() == [] and resources.gpu_disagreement() is None


LISTED = [
    "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)",
    "  MIG 1g.10gb     Device  0: (UUID: MIG-1)",
    "GPU 1: NVIDIA (UUID: GPU-2)",
]


@pytest.mark.parametrize(
    ("count", "named", "listed"),
    [(2, None, LISTED), (0, None, None), (0, "", LISTED), (1, "1", LISTED), (1, "MIG-1,MIG-2", LISTED)],
)
def test_what_agrees_is_not_mentioned(machine, count, named, listed):
    machine(count, named, listed)
    assert resources.gpu_disagreement() is None


@pytest.mark.parametrize(
    ("count", "named", "listed", "said"),
    [
        (0, None, LISTED, "nvidia-smi lists 2 GPUs"),
        (1, None, LISTED, "nvidia-smi lists 2 GPUs"),
        (1, "0,7", None, "CUDA_VISIBLE_DEVICES names 2 GPUs"),
        (0, "MIG-1", None, "CUDA_VISIBLE_DEVICES names 1 GPUs"),
    ],
)
def test_a_gpu_that_torch_does_not_find_is_one_line(machine, count, named, listed, said):
    machine(count, named, listed)
    line = resources.gpu_disagreement()
    assert line.startswith(f"{said}, torch {torch.__version__}, built ") and f", finds and uses {count}: " in line


class FakeTrial:
    def __init__(self, name):
        self.directory = pathlib.Path(name)

    def __repr__(self):
        return str(self.directory)


def test_who_found_no_room_waits_until_fewer_are_there():
    large, *small = map(FakeTrial, "labcde")
    sharing, waiting = DeviceSharing(devices=1), collections.deque([large, *small])
    for slot in range(3):
        assert sharing.next_start(waiting, list(range(slot, 4)))[1] == slot
        sharing.began([large, *small][slot], slot)
    assert sharing.ended(0, lacked_memory=True) == 1  # two others were there
    waiting.appendleft(large)
    trial, slot = sharing.next_start(waiting, [0, 3])  # beside two it need not try
    assert (trial, slot) == (small[2], 0)
    sharing.began(trial, slot)
    assert sharing.ended(1, False) is None and sharing.ended(2, False) is None
    assert sharing.next_start(waiting, [1, 2, 3]) == (large, 1)
    sharing.began(large, 1)
    assert sharing.next_start(waiting, [2, 3]) is None  # nobody makes it a third one
    assert sharing.ended(1, lacked_memory=True) == 0
    waiting.append(large)
    sharing.ended(0, False)
    while (start := sharing.next_start(waiting, [0, 1, 2, 3]))[0] is not large:
        sharing.began(*start)
        sharing.ended(start[1], False)
    sharing.began(*start)
    assert sharing.ended(start[1], lacked_memory=True) is None  # alone it has failed


def test_other_devices_do_not_count():
    sharing, waiting = DeviceSharing(devices=2), collections.deque()
    one, two, three = map(FakeTrial, "abc")
    for slot, trial in enumerate((one, two)):
        sharing.began(trial, slot)
    assert sharing.ended(1, lacked_memory=True) is None
    sharing.began(two, 2)
    assert sharing.ended(2, lacked_memory=True) == 0
    waiting.extend([two, three])
    assert sharing.next_start(waiting, [1, 2]) == (two, 1)


# A device that holds what two client processes need; a process that finds no room says so as torch does
PRETENDED_MEMORY = """

def take_room():
    import fcntl

    for number in range({room}):
        file = open({place!r} + str(number), "a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            pass
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\\nGPU 0 has 1.00 GiB free.")

"""


@pytest.fixture
def small_device(copy_of_project, tmp_path):
    """small_device(room) gives launch(name, *options), by a copy of the project for which there is one GPU, with memory for so
    many client processes."""

    def small_device(room):
        worker = copy_of_project / "federated" / "learning" / "worker.py"
        before, after = worker.read_text().split("\nclass Worker:")
        start = "        self.device = resolve"
        after = after.replace(start, f"        self.room = take_room()\n{start}")
        pretended = PRETENDED_MEMORY.format(room=room, place=str(tmp_path / "room"))
        worker.write_text(f"{before}{pretended}\nclass Worker:{after}")
        places = copy_of_project / "federated" / "running" / "resources.py"
        places.write_text(places.read_text() + '\n\ndef gpus():\n    return ["7"]\n')
        return launch

    def launch(name, *options):
        command = [sys.executable, copy_of_project / "sweep.py", "launch", "--skip_confirmation", "--output_dir"]
        command += [tmp_path / name, *TINY, *map(str, options)]
        return subprocess.run(command, capture_output=True, text=True, timeout=HUNG, check=False, cwd=tmp_path)

    return small_device


@pytest.mark.slow
@pytest.mark.process
def test_a_trial_that_finds_no_room_on_its_device_runs_later(small_device, tmp_path):
    """With the bits of one that never waited."""
    launch, size = small_device(room=2), ("--num_trials", 3, "--rounds", 20)
    crowded, roomy = (launch(name, *size, "--trials_per_device", at_once) for name, at_once in (("crowded", 4), ("roomy", 2)))
    assert crowded.returncode == roomy.returncode == 0, crowded.stderr + roomy.stderr
    assert "others on its device: client_process_0 ran out of the GPU's memory (" in crowded.stderr
    assert "is put off" not in roomy.stderr
    assert results(tmp_path / "crowded") == results(tmp_path / "roomy") and len(results(tmp_path / "roomy")) == 6


@pytest.mark.process
def test_a_trial_too_large_for_the_device_fails_by_name(small_device, tmp_path):
    done = small_device(room=0)("out", "--num_hparams", 1)
    assert done.returncode == 1 and "put off" not in done.stderr and "Traceback" not in done.stderr
    failed = failure(tmp_path / "out")
    assert failed["reason"].startswith("ran out of the GPU's memory (")
    assert failed["log"][-1] == "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.00 GiB free."
