"""Halving by a real Slurm, whose jobs launch the next rung while nobody is there."""

import functools
import json
import re

import helpers
import pytest
from helpers import call, results, wait_until
from slurm_cluster import HALVED, SLURM, all_idle, queue_is_empty, slurm

from federated.trial import hparams_hash
from hparams_registry import random_hparams

pytestmark = [pytest.mark.process, pytest.mark.slurm, pytest.mark.network]


# Halving: a rung's launch submits its trials and the job that launches the next one before it ends, so that the queue is empty
# only at the end.


@pytest.fixture(scope="module")
def halved(tmp_path_factory):
    """The results of the halved sweep on this machine."""
    out = tmp_path_factory.mktemp("halved")
    assert helpers.launch(functools.partial(call, out), out, *HALVED).returncode == 0
    return results(out)


def next_launch():
    """{state: job} of the launches of a next rung in the queue."""
    listed = slurm("squeue", "-h", "-r", "--format=%T %F %j").splitlines()
    return {line.split()[0]: line.split()[1] for line in listed if " next-" in line}


def submitted(out):
    """(directory, rounds) of each trial that a job ran, the first one first. A launch that is ended as it submits may leave a
    list without a job."""
    lists = [path for path in sorted(out.glob(".slurm/*/trials.jsonl")) if list(path.parent.glob("*.log"))]
    return [(each["directory"], each["settings"]["rounds"]) for path in lists for each in lines_of(path)]


def lines_of(path):
    return [each for line in path.read_text().splitlines() for each in json.loads(line)]


def test_halving_goes_rung_by_rung_while_the_launch_waits(cluster, launch, tmp_path, halved):
    waited = launch(tmp_path / "out", *HALVED, *SLURM, "--wait")
    assert waited.returncode == 0, waited.stderr
    assert results(tmp_path / "out") == halved


@pytest.mark.parametrize("what_happens", ["nothing", "requeue", "requeue as it submits", "node"])
def test_halving_goes_rung_by_rung_with_nobody_there(cluster, launch, run, awkward, halved, what_happens):
    """Each job that launches a rung is ended and requeued once as it runs."""
    out, ended = awkward / "out", set()
    launched = launch(out, *HALVED, *SLURM, "--slurm_args=--cpus-per-task=2 --mem=2G")
    assert launched.returncode == 0 and "launches the next rung" in launched.stderr, launched.stderr
    first = len(list(out.glob(".slurm/sweep-*")))
    while not queue_is_empty():
        job = next_launch().get("RUNNING")
        if what_happens == "nothing" or job is None or job in ended:
            continue
        if what_happens == "requeue as it submits":  # if its end does not come first
            wait_until(
                lambda job=job: len(list(out.glob(".slurm/sweep-*"))) > first or job not in next_launch().values(), every=0.001
            )
        shown = slurm("scontrol", "show", "job", job, check=False)
        assert not shown or ("NumCPUs=1 " in shown and "mem=1G" in shown), shown
        ended.add(job)
        if what_happens != "node":
            slurm("scontrol", "requeue", f"{job}_0", check=False)  # it may have ended
        elif node := slurm("squeue", "-h", "-j", job, "-o", "%N", check=False).strip():
            slurm("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
            slurm("scontrol", "update", f"nodename={node}", "state=resume", check=False)  # it may have come back by itself
    logs = [path.read_text() for path in out.glob(".slurm/next-*/*.log")]
    assert results(out) == halved and (ended or what_happens == "nothing"), logs
    assert len(set(submitted(out))) == len(submitted(out)) == 4 + 2 + 2 * 2 - 2, (submitted(out), logs)
    shown = run("sweep.py", "status", "--output_dir", out, "--num_hparams", 4, "--num_trials", 2).stdout
    assert "Next rung" not in shown and "2 done, 0 incomplete, 0 not launched, 2 stopped" in shown
    assert run("sweep.py", "delete_all", "--output_dir", out, "--skip_confirmation").returncode == 0
    assert list(out.iterdir()) == []
    wait_until(all_idle)


def test_the_launch_of_the_next_rung_is_shown_and_cancelled(cluster, launch, run, tmp_path):
    out = tmp_path / "out"
    held = launch(out, *HALVED, *SLURM, "--slurm_args=--hold", "--algorithm", "Fedavg", "Local")
    assert held.returncode == 0, held.stderr
    shown = run("sweep.py", "status", "--output_dir", out)
    assert len(re.findall(r"Next rung of \S+: job \d+_0 launches it: PENDING \(\w+\)", shown.stdout)) == 2, shown.stdout
    assert "launches it" in json.loads(run("sweep.py", "status", "--output_dir", out, "--json").stdout)[0]["next_launch"]
    before = slurm("squeue", "-h")
    again = launch(out, *HALVED, *SLURM, "--slurm_args=--hold", "--algorithm", "Fedavg", "Local")
    assert again.returncode == 3 and slurm("squeue", "-h") == before, again.stderr
    slurm("scancel", next_launch()["PENDING"])
    again = launch(out, *HALVED, *SLURM, "--slurm_args=--hold", "--algorithm", "Fedavg", "Local")
    assert again.returncode == 3 and "launches the next rung" in again.stderr and next_launch(), again.stderr
    more = launch(out, *HALVED, *SLURM, "--slurm_args=--hold", "--num_hparams", 5, "--algorithm", "Fedavg")
    assert more.returncode == 0 and len(slurm("squeue", "-h", "-r").splitlines()) == 9 + 2, more.stderr
    deleted = run("sweep.py", "delete_incomplete", "--output_dir", out, "--algorithm", "Local", "--skip_confirmation")
    assert (
        "Cancelling the launch of the next rung of" in deleted.stderr and len(slurm("squeue", "-h", "-r").splitlines()) == 5 + 1
    )
    deleted = run("sweep.py", "delete_all", "--output_dir", out, "--skip_confirmation")
    assert queue_is_empty() and list(out.iterdir()) == [], deleted.stderr


def test_a_trial_of_a_rung_that_failed_holds_up_its_sweep_alone(cluster, launch, run, tmp_path, halved):
    """And is launched again by the user alone."""
    out, name = tmp_path / "out", hparams_hash(random_hparams("Fedavg", "digits", 1))
    sweep_dir = out / next(iter(halved)).partition("/")[0]
    (sweep_dir / name).mkdir(parents=True)
    (sweep_dir / name / "trial_0").write_text("a file in place of a directory")
    options = ("--algorithm", "Fedavg", "Local")
    assert launch(out, *HALVED, *SLURM, *options).returncode == 0
    wait_until(queue_is_empty)
    assert len(submitted(out)) == len(set(submitted(out)))
    logs = [path.read_text() for path in sorted(out.glob(".slurm/next-*/*.log"))]
    assert f"waits at 1 rounds for {sweep_dir / name / 'trial_0'}: launch again." in logs[0] and "waits at" in logs[-1]
    (other,) = (each for each in out.iterdir() if "_Local" in each.name)
    assert len(list(other.rglob("done"))) == 4 + 2 and not [each for each in submitted(out)[8:] if "Fedavg" in each[0]]
    assert "has ended" in run("sweep.py", "status", "--output_dir", out).stdout
    (sweep_dir / name / "trial_0").unlink()
    assert launch(out, *HALVED, *SLURM, *options).returncode == 0
    wait_until(queue_is_empty)
    assert {path: each for path, each in results(out).items() if path.startswith(sweep_dir.name)} == halved
