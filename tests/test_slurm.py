"""A real Slurm of two nodes on this machine."""

import functools
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types

import helpers
import pytest
from helpers import AWKWARD_DATA, AWKWARD_OUT, HUNG, PROJECT, TINY, call, cannot, results, wait_until

from federated.trial import EVENTS, MODEL, hparams_hash
from hparams_registry import random_hparams

pytestmark = [pytest.mark.process, pytest.mark.slurm, pytest.mark.network]

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
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherParams=OverMemoryKill
JobAcctGatherFrequency=task=1
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MpiDefault=none
ReturnToService=2
KillWait=5
MinJobAge=15
SlurmdTimeout=10
MaxArraySize=3
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[26918-26919] CPUs=4 RealMemory=16000 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2
SlurmdParameters=config_overrides
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, need_programs):
    need_programs(COMMANDS, ["slurm-wlm", "munge"])
    if os.geteuid():
        cannot("only root can start a Slurm cluster")
    directory = tmp_path_factory.mktemp("slurm")
    for parent in (directory, *directory.parents[: -len(pathlib.Path(tempfile.gettempdir()).parts)]):
        parent.chmod(0o755)  # munged distrusts others
    for name in ("state", "spool"):
        (directory / name).mkdir()
    (directory / "key").write_bytes(os.urandom(1024))
    (directory / "key").chmod(0o400)
    conf = directory / "slurm.conf"
    conf.write_text(CONFIG.format(dir=directory, host=socket.gethostname().split(".")[0]))
    commands = {
        "munged": ["munged", "--foreground", "--force", *(f"--{name}={directory / path}" for name, path in MUNGE.items())],
        "slurmctld": ["slurmctld", "-D", "-f", str(conf)],
        "n1": ["slurmd", "-D", "-f", str(conf), "-N", "n1"],
        "n2": ["slurmd", "-D", "-f", str(conf), "-N", "n2"],
    }
    started = {}

    def start(name):
        with open(directory / f"{name}.out", "ab") as output:
            started[name] = subprocess.Popen(commands[name], stdout=output, stderr=output, stdin=subprocess.DEVNULL)
        time.sleep(0.5)

    before = os.environ.get("SLURM_CONF")
    try:
        for name in commands:
            start(name)
        os.environ["SLURM_CONF"] = str(conf)
        wait_until(all_idle)
        yield types.SimpleNamespace(start=start, started=started)
        slurm("scancel", "--user=root", check=False)
        wait_until(lambda: not slurm("squeue", "-h"))
    finally:
        for process in reversed(started.values()):
            process.terminate()
        for process in started.values():
            process.wait(HUNG)
        os.environ.pop("SLURM_CONF", None)
        if before is not None:
            os.environ["SLURM_CONF"] = before


def slurm(*command, check=True):
    return subprocess.run(command, capture_output=True, text=True, check=check).stdout


def all_idle():
    return slurm("sinfo", "-h", "-o", "%T %D", check=False).strip() == "idle 2"


LONG = ("--rounds", 600, "--num_hparams", 1, "--checkpoint_seconds", 0)
SLURM = ("--command_launcher", "slurm")


def begun(out):
    """The trial of `out`, once it has made a checkpoint."""
    wait_until(lambda: list(out.glob("*/*/trial_0/checkpoint.npz")))
    return next(out.glob("*/*/trial_0"))


def array_of(launched):
    return re.search(r"Submitted job (\d+)", launched.stderr)[1]


def assert_it_went_on(trial, once=True):
    runs = json.loads((trial / "results.json").read_text())["provenance"]["runs"]
    assert (len(runs) == 2 if once else len(runs) >= 2) and all(run["round"] > 0 for run in runs[1:]), runs


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return {}


def same_as_local(launch, tmp_path, undisturbed, out):
    if not undisturbed:
        assert launch(tmp_path / "local", *LONG).returncode == 0
        undisturbed.update(results(tmp_path / "local"))
    assert results(out) == undisturbed and len(undisturbed) == 1


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


# Halving: a rung's launch submits its trials and the job that launches the next one before it ends, so that the queue is empty
# only at the end.

HALVED = ("--rounds", 4, "--num_hparams", 4, "--num_trials", 2, "--halving", 2, "--min_rounds", 1)


@pytest.fixture(scope="module")
def halved(tmp_path_factory):
    """The results of the halved sweep by local_sequential."""
    out = tmp_path_factory.mktemp("halved")
    start = functools.partial(call, out)
    assert helpers.launch(start, out, *HALVED, "--command_launcher", "local_sequential").returncode == 0
    return results(out)


def queue_is_empty():
    return not slurm("squeue", "-h")


def next_launch():
    """{state: job} of the launches of a next rung in the queue."""
    listed = slurm("squeue", "-h", "-r", "--format=%T %F %j").splitlines()
    return {line.split()[0]: line.split()[1] for line in listed if " next-" in line}


def submitted(out):
    """(directory, rounds) of each trial that was submitted, the first one first."""
    lists = sorted(out.glob(".slurm/*/trials.jsonl"))
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


def lose(cluster, node):
    """Have the machine go away, with all that runs on it: the trial there is the only one."""
    listed = [line.split(None, 2) for line in slurm("ps", "-eo", "pid=,ppid=,args=").splitlines()]
    lost = {pid for pid, _, command in listed if command.startswith("slurmstepd")}
    while more := {pid for pid, parent, _ in listed if parent in lost} - lost:
        lost |= more
    lost = [cluster.started[node].pid, *map(int, lost)]
    for what in (signal.SIGSTOP, signal.SIGKILL):  # none sees another end
        for pid in lost:
            os.kill(pid, what)
    cluster.started[node].wait()


@pytest.mark.parametrize("how", ["requeue", "preemption", "limit", "node"])
def test_what_is_ended_and_requeued_goes_on_to_the_same_bits(cluster, launch, tmp_path, undisturbed, how):
    out = tmp_path / "out"
    limit = ["--slurm_args=--time=1 --signal=B:TERM@10"] * (how == "limit")
    job = f"{array_of(launch(out, *LONG, *SLURM, *limit))}_0"
    trial = begun(out)
    if how == "requeue":
        slurm("scontrol", "requeue", job)
    elif how == "preemption":
        slurm("sbatch", "-p", "urgent", "-N", "2", "--exclusive", "--wrap", "sleep 1", "-o", "/dev/null")
    elif how == "limit":
        os.kill(json.loads((trial / "lock").read_text())["pid"], signal.SIGSTOP)  # so that the trial is not done before
    else:
        node = slurm("squeue", "-h", "-j", job, "-o", "%N").strip()
        lose(cluster, node)
    wait_until(lambda: (trial / "done").exists(), seconds=5 * HUNG)  # a busy machine may come to the limit again
    if how == "node":
        cluster.start(node)
    assert_it_went_on(trial, once=how != "limit")
    same_as_local(launch, tmp_path, undisturbed, out)
    wait_until(all_idle)


SIZE = ("--num_hparams", 1, "--num_trials", 1)


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
