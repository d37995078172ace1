import functools
import io
import json
import os
import shutil
import subprocess
import sys
import textwrap
import zipfile

import numpy as np
import pandas
import pytest
from helpers import HUNG, PROJECT, make_trial, results

import collect_results
import hparams_registry
import sweep
from federated import algorithms
from federated.settings import Settings
from hparams_registry import random_hparams


def test_the_wording(run, tmp_path):
    settings = Settings(model_arch="resnet18", dataset="cifar10")
    for trial, test in enumerate((0.7, 0.8, 0.9)):
        make_trial(tmp_path, 0, trial, [[0.5], [0.5]], [test], settings)
        make_trial(tmp_path, 1, trial, [[0.4], [0.4]], [0.99], settings)
    result = run("collect_results.py", "--output_dir", tmp_path)
    assert result.returncode == 0 and result.stderr == ""
    assert (
        result.stdout
        == """\
Best hyperparameter setting: db339c756bf05546161ab518b8b50bfb with mean test accuracy: 0.8000
Model: resnet18
Dataset: cifar10
Algorithm: Fedavg
Best Test Accuracy: 0.8000 ± 0.1000

Table:

| Model    | Dataset   | Algorithm   | Best Test Accuracy   | n   | 95 % Interval    | Global   | Clients (weighted)   | Clients (mean)   | Worst Client   | Spread   |
|----------|-----------|-------------|----------------------|-----|------------------|----------|----------------------|------------------|----------------|----------|
| resnet18 | cifar10   | Fedavg      | 0.8000 ± 0.1000      | 3   | 0.5516 to 1.0484 | 0.8000   | 0.8000               | 0.8000           | 0.8000         | 0.0000   |

Clients: accuracy on their own shares of the test set, the mean by their samples (weighted) and with each client counting the same (mean), the worst, and the standard deviation over clients (spread).

resnet18 cifar10 Fedavg: the best setting, set 0, stays the best in 1000 of 1000 bootstrap resamples of trial seeds and clients; no other is within noise.

Job Statistics:

Number of hyperparameter sets: 2
Number of trials: 3
Number of clients: 2
Training time: 3.0 s in total, 0.5 s a trial
Bytes sent: 1.0 MB a trial
"""  # noqa: E501
    )


