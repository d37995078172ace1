"""One's own algorithm, model, data, partition, augmentation and launcher, in a directory outside the checkout."""

import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import textwrap

import helpers
import numpy as np
import pytest
from helpers import HUNG, PROJECT, SMALL, TINY, processes_of, results, terminal, wait_until, wait_until_dead

from federated import algorithms, extension, models, version
from federated.data import partition

STUDY = '''
import torch
from torch import nn

import numpy as np

import helpers_of_mine
from command_launchers import LocalParallel
from command_launchers import register as register_launcher
from federated import algorithms, models
from federated.algorithms.fedprox import Fedprox
from federated.data import augmentation, datasets, partition
from federated.domains import Hparam, LogUniform


@algorithms.register
class Halfway(Fedprox):
    """The global weights move half of the way to the clients' average."""

    hyperparameters = {"pull": Hparam(0.1, LogUniform(0.01, 1))}
    local_optimizers = ("sgd",)
    client_vectors = 1

    def correct_gradient(self, client):
        super().correct_gradient(client)
        client.gradient.add_(client.parameters - client.global_parameters, alpha=self.hparams["pull"] / (1 + client.steps))

    def step(self, server, average):
        from package.constants import HALF

        server.weights.lerp_(average[0], HALF)


class Gru(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.gru = nn.GRU(8, 16, batch_first=True)
        self.classifier = nn.Linear(16, classes)

    def forward(self, images):
        return self.classifier(self.gru(images.squeeze(1))[0][:, -1])


@models.register("gru")
def gru(spec, dropout_rate):
    return Gru(spec.num_classes)


def read(data_dir):
    rows = np.random.default_rng(0).normal(size=(150, 4)).astype(np.float32)
    test = np.arange(150) % 5 == 0
    values = {"inputs": rows, "labels": rows[:, 0] > 0, "owners": np.arange(150) % 3}
    return {f"train_{name}": array[~test] for name, array in values.items()} | {
        f"test_{name}": array[test] for name, array in values.items()
    }


datasets.register("patients", datasets.Spec((4,), 2, read, num_owners=3))


@partition.register("halves")
def halves(data, settings, rng):
    return np.array_split(np.arange(len(data.train_labels)), settings.num_clients)


@augmentation.register("inverted")
def inverted(images, generator):
    return 16 - images


@register_launcher("patient")
class Patient(LocalParallel):
    def launch(self, trials, output_dir, run, report):
        print("patient")
        super().launch(trials, output_dir, run, report)
'''
IMAGES = ("--model_arch", "gru", "--partition", "halves", "--augmentation", "inverted", "--algorithm", "HALFWAY")


@pytest.fixture
def study(awkward):
    """The path of a study outside the checkout."""
    directory = awkward / "a paper's code"
    (directory / "package").mkdir(parents=True)
    (directory / "package" / "constants.py").write_text("HALF = 0.5\n")
    (directory / "helpers_of_mine.py").write_text("WHO = 'me'\n")
    (directory / "my study.py").write_text(STUDY)
    return directory / "my study.py"


@pytest.fixture
def unloaded():
    """Afterwards nothing is left of extensions that this process has loaded."""
    yield
    for path in list(version.LOADED):
        extension._forget(path)


def one(path):
    (found,) = path
    return json.loads(found.read_text())


