"""What tests share. Fixtures are in conftest.py."""

import contextlib
import ctypes
import dataclasses
import importlib
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from unittest import mock

import numpy as np
import pytest

from federated import algorithms
from federated.metrics import over_clients
from federated.running import checkpoint
from federated.search import RANDOM
from federated.settings import Settings, write_sweep_file
from federated.trial import CHECKPOINT, EVENTS, Trial, hparams_hash, trial_path
from hparams_registry import default_hparams, random_hparams, space_of

PROJECT = pathlib.Path(__file__).resolve().parent.parent
SHARED_DATA = PROJECT.parent / "shared" / "data"


# Names of an output and a data directory that look like something else to a parser, a shell or Slurm
AWKWARD_OUT, AWKWARD_DATA = "-x y'\"%A_%a[,=\nz", "-d %[=,\n"


def cannot(reason):
    """Skip the test, except under continuous integration, where it fails."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)


HUNG = 600  # seconds: what has not happened by then, on however busy a machine, never will


def wait_until(condition, every=0.02, seconds=HUNG):
    """Return what condition() returns once that is true; ask each `every` seconds."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(every)
    return value


# Options of a sweep

TINY = ("--rounds", "2", "--samples_per_client", "40", "--num_hparams", "2", "--num_trials", "1")
ENDLESS = ("--rounds", "100000", "--num_hparams", "1", "--client_processes", "2", "--jobs", "1")

# Sampled clients that keep their moments, so that a checkpoint has to hold every part of a trial's state
STATEFUL = (
    "--num_clients", "4", "--participation", "0.5", "--optimizer_state", "keep", "--samples_per_client", "300",
    "--num_hparams", "1", "--num_trials", "1", "--client_processes", "2", "--checkpoint_seconds", "0",
)  # fmt: skip

# local_sequential imports torch anew in each process; test_sweep.py runs it always
both_launchers = pytest.mark.parametrize(
    "launcher", [pytest.param("local_sequential", marks=pytest.mark.slow), "local_parallel"]
)

# of a server started by hand
SMALL = ("--rounds", 2, "--num_clients", 4, "--participation", 0.75, "--optimizer_state", "keep", "--samples_per_client", 40)


# Results


def results(output_dir):
    """{path: results.json} without times and provenance, and with the bytes of what clients.npz beside it holds."""
    found = {}
    for path in sorted(output_dir.rglob("results.json")):
        content = json.loads(path.read_text())
        del content["curves"]["round_seconds"], content["provenance"]
        with np.load(path.with_name("clients.npz")) as clients:
            content["clients"] = {name: values.tobytes() for name, values in clients.items()}
        found[str(path.relative_to(output_dir))] = content
    return found


def trial_of(out):
    """The directory of the only trial of a sweep."""
    (trial,) = out.glob("*/*/trial_0")
    return trial


def failure(output_dir, trial="trial_0"):
    (path,) = output_dir.glob(f"*/*/{trial}/failed.json")
    return json.loads(path.read_text())


