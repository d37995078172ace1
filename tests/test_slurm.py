"""Sweeps by a real Slurm of two nodes on this machine."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from helpers import AWKWARD_DATA, AWKWARD_OUT, PROJECT, TINY, results, wait_until
from slurm_cluster import HALVED, SIZE, SLURM, array_of, queue_is_empty, slurm

from federated.trial import EVENTS, MODEL

pytestmark = [pytest.mark.process, pytest.mark.slurm, pytest.mark.network]


def test_the_workflow(cluster, launch, run, awkward, tmp_path):
    out, options = awkward / "out", ("--num_hparams", 2, "--num_trials", 2)
    held = launch(out, *options, *SLURM, "--slurm_args=--hold", "--trials_per_job", 1, "--jobs", 2)
    assert held.returncode == 0 and len(re.findall("Submitted job", held.stderr)) == 2, held.stderr  # MaxArraySize is 3
    status = run("sweep.py", "status", "--output_dir", out, *options)
    assert "2 jobs: 0 done, 0 incomplete, 0 not launched, 2 queued.\n" in status.stdout and "JobHeldUser" in status.stdout
    again = launch(out, *options, *SLURM)
    assert again.returncode == 3 and "queued" in again.stderr
    deleted = run("sweep.py", "delete_all", "--output_dir", out, *options)
    assert deleted.returncode == 2 and "--skip_confirmation" in deleted.stderr
    deleted = run("sweep.py", "delete_all", "--output_dir", out, *options, "--skip_confirmation")
    assert "cancel 4 trials" in deleted.stderr and not slurm("squeue", "-h"), deleted.stderr
    assert list(out.iterdir()) == []

    waited = launch(out, *options, *SLURM, "--wait", "--trials_per_job", 2, "--save_model", "--tensorboard")
    assert waited.returncode == 0, waited.stderr
    assert len(list(out.rglob(MODEL))) == len(list(out.rglob(EVENTS))) == 4
    assert launch(tmp_path / "local", *options).returncode == 0
    assert results(out) == results(tmp_path / "local") and len(results(out)) == 4
    assert run("sweep.py", "delete_all", "--output_dir", out, *options, "--skip_confirmation").returncode == 0
    assert list(out.iterdir()) == []


def test_the_example(cluster, launch, run, tmp_path):
    file, here = f"@{PROJECT / 'examples' / 'fashion_on_slurm.txt'}", ("--output_dir", tmp_path / "out", "--num_trials", 1)
    tiny = ("--dataset", "digits", "--model_arch", "mlp", "--samples_per_client", 20, "--rounds", 1, "--num_hparams", 1, *here)
    waited = launch(tmp_path / "out", file, *tiny, "--wait")
    assert waited.returncode == 0 and "Submitted job" in waited.stderr, waited.stderr
    assert "\n6 jobs: 6 done" in run("sweep.py", "status", file, *tiny).stdout
    table = run("collect_results.py", "--output_dir", tmp_path / "out", "--columns", "partition_alpha").stdout
    assert "| Ditto       | " in table and "| partition_alpha=0.1" in table
    assert "Deleted 6 jobs!" in run("sweep.py", "delete_all", file, *tiny, "--skip_confirmation").stderr


def test_jobs_run_ones_own_code_as_it_was_at_the_launch(cluster, launch, run, awkward, tmp_path):
    """With a file that it imports, and one more extension beside it that imports the same."""
    study, helper, other, out = (awkward / name for name in ("my study.py", "factor.py", "other.py", "out"))
    helper.write_text("FACTOR = 0.5\n")
    other.write_text("import factor\n")
    study.write_text(
        "from factor import FACTOR\n"
        "from federated import algorithms\n"
        "@algorithms.register\n"
        "class Halfway(algorithms.Fedavg):\n"
        "    def step(self, server, average):\n"
        "        server.weights.lerp_(average[0], FACTOR)\n"
    )
    options = ("--extension", study, other, "--algorithm", "halfway", "--num_hparams", 1)
    assert launch(tmp_path / "local", *options).returncode == 0
    held = launch(out, *options, *SLURM, "--slurm_args=--hold")
    assert held.returncode == 0, held.stderr
    helper.write_text("FACTOR = 0.25\n")
    study.unlink()
    slurm("scontrol", "release", array_of(held))
    wait_until(lambda: list(out.glob("*/*/trial_0/done")) or list(out.glob("*/*/trial_0/failed.json")))
    assert results(out) == results(tmp_path / "local") and len(results(out)) == 1
    (there, here) = (
        json.loads(next(each.rglob("results.json")).read_text())["provenance"] for each in (out, tmp_path / "local")
    )
    assert there["runs"][0]["code"] == here["runs"][0]["code"] and there["extensions"] == here["extensions"]
    assert there["extensions"][0]["path"] == str(study)
    wait_until(lambda: not slurm("squeue", "-h"))
    assert run("sweep.py", "delete_all", "--output_dir", out, "--skip_confirmation").returncode == 0
    assert list(out.iterdir()) == []


# Each would have a command of Slurm hide jobs, print them otherwise, or submit something else
ENVIRONMENT = {
    "SQUEUE_PARTITION": "urgent", "SQUEUE_STATES": "FAILED", "SQUEUE_FORMAT": "%i", "SQUEUE_NAMES": "none",
    "SCANCEL_PARTITION": "urgent", "SCANCEL_NAME": "none", "SLURM_CLUSTERS": "elsewhere", "SLURM_JOB_ID": "1",
    "SBATCH_WAIT": "1", "SBATCH_CLUSTERS": "elsewhere", "SBATCH_NO_REQUEUE": "1", "SBATCH_ARRAY_INX": "7",
    "SBATCH_JOB_NAME": "mine", "SBATCH_OUTPUT": "/dev/null", "SBATCH_ERROR": "/dev/null", "SBATCH_OPEN_MODE": "t",
}  # fmt: skip


def test_what_the_environment_asks_of_slurm_changes_nothing(cluster, launch, run, tmp_path):
    out, environment = tmp_path / "out", {"env": os.environ | ENVIRONMENT}
    held = launch(out, *SLURM, "--slurm_args=--hold", **environment)
    assert held.returncode == 0, held.stderr
    array = array_of(held)
    shown = slurm("scontrol", "show", "job", f"{array}_0")
    assert "Requeue=1" in shown and f"StdErr={out}/.slurm/" in shown, shown
    again = launch(out, *SLURM, **environment)
    assert again.returncode == 3 and "queued" in again.stderr, again.stderr
    deleted = run("sweep.py", "delete_all", "--output_dir", out, "--skip_confirmation", **environment)
    assert "cancel 2 trials" in deleted.stderr and not slurm("squeue", "-h"), deleted.stderr
    assert list(out.iterdir()) == []


def test_directories_whose_names_look_like_something_else(cluster, run, tmp_path):
    """Slurm's own patterns, what splits a script and an option, and what a shell reads."""
    (tmp_path / AWKWARD_DATA).mkdir()
    options = [*TINY, "--num_hparams", 1, "--num_trials", 1, f"--output_dir={AWKWARD_OUT}", f"--data_dir={AWKWARD_DATA}"]
    done = run("sweep.py", "launch", "--skip_confirmation", *options, *SLURM, "--wait")
    assert done.returncode == 0, done.stderr
    assert len(results(tmp_path / AWKWARD_OUT)) == 1
    (log,) = (tmp_path / AWKWARD_OUT / ".slurm").glob("*/*.log")
    assert re.fullmatch(r"\d+_0\.log", log.name)
    assert run("sweep.py", "delete_all", f"--output_dir={AWKWARD_OUT}", "--skip_confirmation").returncode == 0
    assert not list((tmp_path / AWKWARD_OUT).iterdir())