@pytest.mark.usefixtures("unloaded")
def test_a_study_elsewhere_runs_and_is_read_without_it(study, launch_here, call, tmp_path):
    """Also a halved one."""
    out, extension = tmp_path / "out", ("--extension", study)
    warm = launch_here(out, *extension, *IMAGES, "--num_hparams", 1, "--command_launcher", "patient", "--client_processes", 2)
    assert warm.returncode == 0 and "patient\n" in warm.stdout, warm.stderr
    patients = launch_here(
        out, *extension, "--dataset", "patients", "--algorithm", "halfway", "Local", "--samples_per_client", 20
    )
    assert patients.returncode == 0, patients.stderr
    tiny = ("--rounds", 4, "--num_hparams", 4, "--num_trials", 1, "--client_processes", 1)
    halved = launch_here(tmp_path / "halved", *extension, "--algorithm", "halfway", *tiny, "--halving", 2, "--min_rounds", 1)
    assert halved.returncode == 0, halved.stderr

    content = one(out.glob("gru_digits_Halfway,*/*/*/results.json"))
    assert content["provenance"]["extensions"][0]["path"] == str(study)
    assert content["provenance"]["runs"][0]["code"] != version.CODE
    assert {"mu": 0.01, "pull": 0.1}.items() <= content["hparams"].items()  # that of Fedprox and its own
    assert one(out.glob("logistic_patients_Halfway,*/sweep.json"))["settings"]["partition"] == "natural"

    verified = call("sweep.py", "verify", "--output_dir", out, *extension, "--fraction", 0.01)
    assert verified.stdout == "1 of 1 trials: the same bits\n", verified.stdout + verified.stderr

    study.unlink()  # from here on nothing reads it
    collected = call("collect_results.py", "--output_dir", out, "--against", "halfway")
    assert collected.returncode == 0, collected.stderr
    rows = [line.split("|")[1:4] for line in collected.stdout.split("Table:")[1].splitlines()[4:7]]
    assert [[word.strip() for word in row] for row in rows] == [
        ["gru", "digits", "HALFWAY"], ["logistic", "patients", "Local"], ["logistic", "patients", "halfway"],
    ]  # fmt: skip
    shown = call("sweep.py", "status", "--output_dir", out, "--num_hparams", 1, "--num_trials", 1)
    assert shown.returncode == 0 and shown.stderr == "" and "5 jobs: 5 done" in shown.stdout, shown.stderr
    wanted = launch_here(out, "--algorithm", "Halfway")
    name = shlex.quote(f"--extension={study}")
    assert wanted.returncode == 2 and "'Halfway' is not one of Fedavg" in wanted.stderr
    assert wanted.stderr.rstrip("\n").endswith(f"there was made with {name}")
    refused = call("sweep.py", "status", "--output_dir", out, "--hparams", '{"mu": 1}')
    assert refused.returncode == 2 and name in refused.stderr
    refused = call("sweep.py", "verify", "--output_dir", out)
    assert refused.returncode == 2 and name in refused.stderr
    assert "Deleted 5 jobs!" in call("sweep.py", "delete_all", "--output_dir", out, "--skip_confirmation").stderr
    assert not list(out.iterdir())

    collected = call("collect_results.py", "--output_dir", tmp_path / "halved", "--top", 9)
    assert collected.returncode == 0, collected.stderr
    assert "halving stopped 2 of 4 hyper-parameter sets after 1 of 4 rounds of one trial." in collected.stdout
    shown = call("sweep.py", "status", "--output_dir", tmp_path / "halved", "--num_hparams", 4, "--num_trials", 1)
    assert shown.returncode == 0 and shown.stdout.count("stopped after 1 of 4 rounds") == 2, shown.stderr


@pytest.mark.slow
def test_a_sweep_of_a_version_that_lacked_a_setting_is_read_without_it(study, launch, call, tmp_path):
    out = tmp_path / "out"
    assert launch(out, "--extension", study, "--algorithm", "Halfway", "--num_hparams", 1).returncode == 0
    (path,) = out.glob("*/sweep.json")
    content = json.loads(path.read_text())
    for name in ("compression", "compression_ratio", "dp_clip"):
        del content["settings"][name], content["extension"]["defaults"][name]
    path.write_text(json.dumps(content))
    found = call("collect_results.py", "--output_dir", out)
    assert found.returncode == 0 and "| Halfway " in found.stdout, found.stderr
    del content["settings"]["bits"]
    path.write_text(json.dumps(content))
    assert "(it lacks settings)" in call("collect_results.py", "--output_dir", out).stderr


@pytest.mark.slow
@pytest.mark.usefixtures("unloaded")
def test_the_best_command_and_dry_runs_lines_name_it(study, launch_here, call, tmp_path):
    out = tmp_path / "out"
    options = ("--extension", study, "--algorithm", "halfway", "--num_hparams", 1, "--client_processes", 1)
    printed = launch_here(out, *options, "--command_launcher", "dry_run").stdout.partition("\n\n")[2]
    lines = printed[printed.index(shlex.quote(sys.executable)) :]
    assert subprocess.run(["bash", "-ec", f"{lines}\nwait"], timeout=HUNG, check=False, cwd=tmp_path).returncode == 0
    (by_hand,) = results(out).values()
    assert launch_here(tmp_path / "launched", *options).returncode == 0
    assert list(results(tmp_path / "launched").values()) == [by_hand]
    command = call("collect_results.py", "--output_dir", tmp_path / "launched", "--best_command").stdout
    assert shlex.quote(f"--extension={study}") in command
    more = f"{command.rstrip()} --skip_confirmation --num_trials 1"
    done = subprocess.run(["bash", "-c", more], capture_output=True, text=True, timeout=HUNG, check=False, cwd="/")
    assert done.returncode == 0, done.stderr
    assert list(results(tmp_path / "launched_best").values()) == [by_hand]


def code_of(page, after):
    """The indented lines of a page below the heading `after`, but for commands."""
    lines = (PROJECT / page).read_text().partition(f"## {after}\n")[2].partition("\n## On Slurm")[0].splitlines()
    return textwrap.dedent(
        "\n".join(each for each in lines if (each.startswith("    ") and "python sweep.py" not in each) or not each)
    )


