"""Shared by the parts: random data of CIFAR-10's shape, and sweeps of it."""

import contextlib
import json
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

import torch

from benchmarks.overhead import random_cifar
from federated.data import datasets
from federated.data.datasets import Dataset

PROJECT = pathlib.Path(__file__).resolve().parents[2]


def cifar(train, test) -> Dataset:
    """Random images and labels of CIFAR-10's shape."""
    with places(train, test) as (data_dir, _):
        return datasets.load("cifar10", data_dir)


@contextlib.contextmanager
def places(train, test):
    """Yields (--data_dir with such images, --output_dir), and deletes both afterwards."""
    with tempfile.TemporaryDirectory() as scratch:
        random_cifar(f"{scratch}/data", train, test)
        yield f"{scratch}/data", pathlib.Path(scratch) / "out"


def launch(data_dir, output_dir, device, *options):
    """(seconds from start to exit, {trial's directory: results.json}) of a sweep. Exits if it fails."""
    command = [sys.executable, PROJECT / "sweep.py", "launch", "--skip_confirmation", "--data_dir", data_dir]
    command += ["--output_dir", output_dir, "--dataset", "cifar10", "--device", device, *options]
    start = time.perf_counter()
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\nended with exit code {done.returncode}:\n{done.stderr[-3000:]}")
    lines = {line for log in output_dir.rglob("client_process_*.log") for line in log.read_text().splitlines()}
    for line in sorted(lines):  # such as that steps run without graphs
        print(f"a client's log: {line}")
    return seconds, {path.parent: json.loads(path.read_text()) for path in sorted(output_dir.rglob("results.json"))}


def synchronize(device) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@contextlib.contextmanager
def device_memory(device):
    """Yields a list of one number, in the end the peak bytes of all processes on the device; None on the CPU."""
    peak = [None]
    if device == "cpu":
        yield peak
        return
    before, peak[0], over = torch.cuda.mem_get_info()[0], 0, threading.Event()

    def watch():
        while not over.wait(0.1):
            peak[0] = max(peak[0], before - torch.cuda.mem_get_info()[0])

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()


def megabytes(size):
    return None if size is None else round(size / 1e6)
