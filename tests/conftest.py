"""Fixtures: the tests run the real commands, at tiny size, in directories with awkward names."""

import collections
import fcntl
import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from multiprocessing.process import BaseProcess

import helpers
import pytest
import slurm_cluster
from helpers import HUNG, PROJECT, SHARED_DATA, cannot, processes_of, wait_until

from federated.running.processes import preload


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=20, help="how often the trial of test_resume.py is killed")
    parser.addoption("--gpu", action="store_true", help="let tests see the GPUs of this machine; for use with -k gpu")
    parser.addoption("--install", action="store_true", help="install the Debian packages that tests need, as root")


def pytest_configure(config):
    """What most tests compare with was computed on a CPU. What the tests start is to hear the signals that this process may
    have been started to ignore, by nohup or in the background of a script."""
    if not config.getoption("--gpu"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    for signum, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(signum) == signal.SIG_IGN:
            signal.signal(signum, handler)


STARTS_PROCESSES = {"run", "run_without", "launch_here", "finished_sweep"}


def pytest_collection_modifyitems(items):
    """Tests that take a fixture which starts processes of the project are marked so. Slurm's come first: they wait for most of
    their time, while the other worker of pytest-xdist runs all others. Then the files that start most, so that no long one is
    left for the end."""
    for item in items:
        if STARTS_PROCESSES & set(item.fixturenames):
            item.add_marker("process")
    starting = collections.Counter(item.path for item in items if item.get_closest_marker("process"))
    items.sort(key=lambda item: (item.get_closest_marker("slurm") is None, -starting[item.path]))


@pytest.fixture(autouse=True)
def only_marked_tests_start_processes(request, monkeypatch):
    """Else `run_tests.sh --fast` would become slow unnoticed."""
    if request.node.get_closest_marker("process"):
        return
    start = subprocess.Popen.__init__

    def guarded(self, command, *arguments, **options):
        assert sys.executable not in map(str, command), "this test needs the marker `process`"
        start(self, command, *arguments, **options)

    monkeypatch.setattr(subprocess.Popen, "__init__", guarded)
    monkeypatch.setattr(BaseProcess, "start", lambda self: pytest.fail("this test needs the marker `process`"))


@pytest.fixture(autouse=True)
def own_signal_handlers():
    """Those that a command which is called in this process installs go with the test."""
    caught = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(each) for each in caught]
    yield
    for each, handler in zip(caught, before):
        signal.signal(each, handler)


@pytest.fixture
def awkward(tmp_path):
    """A directory whose name has what breaks shell strings."""
    path = tmp_path / 'it\'s a "sweep"\nof $HOME'
    path.mkdir()
    return path


@pytest.fixture
def run(tmp_path):
    """run(script, *arguments) runs one of the project's scripts as a user would and returns the finished process."""

    def run(script, *arguments, timeout=HUNG, **options):
        return subprocess.run(
            [sys.executable, PROJECT / script, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd=tmp_path,
            check=False,
            **{"stdin": subprocess.DEVNULL, **options},
        )

    return run


@pytest.fixture
def call(tmp_path):
    """call(script, *arguments) is `run` in this process, which takes no time to start."""
    return functools.partial(helpers.call, tmp_path)


@pytest.fixture
def train(tmp_path, monkeypatch):
    """train(algorithm, hparams, **settings) runs a trial in this process, see in_process.py."""
    from in_process import trainer  # imports torch

    return trainer(tmp_path, monkeypatch)


@pytest.fixture
def run_without(tmp_path):
    """run_without(package, module, *arguments) runs the main of one of the project's scripts where `package` is missing."""

    def run_without(package, module, *arguments):
        program = f"import sys; sys.modules[{package!r}] = None; import {module}; sys.exit({module}.main())"
        return subprocess.run(
            [sys.executable, "-c", program, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=HUNG,
            cwd=tmp_path,
            check=False,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": str(PROJECT)},
        )

    return run_without


@pytest.fixture
def launch(run):
    """launch(output_dir, *options) launches a tiny sweep without asking; later options win."""
    return functools.partial(helpers.launch, run)


@pytest.fixture
def launch_here(call):
    """`launch` in this process. Trials are forked from one that all tests share, so that they start at once."""
    return functools.partial(helpers.launch, call)


@pytest.fixture(scope="session")
def finished_sweep(tmp_path_factory):
    """The directory of a tiny sweep that is done, for tests that only read it."""
    directory = tmp_path_factory.mktemp("finished")
    launched = helpers.launch(functools.partial(helpers.call, directory), directory / "out")
    assert launched.returncode == 0, launched.stderr
    return directory / "out"


@pytest.fixture
def finished_copy(finished_sweep, tmp_path):
    """One that the test may change."""
    return shutil.copytree(finished_sweep, tmp_path / "out")


@pytest.fixture
def copy_of_project(tmp_path):
    """The project's directory as a user may edit it."""
    project = tmp_path / "project"
    ignored = shutil.ignore_patterns(".git", ".venv", "tests", "benchmarks", "sweep_logs", "*.pyc")
    return shutil.copytree(PROJECT, project, ignore=ignored)


@pytest.fixture
def shared_data(tmp_path):
    """A --data_dir with MNIST and Fashion-MNIST."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"needs the MNIST files of {SHARED_DATA}")
    data = tmp_path / "data"
    data.mkdir()
    for name in ("MNIST", "FashionMNIST"):
        raw = data / name / "raw"
        raw.mkdir(parents=True)
        for file in (SHARED_DATA / name / "raw").iterdir():
            os.symlink(file, raw / file.name)
    return data


@pytest.fixture
def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def need_programs(request, tmp_path_factory):
    """need_programs(programs, packages): install Debian's `packages` if `programs` are missing, under continuous integration or
    with --install; else skip."""

    def need_programs(programs, packages):
        with open(tmp_path_factory.getbasetemp().parent / "apt", "w") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX)  # another worker of pytest-xdist may be installing too
            if all(map(shutil.which, programs)):
                return
            needs = f"needs Debian's {' and '.join(packages)}"
            if not (request.config.getoption("--install") or os.environ.get("CI")):
                pytest.skip(f"{needs}: apt-get install {' '.join(packages)}, or --install as root")
            if os.geteuid() or not shutil.which("apt-get"):
                cannot(f"{needs}: this user may not install them")
            environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
            for command in (["update"], ["install", "-y", *packages]):
                done = subprocess.run(["apt-get", *command], capture_output=True, text=True, check=False, env=environment)
            if done.returncode:
                cannot(f"{needs}: {done.stderr.strip().splitlines()[-1]}")

    return need_programs


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, need_programs):
    """A Slurm of two nodes, see slurm_cluster.py."""
    need_programs(slurm_cluster.COMMANDS, ["slurm-wlm", "munge"])
    if os.geteuid():
        cannot("only root can start a Slurm cluster")
    with slurm_cluster.running(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture
def leaves_nothing(tmp_path, monkeypatch):
    """Afterwards no process, lock, socket or half-written file is left, but for what launch_here forks from."""
    preload([])
    with tempfile.TemporaryDirectory(prefix="t-") as sockets:  # a socket's path has to be short
        monkeypatch.setenv("TMPDIR", sockets)
        yield
        wait_until(lambda: not any(processes_of(trial) for trial in tmp_path.glob("*/*/*/trial_*")))
        assert list(tmp_path.rglob("lock")) == [] and list(tmp_path.rglob("*.tmp")) == []
        assert [name for name in os.listdir(sockets) if not name.startswith("torchinductor")] == []
