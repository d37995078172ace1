import dataclasses
import json
import shutil

import pytest

import collect_results
import sweep
from federated.settings import Settings, write_sweep_file
from federated.trial import Trial, hparams_hash
from hparams_registry import default_hparams, random_hparams


def make_trial(output_dir, hparams_seed, trial_seed, val, test, settings=None, done=True, local=None):
    """A finished trial's files. val[client][round] with 10 and 30 held-out samples, test[round], local[client][round] with 30
    and 10 test samples."""
    settings = dataclasses.replace(settings or Settings(), rounds=len(test))
    draw = (settings.algorithm, settings.dataset)
    hparams = random_hparams(*draw, hparams_seed) if hparams_seed else default_hparams(*draw)
    directory = output_dir / settings.name / hparams_hash(hparams) / f"trial_{trial_seed}"
    this = Trial(settings, hparams, hparams_seed, trial_seed, directory)
    write_sweep_file(directory.parent.parent, settings)
    evaluated = [None if accuracy is None else 1.0 for accuracy in test]
    for client in range(2):
        trained = {name: [1.0] * len(test) for name in ("train_loss", "train_acc")}
        losses = {name: evaluated for name in ("val_loss", "test_loss", "local_test_loss")}
        this.write_results(client, {
            "client_id": client, **this.description(), "train_indices": [0] * 10, **trained, **losses,
            "val_acc": val[client], "val_samples": (10, 30)[client], "test_acc": test,
            "local_test_acc": local[client] if local else test, "local_test_samples": (30, 10)[client],
            "step_time": [0.5] * len(test), "bytes_sent": [1_000_000] * len(test),
            "provenance": {"runs": [{"round": 0, "code": "a"}]},
        })  # fmt: skip
        if not done:
            (this.client_directory(client) / "done").unlink()
    return directory


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
    make_trial(tmp_path, 1, 0, [[0.9]] * 2, [0.9])  # better, but on one trial only
    broken = make_trial(tmp_path, 2, 0, [[0.9]] * 2, [0.9])
    (broken / "client_1" / "results.json").write_text('{"test_acc": [0')
    foreign = make_trial(tmp_path, 3, 0, [[0.9]] * 2, [0.9])
    (foreign / "client_0" / "results.json").write_text(json.dumps([1, 2]))
    assert collect_results.main(["--output_dir", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert "Best Test Accuracy: 0.5000 ± 0.0000" in out
    assert "Number of trials: 2\n" in out
    assert "Ignored: 1 trials that are not done." in err
    assert "Ignored: 1 settings with fewer finished trials than others." in err
    assert str(broken) in err and str(foreign) in err


def test_several_directories_make_one_row_for_each_sweep(tmp_path, capsys):
    for trial in range(2):
        make_trial(tmp_path / "a", 0, trial, [[0.5]] * 2, [0.5])
        make_trial(tmp_path / "b", 0, trial + 1, [[0.5]] * 2, [0.6])  # trial 1 is in both and counts once
    make_trial(tmp_path / "b", 0, 0, [[0.5]] * 2, [0.7], Settings(dataset="mnist", model_arch="cnn", algorithm="fedavg"))
    assert collect_results.main(["--output_dir", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    out = capsys.readouterr().out
    assert "| mlp     | digits    | Fedavg      | 0.5333 ± 0.0577      |" in out
    assert "| cnn     | mnist     | fedavg      | 0.7000               |" in out
    assert out.count("Number of hyperparameter sets: 1\n") == 2


def test_sweeps_with_other_settings_do_not_mix(tmp_path, capsys):
    make_trial(tmp_path / "a", 0, 0, [[0.5]] * 2, [0.5])
    make_trial(tmp_path / "b", 0, 0, [[0.5] * 7] * 2, [0.5] * 7)
    assert collect_results.main(["--output_dir", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    assert "--rounds" in capsys.readouterr().err


@pytest.mark.parametrize(("directory", "code"), [("none", 2), ("", 1)])
def test_nothing_to_collect_is_said(run, tmp_path, directory, code):
    result = run("collect_results.py", "--output_dir", tmp_path / directory)
    assert result.returncode == code and len(result.stderr.splitlines()) == 1 and str(tmp_path) in result.stderr


def replaced(**values):
    """Puts values into a client's results; a function is called with the old value."""

    def corrupt(path):
        results = json.loads(path.read_text())
        for name, value in values.items():
            results[name] = value(results[name]) if callable(value) else value
        path.write_text(json.dumps(results))

    return corrupt


def without(name):
    def corrupt(path):
        results = json.loads(path.read_text())
        del results[name]
        path.write_text(json.dumps(results))

    return corrupt


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
    "huge": huge,
    "NaN": replaced(val_acc=[float("nan")] * 2),
    "infinity": replaced(val_acc=[float("inf")] * 2),
    "a text for a list": replaced(val_acc="0.9"),
    "texts in a list": replaced(val_acc=["0.9", "0.9"]),
    "true for a number": replaced(val_acc=[True, True]),
    "a shorter list": replaced(val_acc=[0.9]),
    "a longer list": replaced(step_time=[0.1] * 3),
    "an accuracy above 1": replaced(test_acc=[9.0, 9.0]),
    "a negative accuracy": replaced(val_acc=[-0.9, 0.9]),
    "another test accuracy than client 0": replaced(test_acc=[0.1, 0.2]),
    "a negative weight": replaced(val_samples=-1),
    "a text for a weight": replaced(val_samples="10"),
    "another trial's": replaced(trial_seed=7),
    "another client's": replaced(client_id=0),
    "another data set's": replaced(dataset="mnist"),
    "another setting's": replaced(learning_rate=0.5),
    "a list for a hyper-parameter": replaced(learning_rate=[0.5]),
    "no accuracy": without("test_acc"),
    "no hyper-parameter": without("batch_size"),
    "no samples": without("train_indices"),
}


@pytest.mark.parametrize("name", BROKEN_RESULTS)
def test_a_broken_trial_is_named_and_gives_no_number(tmp_path, capsys, name):
    make_trial(tmp_path, 0, 0, [[0.5, 0.4]] * 2, [0.5, 0.6])
    assert collect_results.main(["--output_dir", str(tmp_path)]) == 0
    expected = capsys.readouterr().out
    path = make_trial(tmp_path, 1, 0, [[0.9, 0.9]] * 2, [0.9, 0.9]) / "client_1" / "results.json"
    assert collect_results.main(["--output_dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out != expected
    BROKEN_RESULTS[name](path)
    assert collect_results.main(["--output_dir", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert out == expected
    (line,) = err.splitlines()
    assert str(path) in line and line.startswith("Ignored, cannot be read: ")
    assert len(line) < 800


BROKEN_SWEEPS = {
    "truncated": lambda path: path.write_text(path.read_text()[:-20]),
    "empty": lambda path: path.write_text(""),
    "bytes": lambda path: path.write_bytes(bytes(range(256))),
    "a list": lambda path: path.write_text("[1, 2]"),
    "nested": lambda path: path.write_text("[" * 100_000),
    "a loop": a_loop,
    "a directory": a_directory,
    "an unknown setting": lambda path: path.write_text('{"nonsense": 1}'),
    "an unknown data set": replaced(dataset="foreign"),
    "a text for a number": replaced(rounds="2"),
    "true for a number": replaced(rounds=True),
    "a list for a number": replaced(rounds=[2]),
    "NaN": replaced(participation=float("nan")),
    "too many clients": replaced(num_clients=10**30),
    "none for a number": replaced(rounds=None),
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
    for command in ("launch", "delete_all"):
        assert sweep.main([command, *few, "--skip_confirmation"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert str(path) in line and "restore it or use another --output_dir" in line


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


def test_done_without_results_is_run_again(tmp_path, capsys):
    path = make_trial(tmp_path, 0, 0, [[0.5]] * 2, [0.5]) / "client_0" / "results.json"
    path.unlink()
    assert sweep.main(["status", "--output_dir", str(tmp_path), "--num_hparams", "1", "--num_trials", "1"]) == 0
    assert capsys.readouterr().out.startswith("Incomplete: ")


def test_status_names_what_is_cut_and_launching_computes_it_again(launch, run, tmp_path):
    from test_sweep import results

    out, size = tmp_path / "out", ("--num_hparams", 2, "--num_trials", 1)
    assert launch(out).returncode == 0
    before = results(out)
    path = sorted(out.glob("*/*/trial_0/client_1/results.json"))[0]
    path.write_bytes(path.read_bytes()[:-100])
    status = run("sweep.py", "status", "--output_dir", out, *size)
    assert status.returncode == 0 and "2 jobs: 2 done" in status.stdout
    assert f"{path} is no whole JSON object" in status.stdout and status.stdout.count("no whole") == 1
    path.unlink()
    assert launch(out).returncode == 0 and results(out) == before