def test_the_best_round_and_setting_are_picked_on_validation(tmp_path, capsys):
    """Client 1 holds three times the samples: the second round is the best one, by 0.75 x 0.8 + 0.25 x 0.2 = 0.65."""
    make_trial(tmp_path, 0, 0, [[0.9, 0.2, 0.5], [0.5, 0.8, 0.5]], [0.1, 0.3, 0.9])
    make_trial(tmp_path, 1, 0, [[0.6] * 3, [0.6] * 3], [0.99] * 3)
    assert collect_results.main(["--output_dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "Best Test Accuracy: 0.3000\n" in out  # one trial: no deviation


def test_rounds_without_an_evaluation_are_passed_over(tmp_path, capsys):
    make_trial(tmp_path, 0, 0, [[None, 0.2, None, 0.5]] * 2, [None, 0.3, None, 0.4])
    assert collect_results.main(["--output_dir", str(tmp_path)]) == 0
    assert "Best Test Accuracy: 0.4000\n" in capsys.readouterr().out


def test_what_is_not_done_or_broken_is_ignored_and_counted(tmp_path, capsys):
    for trial in range(2):
        make_trial(tmp_path, 0, trial, [[0.5]] * 2, [0.5])
    make_trial(tmp_path, 0, 2, [[0.9]] * 2, [0.9], done=False)
    make_trial(tmp_path, 1, 1, [[0.4]] * 2, [0.4])  # all sets have trial 1
    broken = make_trial(tmp_path, 2, 0, [[0.9]] * 2, [0.9])
    (broken / "results.json").write_text('{"test_acc": [0')
    foreign = make_trial(tmp_path, 3, 0, [[0.9]] * 2, [0.9])
    (foreign / "results.json").write_text(json.dumps([1, 2]))
    assert collect_results.main(["--output_dir", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert "Best Test Accuracy: 0.5000\n" in out and "| 1 of 2 |" in out
    assert "Number of trials: 1\n" in out
    assert "on the trial seeds that all its sets have, 1; 1 more finished trials are left out" in out
    assert "Ignored: 1 trials that are not done." in err
    assert str(broken) in err and str(foreign) in err


def test_several_directories_make_one_row_for_each_sweep(tmp_path, capsys):
    """The same trial in two of them counts once."""
    for trial, accuracy in enumerate((0.5, 0.5, 0.6)):
        for out in ("a", "b")[trial > 1 :] if trial else ("a",):
            make_trial(tmp_path / out, 0, trial, [[0.5]] * 2, [accuracy])
    make_trial(tmp_path / "b", 0, 0, [[0.5]] * 2, [0.7], Settings(dataset="mnist", model_arch="cnn", algorithm="fedavg"))
    both = ["--output_dir", str(tmp_path / "a"), str(tmp_path / "b")]
    assert collect_results.main(both) == 0
    out = capsys.readouterr().out
    assert "| mlp     | digits    | Fedavg      | 0.5333 ± 0.0577      |" in out
    assert "| cnn     | mnist     | fedavg      | 0.7000               |" in out
    assert out.count("Number of hyperparameter sets: 1\n") == 2
    theirs = make_trial(tmp_path / "b", 0, 1, [[0.5]] * 2, [0.5], local=[[0.4], [0.5]])
    assert collect_results.main(both) == 2
    (line,) = capsys.readouterr().err.splitlines()
    ours = tmp_path / "a" / theirs.relative_to(tmp_path / "b")
    assert f"{str(ours)!r} and {str(theirs)!r} hold the same trial with different results" in line


def test_sweeps_with_other_settings_stand_in_rows_of_their_own(tmp_path, capsys):
    """In one directory or in several, with a column for each setting that varies. Only equal ones are compared."""
    make_trial(tmp_path / "a", 0, 0, [[0.5]] * 2, [0.5])
    make_trial(tmp_path / "b", 0, 0, [[0.5] * 7] * 2, [0.5] * 7)
    assert collect_results.main(["--output_dir", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    out = capsys.readouterr().out
    assert "| Algorithm   | rounds   |" in out and "| Fedavg      | 1        |" in out and "| Fedavg      | 7        |" in out
    for algorithm in ("Fedavg", "Fedprox"):
        for alpha, accuracy in ((0.1, 0.6), (0.5, 0.8)):
            settings = Settings(algorithm=algorithm, partition="dirichlet", partition_alpha=alpha)
            for seed in range(3):
                make_trial(tmp_path / "c", 0, seed, [[0.5]] * 2, [accuracy], settings)
    assert collect_results.main(["--output_dir", str(tmp_path / "c")]) == 0
    out, err = capsys.readouterr()
    for alpha, accuracy in ((0.1, "0.6000"), (0.5, "0.8000")):
        for algorithm in ("Fedavg ", "Fedprox"):
            assert f"| {algorithm}     | {alpha}               | **{accuracy}" in out
    assert not err


@pytest.mark.parametrize(("directory", "code"), [("none", 2), ("", 1)])
def test_nothing_to_collect_is_said(call, tmp_path, directory, code):
    result = call("collect_results.py", "--output_dir", tmp_path / directory)
    assert result.returncode == code and len(result.stderr.splitlines()) == 1 and str(tmp_path) in result.stderr


def owner_of(results, name):
    """The object below `results` that has the last part of a dotted `name`, and that part."""
    *path, last = name.split(".")
    return functools.reduce(dict.__getitem__, path, results), last


def replaced(values):
    """Replace values of a JSON file, by their dotted names."""

    def corrupt(path):
        results = json.loads(path.read_text())
        for name, value in values.items():
            owner, last = owner_of(results, name)
            owner[last] = value
        path.write_text(json.dumps(results))

    return corrupt


def without(name):
    def corrupt(path):
        results = json.loads(path.read_text())
        owner, last = owner_of(results, name)
        del owner[last]
        path.write_text(json.dumps(results))

    return corrupt


def a_pipe(path):
    path.unlink()
    os.mkfifo(path)


def a_loop(path):
    path.unlink()
    path.symlink_to(path)


def a_directory(path):
    path.unlink()
    path.mkdir()


def huge(path):
    with open(path, "r+b") as file:
        file.truncate(10 << 30)


BROKEN_RESULTS = {
    "truncated": lambda path: path.write_text(path.read_text()[:-20]),
    "empty": lambda path: path.write_text(""),
    "bytes": lambda path: path.write_bytes(bytes(range(256))),
    "a list": lambda path: path.write_text("[1, 2]"),
    "nested": lambda path: path.write_text("[" * 100_000),
    "missing": lambda path: path.unlink(),
    "a loop": a_loop,
    "a directory": a_directory,
    "a pipe": a_pipe,
    "huge": huge,
    "NaN": replaced({"curves.val_acc": [float("nan")] * 2}),
    "infinity": replaced({"curves.val_acc": [float("inf")] * 2}),
    "a text for a list": replaced({"curves.val_acc": "0.9"}),
    "texts in a list": replaced({"curves.val_acc": ["0.9", "0.9"]}),
    "true for a number": replaced({"curves.val_acc": [True, True]}),
    "a shorter list": replaced({"curves.val_acc": [0.9]}),
    "a longer list": replaced({"curves.round_seconds": [0.1] * 3}),
    "no last value": replaced({"curves.val_acc": [0.9, None]}),
    "an accuracy above 1": replaced({"curves.test_acc": [9.0, 9.0]}),
    "a negative accuracy": replaced({"curves.val_acc": [-0.9, 0.9]}),
    "an integer beyond floats": replaced({"curves.val_loss": [10**400, 1]}),
    "no curves": without("curves"),
    "a list for curves": replaced({"curves": []}),
    "another trial's": replaced({"trial_seed": 7}),
    "a text for a seed": replaced({"hparams_seed": "1"}),
    "another data set's": replaced({"settings.dataset": "mnist"}),
    "an unknown setting": replaced({"settings.nonsense": 1}),
    "another type of a setting": replaced({"settings.rounds": 2.0}),
    "no settings": without("settings"),
    "another setting's": replaced({"hparams.learning_rate": 0.5}),
    "a list for a hyper-parameter": replaced({"hparams.learning_rate": [0.5]}),
    "no hyper-parameters": without("hparams"),
    "a text for whether it is personal": replaced({"personal": "no"}),
    "no accuracy": without("curves.test_acc"),
    "no hyper-parameter": without("hparams.batch_size"),
}


def rewritten(change):
    """Change the arrays of an npz file."""

    def corrupt(path):
        with np.load(path) as file:
            arrays = dict(file)
        arrays.update(change(arrays))
        np.savez_compressed(path, **{name: values for name, values in arrays.items() if values is not None})

    return corrupt


def flipped(path):
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        content[archive.getinfo("local_loss.npy").header_offset - 8] ^= 1  # in the member before
    path.write_bytes(content)


def with_member(name, content):
    """Replace one member of a zip file."""

    def corrupt(path):
        with zipfile.ZipFile(path) as archive:
            members = {member: archive.read(member) for member in archive.namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for member, theirs in (members | {name: content}).items():
                archive.writestr(member, theirs)

    return corrupt


def header(shape, kind="<f4"):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": kind, "fortran_order": False, "shape": shape})
    return file.getvalue()


BROKEN_CLIENTS = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-20]),
    "empty": lambda path: path.write_bytes(b""),
    "a text": lambda path: path.write_text("{}"),
    "a flipped byte": flipped,
    "missing": lambda path: path.unlink(),
    "a directory": a_directory,
    "a pipe": a_pipe,
    "huge": huge,
    "a shape of gigabytes": with_member("val_acc.npy", header((2, 1 << 40)) + bytes(16)),
    "a bomb": with_member("val_acc.npy", header((2, 2)) + bytes(1 << 28)),
    "a shorter array": with_member("val_acc.npy", header((2, 2)) + bytes(8)),
    "no header": with_member("val_acc.npy", bytes(64)),
    "a pickle": rewritten(lambda arrays: {"val_acc": np.array([[None, {}], [0, 1]], dtype=object)}),
    "no array": rewritten(lambda arrays: {"val_acc": None}),
    "one more array": rewritten(lambda arrays: {"more": np.zeros(2)}),
    "another shape": rewritten(lambda arrays: {"val_acc": np.zeros((2, 3), np.float32)}),
    "another type": rewritten(lambda arrays: {"val_acc": np.zeros((2, 2))}),
    "an accuracy above 1": rewritten(lambda arrays: {"val_acc": arrays["val_acc"] + 1}),
    "a negative weight": rewritten(lambda arrays: {"val_samples": -arrays["val_samples"]}),
    "infinity": rewritten(lambda arrays: {"val_loss": arrays["val_loss"] + np.float32(np.inf)}),
    "another trial's": rewritten(lambda arrays: {"local_acc": arrays["local_acc"] / 2}),
}
BROKEN = [("results.json", name) for name in BROKEN_RESULTS] + [("clients.npz", name) for name in BROKEN_CLIENTS]


@pytest.mark.parametrize(("file", "name"), BROKEN)
def test_a_broken_trial_is_named_and_gives_no_number(tmp_path, capsys, file, name):
    make_trial(tmp_path, 0, 0, [[0.5, 0.4]] * 2, [0.5, 0.6])
    assert collect_results.main(["--output_dir", str(tmp_path)]) == 0
    expected = capsys.readouterr().out
    path = make_trial(tmp_path, 1, 0, [[0.9, 0.9]] * 2, [0.9, 0.9]) / file
    assert collect_results.main(["--output_dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out != expected
    (BROKEN_RESULTS if file == "results.json" else BROKEN_CLIENTS)[name](path)
    assert collect_results.main(["--output_dir", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert out == expected
    (line,) = err.splitlines()
    assert str(path) in line and line.startswith("Ignored, cannot be read: ")
    assert len(line) < 800


def test_what_the_registry_gains_between_two_collections_changes_nothing(tmp_path, capsys, monkeypatch):
    """A hyper-parameter more for the algorithm, and an algorithm more."""
    make_trial(tmp_path, 0, 0, [[0.5, 0.4]] * 2, [0.5, 0.6])
    assert collect_results.main(["--output_dir", str(tmp_path)]) == 0
    expected = capsys.readouterr()
    known = hparams_registry.hparams_of
    one_more = {"new_one": hparams_registry.Hparam(1.0, hparams_registry.Fixed(1.0), 0.0, 2.0)}
    monkeypatch.setattr(hparams_registry, "hparams_of", lambda *key: known(*key) | one_more)
    assert "new_one" in hparams_registry.default_hparams("Fedavg", "digits")
    monkeypatch.setitem(algorithms.REGISTRY, "Newalgorithm", "newalgorithm")
    assert collect_results.main(["--output_dir", str(tmp_path)]) == 0
    assert capsys.readouterr() == expected and "Best Test Accuracy: 0.5000" in expected.out


@pytest.mark.process
def test_collecting_asks_neither_the_registry_of_hyper_parameters_nor_torch(tmp_path):
    make_trial(tmp_path, 0, 0, [[0.5, 0.4]] * 2, [0.5, 0.6])
    program = (
        "import sys; sys.modules['hparams_registry'] = sys.modules['torch'] = None; import collect_results; "
        "sys.exit(collect_results.main())"
    )
    command = [sys.executable, "-c", program, "--output_dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HUNG, check=False, cwd=PROJECT)
    assert done.returncode == 0 and "Best Test Accuracy: 0.5000" in done.stdout, done.stderr


BROKEN_SWEEPS = {
    "truncated": lambda path: path.write_text(path.read_text()[:-20]),
    "empty": lambda path: path.write_text(""),
    "bytes": lambda path: path.write_bytes(bytes(range(256))),
    "a list": lambda path: path.write_text("[1, 2]"),
    "nested": lambda path: path.write_text("[" * 100_000),
    "a loop": a_loop,
    "a directory": a_directory,
    "an unknown setting": replaced({"nonsense": 1}),
    "an unknown key": lambda path: path.write_text('{"settings": {}, "nonsense": 1}'),
    "no search space": lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | {"spaces": [{"domains": {}}]})),
    "an unknown data set": replaced({"dataset": "foreign"}),
    "a text for a number": replaced({"rounds": "2"}),
    "true for a number": replaced({"rounds": True}),
    "a list for a number": replaced({"rounds": [2]}),
    "NaN": replaced({"participation": float("nan")}),
    "too many clients": replaced({"num_clients": 10**30}),
    "none for a number": replaced({"rounds": None}),
}


@pytest.mark.parametrize("name", BROKEN_SWEEPS)
def test_a_broken_sweep_file_is_named_and_the_rest_goes_on(tmp_path, capsys, name):
    make_trial(tmp_path, 0, 0, [[0.9, 0.9]] * 2, [0.9, 0.9])
    make_trial(tmp_path, 0, 0, [[0.5, 0.5]] * 2, [0.5, 0.6], Settings(dataset="mnist"))
    path = tmp_path / "mlp_digits_Fedavg" / "sweep.json"
    BROKEN_SWEEPS[name](path)
    assert collect_results.main(["--output_dir", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert str(path) in line and "Best Test Accuracy: 0.5000" in out and "digits" not in out

    few = ["--output_dir", str(tmp_path), "--num_hparams", "1", "--num_trials", "1"]
    assert sweep.main(["status", *few]) == 0
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert str(path) in line and out.startswith("Done: ")
    assert sweep.main(["launch", *few, "--skip_confirmation"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(path) in line and "restore it or use another --output_dir" in line
    assert sweep.main(["delete_all", "--output_dir", str(tmp_path), "--skip_confirmation"]) == 0
    err = capsys.readouterr().err
    assert str(path) in err and "Deleted 1 jobs!" in err and list(tmp_path.iterdir()) == [path.parent]


def test_what_is_out_of_place_is_named(tmp_path, capsys):
    good = make_trial(tmp_path, 0, 0, [[0.5]] * 2, [0.5])
    trials = good.parent
    (tmp_path / "notes.txt").write_text("mine")
    (trials.parent / "notes.txt").write_text("mine")
    (trials / "trial_1").write_text("")
    (trials / "trial_2").symlink_to(trials / "trial_2")
    shutil.copytree(good, trials / "trial_x")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    shutil.copytree(trials.parent, tmp_path / "copy", symlinks=True)
    shutil.copytree(trials.parent, tmp_path / "bare", symlinks=True)
    (tmp_path / "bare" / "sweep.json").unlink()
    assert collect_results.main(["--output_dir", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert "Best Test Accuracy: 0.5000\n" in out and "Number of trials: 1\n" in out
    lines = err.splitlines()
    for path in (trials / "trial_1", trials / "trial_2", trials / "trial_x", tmp_path / "copy", tmp_path / "bare"):
        assert sum(str(path) in line for line in lines) == 1, path
    assert len(lines) == 5


def test_status_names_what_is_cut_and_launching_computes_it_again(launch_here, call, finished_copy):

    out, size = finished_copy, ("--num_hparams", 2, "--num_trials", 1)
    before = results(out)
    first, second = sorted(out.glob("*/*/trial_0"))
    results_file, clients_file = first / "results.json", second / "clients.npz"
    results_file.unlink()
    clients_file.write_bytes(clients_file.read_bytes()[:-30])
    status = call("sweep.py", "status", "--output_dir", out, *size)
    assert status.returncode == 0 and "2 jobs: 2 done" in status.stdout
    for path in (results_file, clients_file):
        assert f"{path} is missing or truncated; delete done beside it" in status.stdout
        path.with_name("done").unlink()
    assert status.stdout.count("missing or truncated") == 2
    assert launch_here(out).returncode == 0 and results(out) == before


def test_the_three_lines_of_the_docs_read_a_trial(tmp_path, monkeypatch):
    text = (PROJECT / "docs" / "results.md").read_text()
    start = text.index("    results = json.load(")
    lines = textwrap.dedent(text[start : text.index("\n\n", start)])
    monkeypatch.chdir(make_trial(tmp_path, 1, 2, [[0.5, 0.25], [0.9, 0.8]], [0.5, 0.6]))
    names = {"json": json, "pandas": pandas, "numpy": np}
    exec(lines, names)
    assert names["results"]["hparams"] == random_hparams("Fedavg", "digits", 1) and names["results"]["trial_seed"] == 2
    assert names["curves"]["test_acc"].tolist() == [0.5, 0.6]
    assert names["clients"]["val_acc"][0, 1] == 0.25
