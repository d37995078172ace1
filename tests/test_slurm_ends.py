"""Jobs of a real Slurm that end before their trials: they are requeued, or say why they ended, and the trials resume."""

import contextlib
import json
import os
import pathlib
import signal

import pytest
from helpers import descendants, results, wait_until
from slurm_cluster import SIZE, SLURM, all_idle, array_of, slurm

pytestmark = [pytest.mark.process, pytest.mark.slurm, pytest.mark.network]


LONG = ("--rounds", 300, "--num_hparams", 1, "--checkpoint_seconds", 0)


def begun(out):
    """The trial of `out`, once it has made a checkpoint."""
    wait_until(lambda: list(out.glob("*/*/trial_0/checkpoint.npz")))
    return next(out.glob("*/*/trial_0"))


def assert_it_went_on(trial):
    runs = json.loads((trial / "results.json").read_text())["provenance"]["runs"]
    assert len(runs) == 2 and runs[1]["round"] > 0, runs


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return {}


def same_as_local(launch, tmp_path, undisturbed, out):
    if not undisturbed:
        assert launch(tmp_path / "local", *LONG, "--checkpoint_seconds", 10).returncode == 0
        undisturbed.update(results(tmp_path / "local"))
    assert results(out) == undisturbed and len(undisturbed) == 1


def processes_that_opened(path):
    """Their pids."""
    found = set()
    for opened in pathlib.Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.readlink(opened) == path:
                found.add(int(opened.parts[2]))
    return found


def lose(cluster, node):
    """Have the machine go away, with all that runs on it."""
    log = str(cluster.directory / f"slurmd-{node}.log")
    of_jobs = [pid for pid in processes_that_opened(log) if pid != cluster.started[node].pid]
    lost = {cluster.started[node].pid, *of_jobs, *(below for pid in of_jobs for below in descendants(pid))}
    for what in (signal.SIGSTOP, signal.SIGKILL):  # none sees another end
        for pid in lost:
            os.kill(pid, what)
    cluster.started[node].wait()


@pytest.mark.parametrize("how", ["requeue", "preemption", "limit", "node"])
def test_what_is_ended_and_requeued_goes_on_to_the_same_bits(cluster, launch, tmp_path, undisturbed, how):
    out = tmp_path / "out"
    job = f"{array_of(launch(out, *LONG, *SLURM))}_0"
    trial = begun(out)
    if how == "requeue":
        slurm("scontrol", "requeue", job)
    elif how == "preemption":
        slurm("sbatch", "-p", "urgent", "-N", "2", "--exclusive", "--wrap", "sleep 1", "-o", "/dev/null")
    elif how == "limit":
        os.kill(json.loads((trial / "lock").read_text())["pid"], signal.SIGSTOP)  # so that the trial is not done before
        minutes = int(slurm("squeue", "-h", "-j", job, "-O", "TimeUsed").partition(":")[0])
        slurm("scontrol", "update", f"jobid={job}", f"timelimit={minutes + 2}")
        wait_until(lambda: "Restarts=1" in slurm("scontrol", "show", "job", job))
        slurm("scontrol", "update", f"jobid={job}", "timelimit=infinite")  # a busy machine might come to the limit again
    else:
        node = slurm("squeue", "-h", "-j", job, "-o", "%N").strip()
        lose(cluster, node)
    wait_until(lambda: (trial / "done").exists())
    if how == "node":
        cluster.start(node)
    assert_it_went_on(trial)
    same_as_local(launch, tmp_path, undisturbed, out)
    wait_until(all_idle)


@pytest.mark.parametrize("how", ["scancel", "before the limit", "node", "memory"])
def test_what_was_ended_says_why_and_goes_on(cluster, launch, run, tmp_path, undisturbed, how):
    """That of memory also when Slurm has forgotten the job."""
    out = tmp_path / "out"
    more = " --mem=300M" if how == "memory" else ""
    array = array_of(launch(out, *LONG, *SLURM, f"--slurm_args=--no-requeue{more}"))
    job = f"{array}_0"
    if how != "memory":
        trial = begun(out)
        node = slurm("squeue", "-h", "-j", job, "-o", "%N").strip()
    if how == "scancel":
        slurm("scancel", job)
    elif how == "node":
        slurm("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    elif how == "before the limit":
        slurm("scancel", "--signal=TERM", "--batch", job)  # which is how the limit is told
    wait_until(lambda: not slurm("squeue", "-h", "-j", job, check=False))
    if how == "node":
        slurm("scontrol", "update", f"nodename={node}", "state=resume", check=False)  # it may have come back by itself
    told = {"scancel": "CANCELLED", "node": "NODE_FAIL", "memory": "xceeded", "before the limit": "got a signal to end"}[how]
    state = "0 done" if how == "memory" else "1 incomplete"  # the limit of memory may come before the trial has begun
    status = run("sweep.py", "status", "--output_dir", out, *SIZE)
    assert state in status.stdout and told in status.stdout, status.stdout
    if how == "memory":
        wait_until(lambda: array not in slurm("squeue", "-h", "--states=all", "-o", "%F"))
        status = run("sweep.py", "status", "--output_dir", out, *SIZE)
        assert state in status.stdout and told in status.stdout, status.stdout
    waited = launch(out, *LONG, *SLURM, "--wait")
    assert waited.returncode == 0, waited.stderr
    if how != "memory":
        assert_it_went_on(trial)
    same_as_local(launch, tmp_path, undisturbed, out)
