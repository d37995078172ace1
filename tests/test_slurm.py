"""A real Slurm of two nodes on this machine. The packages are installed where they may be."""

import json
import os
import re
import socket
import subprocess
import time

import pytest
from conftest import cannot, need_programs
from test_sweep import results

COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch")

MUNGE = {
    "key-file": "key", "socket": "munge.sock", "pid-file": "munged.pid", "log-file": "munged.log", "seed-file": "seed",
}  # fmt: skip
# A requeued job begins again seconds later with cred_expire=5; with 3 it did not within a minute, and without it took two.
CONFIG = """ClusterName=fake
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort=26917
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={dir}/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/spool/%n
SlurmctldPidFile={dir}/slurmctld.pid
SlurmdPidFile={dir}/slurmd-%n.pid
SlurmctldLogFile={dir}/slurmctld.log
SlurmdLogFile={dir}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MpiDefault=none
ReturnToService=2
KillWait=5
MaxArraySize=3
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[26918-26919] CPUs=4 RealMemory=16000 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2
SlurmdParameters=config_overrides
"""


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    need_programs(COMMANDS, ["slurm-wlm", "munge"])
    if os.geteuid():
        cannot("only root can start a Slurm cluster")
    directory = tmp_path_factory.mktemp("slurm")
    for parent in (directory, directory.parent, directory.parent.parent):
        parent.chmod(0o755)  # munged distrusts others
    for name in ("state", "spool"):
        (directory / name).mkdir()
    (directory / "key").write_bytes(os.urandom(1024))
    (directory / "key").chmod(0o400)
    conf = directory / "slurm.conf"
    conf.write_text(CONFIG.format(dir=directory, host=socket.gethostname().split(".")[0]))
    started = []
    before = os.environ.get("SLURM_CONF")
    try:
        for command in (
            ["munged", "--foreground", "--force", *(f"--{name}={directory / path}" for name, path in MUNGE.items())],
            ["slurmctld", "-D", "-f", str(conf)],
            ["slurmd", "-D", "-f", str(conf), "-N", "n1"],
            ["slurmd", "-D", "-f", str(conf), "-N", "n2"],
        ):
            with open(directory / f"{command[0]}.out", "ab") as output:
                started.append(subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL))
            time.sleep(0.5)
        os.environ["SLURM_CONF"] = str(conf)
        wait_until(lambda: slurm("sinfo", "-h", "-o", "%T %D", check=False).strip() == "idle 2")
        yield directory
        slurm("scancel", "--user=root", check=False)
        wait_until(lambda: not slurm("squeue", "-h"), 20)
    finally:
        for process in reversed(started):
            process.terminate()
        for process in started:
            process.wait(20)
        os.environ.pop("SLURM_CONF", None)
        if before is not None:
            os.environ["SLURM_CONF"] = before


def slurm(*command, check=True):
    return subprocess.run(command, capture_output=True, text=True, check=check).stdout


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.1)


LONG = ("--rounds", 600, "--num_hparams", 1, "--checkpoint_seconds", 0)
SLURM = ("--command_launcher", "slurm")


def begun(out):
    """The trial of `out`, once it has made a checkpoint."""
    wait_until(lambda: list(out.glob("*/*/trial_0/checkpoint.npz")))
    return next(out.glob("*/*/trial_0"))


def array_of(launched):
    return re.search(r"Submitted job (\d+)", launched.stderr)[1]


def assert_it_went_on(trial):
    runs = json.loads((trial / "client_0" / "results.json").read_text())["provenance"]["runs"]
    assert len(runs) == 2 and runs[1]["round"] > 0, runs


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return {}


def same_as_local(launch, tmp_path, undisturbed, out):
    if not undisturbed:
        assert launch(tmp_path / "local", *LONG).returncode == 0
        undisturbed.update(results(tmp_path / "local"))
    assert results(out) == undisturbed and len(undisturbed) == 2


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

    waited = launch(out, *options, *SLURM, "--wait", "--trials_per_job", 2)
    assert waited.returncode == 0, waited.stderr
    assert launch(tmp_path / "local", *options).returncode == 0
    assert results(out) == results(tmp_path / "local") and len(results(out)) == 8
    assert run("sweep.py", "delete_all", "--output_dir", out, *options, "--skip_confirmation").returncode == 0
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("how", ["requeue", "preemption"])
def test_what_is_requeued_goes_on_to_the_same_bits(cluster, launch, tmp_path, undisturbed, how):
    out = tmp_path / "out"
    job = f"{array_of(launch(out, *LONG, *SLURM))}_0"
    trial = begun(out)
    if how == "requeue":
        slurm("scontrol", "requeue", job)
    else:
        slurm("sbatch", "-p", "urgent", "-N", "2", "--exclusive", "--wrap", "sleep 1", "-o", "/dev/null")
    wait_until(lambda: len(list(trial.glob("client_*/done"))) == 2)
    assert_it_went_on(trial)
    same_as_local(launch, tmp_path, undisturbed, out)


@pytest.mark.parametrize("how", ["scancel", "before the limit", "node"])
def test_what_was_ended_says_why_and_goes_on(cluster, launch, run, tmp_path, undisturbed, how):
    out = tmp_path / "out"
    job = f"{array_of(launch(out, *LONG, *SLURM, '--slurm_args=--no-requeue'))}_0"
    trial = begun(out)
    node = slurm("squeue", "-h", "-j", job, "-o", "%N").strip()
    if how == "scancel":
        slurm("scancel", job)
    elif how == "node":
        slurm("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    else:
        slurm("scancel", "--signal=TERM", "--batch", job)  # which is how the limit is told
    wait_until(lambda: not slurm("squeue", "-h", "-j", job, check=False))
    if how == "node":
        slurm("scontrol", "update", f"nodename={node}", "state=resume", check=False)  # it may have come back by itself
    status = run("sweep.py", "status", "--output_dir", out, "--num_hparams", 1, "--num_trials", 1)
    told = {"scancel": "CANCELLED", "node": "NODE_FAIL", "before the limit": "was told to end"}[how]
    assert "1 incomplete" in status.stdout and told in status.stdout, status.stdout
    waited = launch(out, *LONG, *SLURM, "--wait")
    assert waited.returncode == 0, waited.stderr
    assert_it_went_on(trial)
    same_as_local(launch, tmp_path, undisturbed, out)
