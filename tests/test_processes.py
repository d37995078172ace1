import subprocess
import sys

import pytest
from helpers import HUNG, PROJECT


@pytest.mark.slow
@pytest.mark.process
def test_forks_find_everything_imported(tmp_path):
    """From a directory that is not the project's."""
    (tmp_path / "probe.py").write_text(f"""
import sys
sys.path.insert(0, {str(PROJECT)!r})
from federated.running.processes import ForkedProcess, preload

EVENTS = "federated.learning.tensorboard_events"

def imported():
    print(*({{"torch", "server_benchmark", "client_benchmark", EVENTS}} & sys.modules.keys()), flush=True)

if __name__ == "__main__":
    preload([], [EVENTS])
    process = ForkedProcess._context.Process(target=imported)
    process.start()
    process.join()
    assert "torch" not in sys.modules
""")
    found = subprocess.run([sys.executable, "probe.py"], cwd=tmp_path, capture_output=True, text=True, timeout=HUNG, check=True)
    assert sorted(found.stdout.split()) == [
        "client_benchmark",
        "federated.learning.tensorboard_events",
        "server_benchmark",
        "torch",
    ], found.stderr


@pytest.mark.process
def test_a_trial_sees_only_its_gpu(tmp_path, monkeypatch):
    """No GPU is needed: the trials' processes say what they were given. The ids are those of a machine with two GPUs."""
    import command_launchers
    import sweep
    from federated.running import resources

    given = {}
    monkeypatch.setattr(resources, "gpus", lambda: ["GPU-a", "GPU-b"])

    class Start(command_launchers.SpawnedProcess):
        def __init__(self, command, log, environment):
            super().__init__(
                [sys.executable, "-c", "import os; print(os.environ['CUDA_VISIBLE_DEVICES']); exit(1)"], log, environment
            )
            given[log] = environment

    monkeypatch.setattr(command_launchers.LocalParallel, "start", Start)
    monkeypatch.setattr(command_launchers, "preload", lambda *_: None)
    out = str(tmp_path / "out")
    options = ["launch", "--skip_confirmation", "--output_dir", out, "--num_hparams", "1", "--num_trials", "4"]
    assert sweep.main(options) == 1
    said = set("".join(log.read_text() for log in given).split())  # a client may be ended before it speaks
    assert said == {"GPU-a", "GPU-b"}
    by_trial = {}
    for log, environment in given.items():
        by_trial.setdefault(log.parent.name, set()).add(environment["CUDA_VISIBLE_DEVICES"])
    assert len(by_trial) == 4 and all(len(devices) == 1 for devices in by_trial.values())


VERSION_2 = ("cpu.max", "100000 100000\n", "max 100000\n"), ("memory.max", "123456789\n", "max\n")
# As RHEL 8 has them: no limit is -1 and the largest number of whole pages
VERSION_1 = (
    ("cpu/cpu.cfs_quota_us", "100000\n", "-1\n"),
    ("memory/memory.limit_in_bytes", "123456789\n", "9223372036854771712\n"),
)


@pytest.mark.parametrize(("cpu", "memory"), [VERSION_2, VERSION_1])
def test_a_cgroup_limits_cores_and_memory(tmp_path, monkeypatch, cpu, memory):
    from federated.running import resources

    monkeypatch.setattr(resources, "CGROUPS", tmp_path)
    unlimited = resources.cores()
    assert unlimited >= 1
    for name, limit, _ in (cpu, memory, ("cpu/cpu.cfs_period_us", "100000\n", "")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(limit)
    assert (resources.cores(), resources.memory()) == (1, 123456789)
    (tmp_path / cpu[0]).write_text(cpu[1].replace("100000", "50000", 1))
    assert resources.cores() == 1
    for name, _, no_limit in (cpu, memory):
        (tmp_path / name).write_text(no_limit)
    assert resources.cores() == unlimited and resources.memory() > 123456789


def test_slurm_grants_memory_by_the_node_or_by_the_core(monkeypatch):
    from federated.running import resources

    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "2")
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "50")
    assert resources.memory() == 100 << 20
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "30")
    monkeypatch.delenv("SLURM_MEM_PER_CPU")
    assert resources.memory() == 30 << 20
