"""A real Slurm of two nodes on this machine, and what its tests ask of it. The fixture that starts it is in conftest.py."""

import contextlib
import os
import pathlib
import re
import socket
import subprocess
import tempfile
import time
import types

from helpers import HUNG, wait_until

COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch")

MUNGE = {
    "key-file": "key", "socket": "munge.sock", "pid-file": "munged.pid", "log-file": "munged.log", "seed-file": "seed",
}  # fmt: skip
FIRST_PORT = 26917  # of the first worker of pytest-xdist; Linux gives none of these to a client's connection
# A requeued job begins again seconds later with cred_expire=5; with 3 it did not within a minute, and without it took two.
CONFIG = """ClusterName=fake
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
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
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}] CPUs=4 RealMemory=16000 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2
SlurmdParameters=config_overrides
"""


@contextlib.contextmanager
def running(directory):
    """Starts the cluster. Yields start(name), its processes as started[name], and the directory of its files."""
    for parent in (directory, *directory.parents[: -len(pathlib.Path(tempfile.gettempdir()).parts)]):
        parent.chmod(0o755)  # munged distrusts others
    for name in ("state", "spool"):
        (directory / name).mkdir()
    (directory / "key").write_bytes(os.urandom(1024))
    (directory / "key").chmod(0o400)
    conf = directory / "slurm.conf"
    first = FIRST_PORT + 3 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    conf.write_text(CONFIG.format(dir=directory, host=socket.gethostname().split(".")[0], ports=range(first, first + 3)))
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
        yield types.SimpleNamespace(start=start, started=started, directory=directory)
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


def queue_is_empty():
    return not slurm("squeue", "-h")


def array_of(launched):
    return re.search(r"Submitted job (\d+)", launched.stderr)[1]


# Options of a launch

SLURM = ("--command_launcher", "slurm")
SIZE = ("--num_hparams", 1, "--num_trials", 1)
HALVED = ("--rounds", 4, "--num_hparams", 4, "--num_trials", 2, "--halving", 2, "--min_rounds", 1)
