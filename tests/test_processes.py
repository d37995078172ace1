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
    print(*({{"torch", "server_benchmark", "client_benchmark"}} & sys.modules.keys()), flush=True)

if __name__ == "__main__":
    from command_launchers import preload
    preload("mlp")
    process = Warm._context.Process(target=imported)
    process.start()
    process.join()
    assert "torch" not in sys.modules
""")
    found = subprocess.run([sys.executable, "probe.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    assert sorted(found.stdout.split()) == ["client_benchmark", "server_benchmark", "torch"], found.stderr