def events_of(trial):
    """({name: [(step, value)]}, hyper-parameters, name of the group) of a trial's event file, as TensorBoard reads it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.metadata import SESSION_START_INFO_TAG, parse_session_start_info_plugin_data

    (file,) = trial.glob(EVENTS)
    events = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
    scalars = {tag: [(each.step, each.value) for each in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    start = parse_session_start_info_plugin_data(events.SummaryMetadata(SESSION_START_INFO_TAG).plugin_data.content)
    hparams = {name: value.number_value or value.string_value for name, value in start.hparams.items()}
    return scalars, hparams, start.group_name


@mock.patch.object(os, "fsync", lambda _: None)  # tests make thousands
def make_trial(output_dir, hparams_seed, trial_seed, val, test, settings=None, done=True, local=None):
    """A finished trial's files. val[client][round] with 10 and 30 held-out samples, test[round], local[client][round] with 30
    and 10 test samples."""
    settings = dataclasses.replace(settings or Settings(), rounds=len(test))
    algorithm, dataset, optimizer = settings.hparams_key
    hparams = default_hparams(*settings.hparams_key)
    if hparams_seed:
        hparams = random_hparams(algorithm, dataset, hparams_seed, optimizer)
    directory = trial_path(output_dir / settings.name / hparams_hash(hparams), trial_seed)
    this = Trial(settings, hparams, hparams_seed, trial_seed, directory)
    this.prepare()
    write_sweep_file(this.sweep_dir, settings, space_of(RANDOM, {}, *settings.hparams_key))
    algorithm = algorithms.load(settings.algorithm)
    test, val, local = (np.array(values, dtype=float) for values in (test, val, local or [test] * 2))
    losses = np.where(np.isnan(test), np.nan, 1.0)
    ones = np.ones((2, len(test)))
    clients = {
        "train_loss": ones, "train_acc": ones, "val_loss": ones * losses, "val_acc": val,
        "local_loss": ones * losses, "local_acc": local,
    }  # fmt: skip
    samples = {"train_samples": [10, 10], "val_samples": [10, 30], "local_samples": [30, 10]}
    both = (np.stack([clients[f"{name}_loss"], clients[f"{name}_acc"]], axis=1) for name in ("train", "val", "local"))
    train, held_out, shares = both
    curves = over_clients(train, held_out, np.stack([losses, test]), shares, list(samples.values()), algorithm.personal)
    curves |= {"round_seconds": [0.5] * len(test), "bytes_sent": [1_000_000] * len(test)}
    results = {
        **this.description(), "personal": algorithm.personal, "has_global_model": algorithm.has_global_model,
        "curves": {name: [None if np.isnan(value) else float(value) for value in values] for name, values in curves.items()},
        "provenance": {"runs": [{"round": 0, "code": "a"}]},
    }  # fmt: skip
    arrays = {name: values.astype(np.float32) for name, values in clients.items()}
    this.write_results(results, arrays | {name: np.array(values, np.int64) for name, values in samples.items()})
    if not done:
        (directory / "done").unlink()
    return directory


# Processes


CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, PR_CAPBSET_DROP = 1, 2, 24


def without_the_power_of_root():
    """In a child before it runs a command: permissions hold for root too from then on."""
    for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
        ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)


def call(directory, script, *arguments):
    """Run one of the project's scripts in this process and `directory`. Returns what subprocess.run would."""
    module = importlib.import_module(script.removesuffix(".py"))
    with (
        contextlib.chdir(directory),
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
        mock.patch.object(sys, "argv", [script]),  # which it names itself by
        open(os.devnull) as nothing,
        mock.patch.object(sys, "stdin", nothing),
    ):
        try:
            code = module.main(list(map(str, arguments)))
        except SystemExit as ended:
            code = ended.code
    return subprocess.CompletedProcess([script, *arguments], code, out.getvalue(), err.getvalue())


def launch(start, output_dir, *options, **more):
    """Launch a tiny sweep by start(script, *arguments); later options win."""
    return start("sweep.py", "launch", "--skip_confirmation", "--output_dir", output_dir, *TINY, *options, **more)


class Sweep:
    """A sweep running in the background, and its trials' processes by role."""

    def __init__(self, output_dir, *options, command=None, project=PROJECT):
        self.output_dir = output_dir
        self.process = subprocess.Popen(
            command
            or [
                sys.executable,
                project / "sweep.py",
                "launch",
                "--skip_confirmation",
                "--output_dir",
                output_dir,
                *TINY,
                *options,
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def pids(self, trial="trial_0"):
        """{role: pid} of a running trial, once it trains."""

        def running():
            for log in self.output_dir.glob(f"*/*/{trial}/server.log"):
                if "round" in log.read_text():
                    return processes_of(log.parent)
            assert self.process.poll() is None, self.process.stdout.read()

        return wait_until(running)

    def wait(self):
        """Its exit code, and what it printed."""
        output, _ = self.process.communicate(timeout=HUNG)
        return self.process.returncode, output


def processes_of(trial):
    """{role: pid} of the processes that write the trial's logs."""
    roles = {}
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            target = os.readlink(f"/proc/{pid}/fd/1")
        except OSError:
            continue
        if target.startswith(str(trial)):
            roles[os.path.basename(target).removesuffix(".log")] = int(pid)
    return roles


def parent_of(pid):
    """The pid of a process's parent. Raises OSError once it is gone."""
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[1])


def descendants(pid):
    """All processes below `pid`."""
    parents = {}
    for each in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            parents.setdefault(parent_of(each), []).append(int(each))
    found = [pid]
    for each in found:
        found += parents.get(each, [])
    return found[1:]


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until_dead(pids):
    wait_until(lambda: not any(map(is_alive, pids)))


def kill_after(sweep, round):
    """SIGKILL a sweep and all its processes at once, when its trial has begun and made the checkpoint of `round`."""

    def killed():
        for trial in sweep.output_dir.glob("*/*/trial_0"):
            with contextlib.suppress(OSError, ValueError, KeyError, EOFError):
                stored = checkpoint.load(trial) if (trial / CHECKPOINT).exists() else None
                if stored is not None and stored[0]["round"] >= round:
                    for pid in (*processes_of(trial).values(), sweep.process.pid):
                        os.kill(pid, signal.SIGKILL)
                    sweep.wait()
                    return trial

    return wait_until(killed)


def terminal(script, *arguments, **environment):
    return subprocess.Popen(
        [sys.executable, PROJECT / script, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment},
    )