@pytest.mark.slow
def test_the_readmes_own_algorithm(launch, tmp_path):
    study, out = tmp_path / "study.py", tmp_path / "out"
    study.write_text(code_of("README.md", "Your own algorithm"))
    launched = launch(out, "--extension", study, "--algorithm", "Halfway")
    assert launched.returncode == 0, launched.stderr
    found = [json.loads(path.read_text())["hparams"]["pull"] for path in out.rglob("results.json")]
    assert len(found) == 2 and 0.5 in found


@pytest.mark.slow
@pytest.mark.usefixtures("unloaded")
def test_the_own_code_of_the_docs(launch, call, tmp_path):
    """All of its examples are one file; its draw reaches the results, and its launcher the processes, which are nice."""
    study, data, out = tmp_path / "study.py", tmp_path / "data", tmp_path / "out"
    study.write_text(
        code_of("docs/own_code.md", "An algorithm") + "\nHalfway.start = lambda self, server: print('niceness', os.nice(0))\n"
    )
    data.mkdir()
    rng = np.random.default_rng(0)
    for owner, patients in enumerate((60, 50, 40)):
        features = rng.normal(size=(patients, 4))
        np.save(data / f"hospital_{owner}.npy", np.c_[features, features[:, 0] > 0])
    of_study = ("--extension", study, "--data_dir", data)
    options = (*of_study, "--dataset", "patients", "--model_arch", "wide", "--samples_per_client", 30, "--rounds", 20)
    launched = launch(out, *options, "--algorithm", "halfway", "--command_launcher", "patient", "--client_processes", 1)
    assert launched.returncode == 0, launched.stderr
    assert all("niceness 19\n" in path.read_text() for path in out.rglob("server.log"))
    found = [json.loads(path.read_text()) for path in out.glob("wide_patients_Halfway,*/*/*/results.json")]
    assert len({record["hparams"]["pull"] for record in found}) == 2 and 0.1 in {record["hparams"]["pull"] for record in found}
    shown = call("sweep.py", "show_partition", *of_study, "--partition", "in_order", "--num_clients", 5)
    first = shown.stdout.splitlines()[2].split("|")[2:12]
    assert [number.strip() != "0" for number in first] == [True, True, *[False] * 8], shown.stdout
    mirrored = launch(out, *options[:4], "--augmentation", "mirrored", "--num_hparams", 1)
    assert mirrored.returncode == 0, mirrored.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("unloaded")
def test_launchers_and_processes_change_no_bit(study, launch_here, tmp_path):
    options = ("--extension", study, *IMAGES, "--num_hparams", 1, "--client_processes", 1)
    assert launch_here(tmp_path / "warm", *options, "--client_processes", 2).returncode == 0
    assert launch_here(tmp_path / "cold", *options, "--command_launcher", "local_sequential").returncode == 0
    assert launch_here(tmp_path / "one", *options).returncode == 0
    assert results(tmp_path / "warm") == results(tmp_path / "cold") == results(tmp_path / "one") != {}


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.usefixtures("unloaded")
def test_by_hand_both_sides_load_it(study, call, tmp_path):
    server = terminal(
        "server_benchmark.py", "--output_dir", tmp_path / "trial", "--client_processes", 1, *SMALL, "--algorithm", "halfway",
        "--extension", study,
    )  # fmt: skip
    address = server.stdout.readline().split(" at ")[1].strip()
    without = call("client_benchmark.py", "--host", address)
    message = "--extension: the server has loaded my study.py, this client process no extension: give both the same"
    assert without.returncode == 2 and message in without.stderr
    server.communicate(timeout=HUNG)
    server = terminal(
        "server_benchmark.py", "--output_dir", tmp_path / "trial", "--client_processes", 1, *SMALL, "--algorithm", "halfway",
        "--extension", study,
    )  # fmt: skip
    address = server.stdout.readline().split(" at ")[1].strip()
    client = terminal("client_benchmark.py", "--host", address, "--extension", study)
    assert client.wait(HUNG) == server.wait(HUNG) == 0
    assert len(results(tmp_path)) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("unloaded")