def test_a_backslash_is_refused_before_anything_is_made(cluster, launch, tmp_path):
    refused = launch(tmp_path / "a\\b", *SLURM)
    assert refused.returncode == 2 and "Slurm takes the backslash" in refused.stderr.splitlines()[-1]
    assert not (tmp_path / "a\\b").exists()


def test_the_lock_of_a_job_on_another_node_holds_until_the_job_has_ended(cluster, launch, run, tmp_path):
    out = tmp_path / "out"
    assert launch(out, "--num_hparams", 1).returncode == 0
    (trial,) = out.glob("*/*/trial_0")
    (trial / "done").unlink()
    job = slurm("sbatch", "--parsable", "--wrap", "sleep 600", "-o", "/dev/null").strip()
    wait_until(lambda: "RUNNING" in slurm("squeue", "-h", "-j", job, "-o", "%T"))
    owner = {"host": f"elsewhere in Slurm job {job} of cluster fake", "pid": 1, "started": "7"}
    (trial / "lock").write_text(json.dumps(owner))
    assert run("sweep.py", "status", "--output_dir", out, *SIZE).stdout.startswith("Running: ")
    assert launch(out, "--num_hparams", 1).returncode == 3
    slurm("scancel", job)
    wait_until(lambda: not slurm("squeue", "-h", "-j", job, check=False))
    assert run("sweep.py", "status", "--output_dir", out, *SIZE).stdout.startswith("Incomplete: ")
    assert launch(out, "--num_hparams", 1).returncode == 0


def test_jobs_run_the_code_as_it_was_at_the_launch(cluster, tmp_path, copy_of_project):
    """The checkout is edited and then gone while they wait."""
    out, command = tmp_path / "out", [sys.executable, copy_of_project / "sweep.py"]
    size = [*map(str, TINY), "--output_dir", out]
    subprocess.run([*command, "launch", *size, *SLURM, "--slurm_args=--hold", "--skip_confirmation"], check=True, cwd=tmp_path)
    (copy_of_project / "federated" / "learning" / "worker.py").write_text("raise SystemExit('the code as it is now')")
    shutil.move(copy_of_project, tmp_path / "gone")
    slurm("scontrol", "release", slurm("squeue", "-h", "-o", "%F").split()[0])
    wait_until(lambda: len(list(out.glob("*/*/*/done"))) == 2)


@pytest.mark.parametrize("options", [(), HALVED])
def test_what_the_dry_run_prints_submits_the_same(cluster, launch, tmp_path, awkward, options):
    out = awkward / "out"
    printed = launch(out, "--command_launcher", "dry_run", "--dry_run_of", "slurm", "--num_trials", 2, *options)
    assert printed.returncode == 0 and not list(out.glob("*")), printed.stderr
    _, _, commands = printed.stdout.partition("not launched.\n")
    done = subprocess.run(["bash", "-e"], input=commands, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    wait_until(queue_is_empty)
    assert launch(tmp_path / "local", "--num_trials", 2, *options).returncode == 0
    assert results(out) == results(tmp_path / "local") != {}


def test_a_sweep_in_the_queue_is_watched(cluster, launch, run, tmp_path):
    out = tmp_path / "out"
    array = array_of(launch(out, *SIZE, *SLURM, "--slurm_args=--hold"))
    watch = [sys.executable, PROJECT / "sweep.py", "status", "--watch", "--output_dir", out, *map(str, SIZE)]
    with subprocess.Popen(watch, stdout=subprocess.PIPE, text=True) as watching:
        lines = iter(watching.stdout.readline, "")
        assert any("1 queued" in line for line in lines)
        slurm("scontrol", "release", array)
        assert "1/1 trials done, 0 running, 0 failed" in list(lines)[-1]
