import json

import pytest

import collect_results
from federated.trial import Settings, Trial, hparams_hash, write_sweep_file
from hparams_registry import default_hparams, random_hparams


def make_trial(output_dir, hparams_seed, trial_seed, val, test, settings=None, done=True):
    """A finished trial's files. val[client][round] with 10 and 30 held-out samples, test[round]."""
    settings = settings or Settings()
    draw = (settings.algorithm, settings.dataset)
    hparams = random_hparams(*draw, hparams_seed) if hparams_seed else default_hparams(*draw)
    directory = output_dir / settings.name / hparams_hash(hparams) / f"trial_{trial_seed}"
    this = Trial(settings, hparams, hparams_seed, trial_seed, directory)
    write_sweep_file(directory.parent.parent, settings)
    for client in range(2):
        this.write_results(client, {
            "client_id": client, **this.description(), "train_indices": [0] * 10, "train_loss": [1.0] * len(test),
            "val_acc": val[client], "val_samples": (10, 30)[client], "test_acc": test, "step_time": [0.1] * len(test),
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

| Model    | Dataset   | Algorithm   | Best Test Accuracy   |
|----------|-----------|-------------|----------------------|
| resnet18 | cifar10   | Fedavg      | 0.8000 ± 0.1000      |

Job Statistics:

Number of hyperparameter sets: 2
Number of trials: 3
Number of clients: 2
"""
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
    make_trial(tmp_path / "b", 0, 0, [[0.5]] * 2, [0.5], Settings(rounds=7))
    assert collect_results.main(["--output_dir", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    assert "--rounds" in capsys.readouterr().err


@pytest.mark.parametrize(("directory", "code"), [("none", 2), ("", 1)])
def test_nothing_to_collect_is_said(run, tmp_path, directory, code):
    result = run("collect_results.py", "--output_dir", tmp_path / directory)
    assert result.returncode == code and len(result.stderr.splitlines()) == 1 and str(tmp_path) in result.stderr