def test_trials_run_what_was_there_at_the_launch_and_an_edit_is_another_code(study, call, launch, tmp_path):
    """The first trial of a launch edits the study while the second one waits."""
    out, options = tmp_path / "out", ("--extension", study, "--algorithm", "halfway", "--num_hparams", 1, "--num_trials", 2)
    helper = study.parent / "package" / "constants.py"
    study.write_text(STUDY + f"\nHELPER = {str(helper)!r}\n" + textwrap.dedent(
        """
        class Editing(Halfway):
            def start(self, server):
                open(HELPER, "a").write("# edited\\n")
                open(HELPER.replace("package/constants", "my study"), "a").write("raise RuntimeError\\n")

        algorithms.REGISTRY["Halfway"] = Editing
        """
    ))  # fmt: skip
    launched = launch(out, *options, "--jobs", 1)
    assert launched.returncode == 0, launched.stderr
    runs = [json.loads(path.read_text())["provenance"]["runs"][0]["code"] for path in out.rglob("results.json")]
    assert len(runs) == 2 and len(set(runs)) == 1
    helper.write_text("HALF = 0.5\n")
    codes = {runs[0]}
    for path, content in ((study, STUDY), (study, STUDY + "\n"), (helper, "HALF = 0.5\n"), (helper, "HALF = 0.25\n")):
        path.write_text(content)
        codes.add(call("sweep.py", "--version", "--extension", study).stdout.split()[-1])
        (study.parent / "notes.txt").write_text(content)  # and what it does not import counts for nothing
    assert len(codes) == 1 + 3


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def f(:", "invalid syntax"),
        ("x = 1 / 0", "ZeroDivisionError: division by zero (mine.py, line 1, in <module>: x = 1 / 0)"),
        ("import nowhere", "No module named 'nowhere'"),
        ("import sys\nsys.exit(3)", "SystemExit: 3"),
        ("import string", "mine/string.py' has the name of Python's own module 'string': rename it"),
        ("import sweep", "rename it"),
        ("def f():\n    import numpy.linalg", "mine/numpy.py' has the name of the module in"),
        ("@algorithms.register\nclass Fedavg(Fedavg): pass", "algorithm 'Fedavg' is not a new name: there is a built-in one"),
        ("@algorithms.register\nclass FEDAVG(Fedavg): pass", "algorithm 'FEDAVG' is not a new name"),
        ("@algorithms.register\nclass Mine: pass", "algorithm 'Mine' is not a class that derives from Fedavg"),
        ("@algorithms.register\nclass Mine(Fedavg): uploads = 0", "uploads is 0 and has to be a whole number of at least 1"),
        ("@algorithms.register\nclass Mine(Fedavg): hyperparameters = {'mu': 1}", "its hyperparameters is {'mu': 1}"),
        ("@models.register('mlp')\ndef f(spec, rate): pass", "model 'mlp' is not a new name"),
        ("@models.register('a b')\ndef f(spec, rate): pass", "model 'a b' is not a name"),
        ("datasets.register('mine', 3)", "dataset 'mine' is not a Spec"),
        ("datasets.register('mine', datasets.Spec((), 2, print))", "dataset 'mine' is not of whole numbers"),
        ("datasets.register('mine', datasets.Spec((3,), 2, print, num_tokens=0))", "0 tokens"),
        ("datasets.register('mine', datasets.Spec((3, 1), 2, print, num_tokens=9))", "their shape is (3, 1)"),
        ("@algorithms.register\nclass Mine(Fedavg): sends_change = 1", "its sends_change is 1 and has to be True or False"),
        ("partition.register('mine')(3)", "partition 'mine' is not a function"),
        ("augmentation.register('none')(print)", "augmentation 'none' is not a new name"),
        ("@command_launchers.register('mine')\nclass L(Launcher): pass", "launcher 'mine' is not a class"),
    ],
)  # fmt: skip
def test_what_cannot_be_loaded_is_named_with_its_own_line(call, tmp_path, code, message):
    directory = tmp_path / "mine"
    directory.mkdir()
    for name in ("string", "numpy", "sweep"):
        (directory / f"{name}.py").write_text("")
    imports = """import command_launchers; from federated import algorithms, models
from federated.running.launcher import Launcher
from federated.algorithms.fedavg import Fedavg; from federated.data import augmentation, datasets, partition
"""
    uses = any(name in code for name in ("register", "Launcher"))
    (directory / "mine.py").write_text(imports * uses + code)
    for argument in (("--extension", directory / "mine.py"), (f"--extension={directory / 'mine.py'}", "--rounds", "1")):
        refused = call("sweep.py", "launch", "--skip_confirmation", *argument)
        last = refused.stderr.splitlines()[-1]
        assert refused.returncode == 2 and refused.stdout == ""
        assert last.startswith("sweep.py launch: error: --extension") and message in last, refused.stderr
        assert "federated" not in "".join(refused.stderr.splitlines()[:-1]), "it shows this project's lines"
    assert version.LOADED == {} and [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.usefixtures("unloaded")
def test_two_files_with_one_helper_and_names_that_exist(call, tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.py").write_text(
            "import shared\nfrom federated import models\n"
            f"models.register('mine_{name}')(lambda spec, rate: shared)\n"
        )  # fmt: skip
    (tmp_path / "shared.py").write_text("")
    both = call("sweep.py", "launch", "--help", "--extension", "a.py", tmp_path / "b.py")
    assert both.returncode == 0 and "mine_a, mine_b" in " ".join(both.stdout.split())
    again = call("sweep.py", "launch", "--help", "--extension=a.py", "--extension", "b.py", "a.py")
    assert again.stdout == both.stdout
    (tmp_path / "c.py").write_text((tmp_path / "a.py").read_text())
    twice = call("sweep.py", "launch", "--extension", "a.py", "c.py")
    (line,) = twice.stderr.splitlines()
    assert twice.returncode == 2 and f"there is that of '{tmp_path / 'a.py'}'" in line and "(c.py, line 3" in line


NOTEBOOK = """
import pathlib, sys
import sweep
from federated import algorithms

def launch(name, *options):
    options = ["--num_hparams", "1", "--num_trials", "1", "--rounds", "1", "--samples_per_client", "40", *options]
    assert sweep.main(["launch", "--skip_confirmation", "--output_dir", name, *options]) == 0

launch("first", "--extension", "here/mine.py", "--algorithm", "mine")
pathlib.Path("here/factor.py").write_text("FACTOR = 0.25\\n")
launch("edited", "--extension", "here/mine.py", "--algorithm", "mine")
launch("another", "--extension", "elsewhere/another.py", "--algorithm", "another")
launch("none")
assert "Mine" not in algorithms.REGISTRY and "Another" not in algorithms.REGISTRY
"""


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.usefixtures("unloaded")
def test_a_notebook_runs_each_launch_with_the_code_that_it_names_as_it_is_by_then(call, tmp_path):
    """Both files import a module of the same name, each from its own directory."""
    for name, factor in (("here/mine", 0.5), ("elsewhere/another", 1.0)):
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        (path.parent / "factor.py").write_text(f"FACTOR = {factor}\n")
        path.write_text(
            "from factor import FACTOR\n"
            "from federated import algorithms\n"
            "@algorithms.register\n"
            f"class {path.stem.title()}(algorithms.Fedavg):\n"
            "    def step(self, server, average):\n"
            "        server.weights.lerp_(average[0], FACTOR)\n"
        )
    fresh = {}
    for name, file in (("first", "here/mine.py"), ("another", "elsewhere/another.py"), ("none", None)):
        options = ("--extension", file) if file else ()
        fresh[name] = call("sweep.py", "--version", *options).stdout.split()[-1]
    done = subprocess.run(
        [sys.executable, "-c", NOTEBOOK], capture_output=True, text=True, timeout=HUNG, check=False, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(PROJECT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    fresh["edited"] = call("sweep.py", "--version", "--extension", "here/mine.py").stdout.split()[-1]
    found = {name: one((tmp_path / name).rglob("results.json")) for name in fresh}
    assert {name: content["provenance"]["runs"][0]["code"] for name, content in found.items()} == fresh
    losses = {name: content["curves"]["test_loss"][-1] for name, content in found.items()}
    assert len(set(losses.values())) == 3 and losses["another"] == losses["none"]


def test_no_extension_no_torch(run_without):
    shown = run_without("torch", "sweep", "launch", "--command_launcher", "dry_run", "--skip_confirmation", *TINY)
    assert shown.returncode == 0, shown.stderr


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.usefixtures("unloaded")
def test_the_example_runs_elsewhere_by_its_readmes_commands(awkward):
    """All of them, with less to compute, the first one as a shell runs it. Its data are what make_data.py makes."""
    study = shutil.copytree(PROJECT / "examples" / "own_study", awkward / "own study")
    made = (study / "keystrokes.npz").read_bytes()
    subprocess.run([sys.executable, study / "make_data.py"], timeout=HUNG, check=True)
    assert (study / "keystrokes.npz").read_bytes() == made
    text = (study / "README.md").read_text().replace("\\\n", "")
    commands = [line.strip() for line in text.splitlines() if line.startswith("    python ")]
    assert len(commands) == 4
    for number, command in enumerate(commands):
        if " launch " in command:
            command += " --skip_confirmation --num_hparams 1 --num_trials 1 --rounds 2"
        python, script, *words = shlex.split(command.replace("$FEDSWEEP", shlex.quote(str(PROJECT))))
        assert python == "python"
        if number == 0:
            command = [sys.executable, script, *words]
            done = subprocess.run(command, capture_output=True, text=True, timeout=HUNG, check=False, cwd=study)
        else:
            done = helpers.call(study, os.path.basename(script), *words)
        assert done.returncode == 0, done.stdout + done.stderr
        if "collect_results" in script:
            rows = [line.split("|")[1:4] for line in done.stdout.split("Table:")[1].splitlines()[4:7]]
            names = [[word.strip() for word in row] for row in rows]
            assert names == [["rows_gru", "keystrokes", name] for name in ("Fedavg", "Fedprox", "Trimmed")]


# Faults of such code

FAULTY = """
import multiprocessing, os, subprocess, sys, time
import torch
from federated import algorithms, models
from federated.algorithms.fedavg import Fedavg

@algorithms.register
class Raises(Fedavg):
    def train(self, client):
        super().train(client)
        raise ValueError("my own words")

@algorithms.register
class Misses(Fedavg):
    def step(self, server, average):
        open("/nowhere/it is")

@algorithms.register
class Unfit(Fedavg):
    def correct_gradient(self, client):
        client.gradient.add_(torch.ones(3))

@algorithms.register
class Manyfold(Fedavg):
    def loss(self, client, inputs, logits, labels):
        return logits.sum(1)

@algorithms.register
class Short(Fedavg):
    def weights(self, server):
        return [[1.0]]

@algorithms.register
class Leaves(Fedavg):
    def start(self, server):
        sys.exit(5)

@algorithms.register
class Vanishes(Fedavg):
    def train(self, client):
        os._exit(3)

@algorithms.register
class Prints(Fedavg):
    def start(self, server):
        print("first")
        for _ in range(50):
            print("x" * (1 << 20), flush=True)
        while os.fstat(1).st_size > 31 << 20:  # until the log was cut
            time.sleep(0.1)
        print("last", flush=True)

@algorithms.register
class Parent(Fedavg):
    def start(self, server):
        if not os.fork():
            time.sleep(10_000)
        multiprocessing.Process(target=time.sleep, args=(10_000,)).start()
        print("child", subprocess.Popen(["sleep", "10000"]).pid, flush=True)

    def train(self, client):
        super().train(client)
        if not os.fork():
            time.sleep(10_000)
"""
FAULTS = {
    "Raises": 'ValueError: my own words (faulty.py, line 11, in train: raise ValueError("my own words"))',
    "Misses": "No such file or directory: '/nowhere/it is' (faulty.py, line 16, in step: open(\"/nowhere/it is\"))",
    "Unfit": "(faulty.py, line 21, in correct_gradient: client.gradient.add_(torch.ones(3)))",
    "Manyfold": "error: Manyfold: loss() returned a tensor [36], not a scalar that depends on the weights",
    "Short": "error: Short: weights() returned rows of the lengths [1], not 1 of the length 2",
    "Leaves": "SystemExit: 5 (faulty.py, line 36, in start: sys.exit(5))",
    "Vanishes": "client_process_0 ended with exit code 3",
}


@pytest.mark.parametrize("launcher", ["local_parallel", pytest.param("local_sequential", marks=pytest.mark.slow)])
def test_faults_of_ones_own_code_are_named_and_nothing_else_is_hurt(launch, tmp_path, launcher):
    """What an exception says does not depend on how its process was started: of those, local_sequential sees one."""
    (tmp_path / "faulty.py").write_text(FAULTY)
    same = ("Misses", "Unfit", "Manyfold", "Short") if launcher == "local_sequential" else ()
    faults = {name: message for name, message in FAULTS.items() if name not in same}
    names, out = (*faults, "Prints", "Parent", "Fedavg"), tmp_path / "out"
    options = ("--num_hparams", 1, "--client_processes", 1, "--hparams", '{"batch_size": 36}', "--command_launcher", launcher)
    launched = launch(out, "--extension", tmp_path / "faulty.py", "--algorithm", *names, *options)
    assert launched.returncode == 1 and f"{len(faults)} of {len(names)} trials failed." in launched.stderr, launched.stderr
    for name, message in faults.items():
        (trial,) = out.glob(f"mlp_digits_{name},*/*/trial_0")
        (line,) = [line for line in launched.stderr.splitlines() if f"/mlp_digits_{name},samples" in line]
        assert "trial_0 failed: " in line and message in line
        if "faulty.py" in message:
            log = json.loads((trial / "failed.json").read_text())["log"]
            assert log[0] == "Traceback (most recent call last):" or "faulty.py" not in log[0]
            (first, *_) = [entry for entry in log if entry.startswith("  File ")]
            assert "faulty.py" in first, log
    done = {path.parent.parent.parent.name.split("_")[2].split(",")[0] for path in out.rglob("done")}
    assert done == {"Prints", "Parent", "Fedavg"}
    (log,) = out.glob("mlp_digits_Prints,*/*/trial_0/server.log")
    assert log.stat().st_size < 31 << 20 and log.read_bytes().startswith(b"first\n")
    assert b" bytes left out " in log.read_bytes() and b"\nlast\nwaiting" in log.read_bytes()[-10_000:]
    (log,) = out.glob("mlp_digits_Parent,*/*/trial_0/server.log")
    child = int(re.search(r"^child (\d+)$", log.read_text(), re.MULTILINE)[1])
    wait_until_dead([child])
    wait_until(lambda: not processes_of(log.parent))


UPDATES = """
import numpy as np
from torch import nn
from federated import algorithms, models
from federated.algorithms.fedavg import Fedavg
from federated.data import datasets


@algorithms.register
class Silent(Fedavg):
    def upload(self, client, updates):
        updates[0].copy_(client.weights)


@algorithms.register
class Sends(Silent):
    sends_change = True

    def upload(self, client, updates):
        updates[0].copy_(client.weights).sub_(client.global_weights)

    def step(self, server, average):
        server.weights.add_(average[0])


@algorithms.register
class Weighs(Fedavg):
    def weights(self, server):
        return [[1 / len(server.samples)] * len(server.samples)]


@models.register("bag", of_sequences=True)
def bag(spec, dropout_rate):
    return nn.Sequential(nn.Embedding(spec.num_tokens, 4), nn.Flatten(), nn.Linear(4 * spec.shape[0], spec.num_classes))


def read(data_dir):
    words = np.random.default_rng(0).integers(0, 50, (240, 5))
    values = {"inputs": words, "labels": words[:, 0] % 3, "owners": np.array([f"author {i // 2 % 8}" for i in range(240)])}
    return {f"{part}_{name}": array[place::2] for place, part in enumerate(("train", "test")) for name, array in values.items()}


datasets.register("books", datasets.Spec((5,), 3, read, many_owners=True, num_tokens=50))
"""


@pytest.mark.slow
@pytest.mark.usefixtures("unloaded")
def test_ones_own_updates_are_compressed_and_private_if_it_is_said_what_they_are(launch_here, tmp_path):
    """On sequences of owners whom only the data name, by a model for them."""
    (tmp_path / "mine.py").write_text(UPDATES)

    def launched(*options):
        return launch_here(
            tmp_path / "out", "--extension", tmp_path / "mine.py", "--dataset", "books", "--model_arch", "bag",
            "--num_clients", 4, "--samples_per_client", 10, "--local_optimizer", "sgd", "--num_trials", 1, *options,
        )  # fmt: skip

    for options, message in (
        (("--algorithm", "Silent", "--compression", "topk"), "--compression topk: Silent has an upload() of its own: say by"),
        (("--algorithm", "Silent", "--dp_clip", 1), "--dp_clip 1.0: Silent has an upload() of its own: say by sends_change"),
        (("--algorithm", "Sends", "--dp_clip", 1), "Sends is not among the algorithms whose server takes no more"),
        (("--algorithm", "Weighs", "--dp_clip", 1), "Weighs is not among the algorithms whose server takes no more"),
        (("--model_arch", "mlp"), "--model_arch mlp does not fit sequences of 5: it takes no sequences"),
        (("--num_clients", 9), "8 owners of books have enough samples to train on"),
    ):
        refused = launched(*options)
        assert refused.returncode == 2 and message in refused.stderr.splitlines()[-1] and not (tmp_path / "out").exists()
    both = launched("--algorithm", "Sends", "Fedavg", "--compression", "topk", "quantize", "--dropout_fraction", 0, 0.5)
    assert both.returncode == 0, both.stderr
    for path in map(str, (tmp_path / "out").glob("*_Sends,*/*/*/results.json")):
        ours, plain = (one([pathlib.Path(path.replace("_Sends,", name))]) for name in ("_Sends,", "_Fedavg,"))
        for name, curve in plain["curves"].items():
            if name != "round_seconds":
                assert ours["curves"][name] == pytest.approx(curve, rel=1e-4)
    assert launched("--dp_clip", 1).returncode == 0


@pytest.mark.slow
def test_an_endless_loop_is_silence(launch, tmp_path):
    halves = {"train": "client process 0 was silent for 8 s", "step": "server was silent for 8 s"}
    classes = (
        f"@algorithms.register\nclass Endless{half}(algorithms.Fedavg):\n    def {half}(self, *_):\n        while True: pass\n"
        for half in halves
    )
    (tmp_path / "faulty.py").write_text("\n".join(("from federated import algorithms", *classes)))
    options = ("--algorithm", *(f"endless{half}" for half in halves), "--num_hparams", 1, "--timeout", 8)
    launched = launch(tmp_path / "out", "--extension", tmp_path / "faulty.py", *options, "--client_processes", 1)
    assert launched.returncode == 1
    for half, name in halves.items():
        assert re.search(f"_Endless{half},.* failed: .*{name}", launched.stderr), launched.stderr


@pytest.mark.parametrize(
    ("code", "options", "message"),
    [
        ("models.register('mine')(lambda spec, rate: 1)", "--model_arch mine", "returns 1, which is no torch module"),
        ("models.register('mine')(lambda spec, rate: nn.Flatten())", "--model_arch mine", "at least one"),
        (
            "models.register('mine')(lambda spec, rate: nn.Linear(8, 10))",
            "--model_arch mine",
            "does not fit 1x8x8 images: of two samples it gives [2, 1, 8, 10] in training, not logits [2, 10]",
        ),
        ("models.register('mine')(lambda spec, rate: spec.nothing)", "--model_arch mine", "(mine.py, line 3, in <lambda>: "),
        ("models.register('mine')(lambda spec, rate: nn.Linear(9, 10))", "--model_arch mine", "mat1 and mat2 shapes"),
        ("partition.register('mine')(lambda data, settings, rng: [])", "--partition mine", "a list of 2 arrays"),
        ("partition.register('mine')(lambda *_: [np.arange(9), np.arange(9)])", "--partition mine", "to more than one client"),
        ("partition.register('mine')(lambda *_: [np.arange(9), np.arange(0)])", "--partition mine", "client 1 without samples"),
        ("partition.register('mine')(lambda *_: [np.arange(9.0)] * 2)", "--partition mine", "client 0 has is not an array of"),
        ("datasets.register('mine', datasets.Spec((4,), 2, lambda d: {}))", "--dataset mine", "with the arrays train_"),
        ("datasets.register('mine', datasets.Spec((4,), 2, lambda d: open(d)))", "--dataset mine", "(mine.py, line 3"),
        ("datasets.register('mine', datasets.Spec((4,), 2, lambda d: 1 / 0))", "--dataset mine", "ZeroDivisionError: "),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("unloaded")
def test_faults_that_show_before_anything_is_made(call, tmp_path, code, options, message):
    imports = (
        "import numpy as np; from torch import nn; from federated import models\nfrom federated.data import datasets, partition"
    )
    (tmp_path / "mine.py").write_text(f"{imports}\n{code}\n")
    refused = call("sweep.py", "launch", "--skip_confirmation", "--extension", "mine.py", *options.split())
    last = refused.stderr.splitlines()[-1]
    assert refused.returncode in (1, 2) and last.startswith("sweep.py launch: error: ") and message in last, refused.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.py"]


# The command check

LEAKY = """
import numpy as np
from federated import algorithms
from federated.data import datasets, partition

@algorithms.register
class OfClients(algorithms.Fedavg):
    def upload(self, client, updates):
        self.sent = getattr(self, "sent", 0) + 1
        super().upload(client, updates)
        updates[0].mul_(1 - self.sent / 100)

@algorithms.register
class OfServer(algorithms.Fedavg):
    step_number = 0

    def step(self, server, average):
        self.step_number += 1
        server.weights.lerp_(average[0], 1 / self.step_number)

@algorithms.register
class Drawing(algorithms.Fedavg):
    def step(self, server, average):
        server.weights.lerp_(average[0], np.random.rand())

@partition.register("unseeded")
def unseeded(data, settings, rng):
    return np.array_split(np.random.permutation(len(data.train_labels)), settings.num_clients)

@partition.register("half")
def half(data, settings, rng):
    return np.array_split(np.arange(len(data.train_labels) // 2), settings.num_clients)

def read(data_dir):
    rows = np.random.rand(20, 3).astype(np.float32)
    arrays = {"inputs": rows, "labels": np.arange(20) % 2}
    return {f"{part}_{what}": array for part in ("train", "test") for what, array in arrays.items()}

datasets.register("unlike", datasets.Spec((3,), 2, read))
"""


@pytest.mark.slow
def test_check_names_what_leaks(run, study, tmp_path):
    (tmp_path / "leaky.py").write_text(LEAKY)
    checked = run("sweep.py", "check", study, "leaky.py")
    assert checked.returncode == 1, checked.stderr
    lines = {line.split(": ")[1]: line for line in checked.stdout.splitlines()}
    for name in ("dataset patients", "model gru", "partition halves", "algorithm Halfway"):
        assert lines[name].startswith("ok: "), lines
    for name, message in {
        "dataset unlike": "train_inputs differ if a process reads them again",
        "partition unseeded": "it has to draw from the generator",
        "partition half": "samples of patients, 60 belong to a client",
        "algorithm OfClients": "bits with one client process and resumed: it changes and nothing keeps self.sent (in a",
        "algorithm OfServer": "other bits resumed: it changes and nothing keeps self.step_number (on the server)",
        "algorithm Drawing": "the random numbers of numpy (on the server)",
    }.items():
        assert lines[name].startswith(f"FAILED: {name}: ") and message in lines[name], lines[name]
    assert lines["algorithm Halfway under stragglers, lost updates, compression, privacy"].startswith("ok: "), lines
    assert len(lines) == 14


@pytest.mark.process
@pytest.mark.slow
def test_the_built_in_ones_pass_the_check(run):
    """Of the data sets those that come with the project."""
    checked = run("sweep.py", "check", timeout=2 * HUNG)  # some hundred processes
    assert checked.returncode == 0, checked.stdout
    lines = checked.stdout.splitlines()
    assert all(line.startswith("ok: ") for line in lines)
    names = [line.split(": ")[1].partition(" ")[::2] for line in lines]
    tried = {name for kind, name in names if kind == "algorithm"}
    assert tried >= set(algorithms.REGISTRY) and len(tried) == 2 * len(algorithms.REGISTRY)
    for name in algorithms.REGISTRY:
        algorithm, under = algorithms.load(name), f"{name} under stragglers, lost updates"
        under += ", compression" * (algorithm.uploads == 1) + ", privacy" * algorithms.can_be_private(algorithm)
        assert under in tried
    assert {name for kind, name in names if kind == "model"} == set(models.REGISTRY)
    assert {name for kind, name in names if kind == "partition"} == set(partition.REGISTRY)
    assert {name for kind, name in names if kind == "dataset"} == {"digits", "heart_disease"}
