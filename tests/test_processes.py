import subprocess
import sys

from conftest import PROJECT


def test_forks_find_everything_imported(tmp_path):
    """From a directory that is not the project's."""
    (tmp_path / "probe.py").write_text(f"""
import sys
sys.path.insert(0, {str(PROJECT)!r})
from federated.processes import Warm

def imported():
    names = {{"torch", "server_benchmark", "client_benchmark", "federated.learning.tensorboard_events"}}
    print(*(names & sys.modules.keys()), flush=True)

if __name__ == "__main__":
    from command_launchers import preload
    preload([], ["federated.learning.tensorboard_events"])
    process = Warm._context.Process(target=imported)
    process.start()
    process.join()
    assert "torch" not in sys.modules
""")
    found = subprocess.run([sys.executable, "probe.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    assert sorted(found.stdout.split()) == [
        "client_benchmark",
        "federated.learning.tensorboard_events",
        "server_benchmark",
        "torch",
    ], found.stderr


def test_a_trial_sees_only_its_gpu(tmp_path, monkeypatch):
    """No GPU is needed: the trials' processes say what they were given. The ids are those of a machine with two GPUs."""
    import command_launchers
    import sweep
    from federated import machine

    given = {}
    monkeypatch.setattr(machine, "gpus", lambda: ["GPU-a", "GPU-b"])

    class Start(command_launchers.Cold):
        def __init__(self, command, log, environment):
            super().__init__(
                [sys.executable, "-c", "import os; print(os.environ['CUDA_VISIBLE_DEVICES']); exit(1)"], log, environment
            )
            given[log] = environment

    monkeypatch.setattr(command_launchers, "Warm", Start)
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


def test_a_cgroup_limits_cores_and_memory(tmp_path, monkeypatch):
    from pathlib import Path

    from federated import machine

    group = Path("/proc/self/cgroup").read_text().split("0::", 1)[1].splitlines()[0]
    inner = tmp_path / group.lstrip("/") / "."
    inner.mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    assert machine.cores() >= 1
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    (tmp_path / "memory.max").write_text("123456789\n")
    assert (machine.cores(), machine.memory()) == (1, 123456789)
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert machine.cores() == 1
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.memory() > 123456789
