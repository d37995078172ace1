"""What --tensorboard writes, as TensorBoard's own reader has it: the numbers of collect_results.py."""

import pytest
from helpers import STATEFUL, Sweep, events_of, kill_after, results, trial_of

from federated.reporting import selection
from federated.reporting.collect import COLUMNS, TRIAL, collect
from federated.trial import EVENTS

METRICS = list(COLUMNS)[list(COLUMNS).index("train_loss") : list(COLUMNS).index("accuracy") + 1]


def pairs(rows, name):
    """The same of a column of the frame."""
    return list(rows.set_index("round")[name].dropna().astype("float32").items())


@pytest.mark.slow
def test_tensorboard_reads_the_frame(launch_here, call, tmp_path):
    """Of rounds without an evaluation, clients that do not train in each round, and clients with models of their own, too."""
    out, sweep = tmp_path / "out", ("--algorithm", "Fedavg", "Ditto", "--num_trials", 2)
    options = (*sweep, "--rounds", 5, "--eval_every", 2, "--num_clients", 3, "--participation", 0.67)
    launched = launch_here(out, *options, "--tensorboard")
    assert launched.returncode == 0, launched.stderr
    found, groups = collect([out]), {}
    for (name, setting, seed), rows in found.rounds.groupby(TRIAL):
        algorithm = found.settings[name].algorithm
        (trial,) = out.glob(f"mlp_digits_{algorithm},*/{setting}/trial_{seed}")
        scalars, hparams, group = events_of(trial)
        best = selection.chosen(rows.dropna(subset=["val_acc", "accuracy"]))
        expected = {name: pairs(rows, name) for name in METRICS}
        expected |= {f"best/{name}": pairs(best, name) for name in ("val_acc", "accuracy")}
        assert scalars == expected and len(scalars["train_loss"]) == 5 and len(scalars["test_loss"]) == 3
        batch_size = rows["hparams.batch_size"].iloc[0]
        assert hparams.items() >= {"algorithm": algorithm, "batch_size": batch_size, "rounds": 5}.items()
        groups.setdefault(group, set()).add((algorithm, setting))
    assert len(groups) == 4 and all(len(settings) == 1 for settings in groups.values())  # trials by their settings

    assert launch_here(tmp_path / "plain", *options).returncode == 0
    assert results(tmp_path / "plain") == results(out) and not list((tmp_path / "plain").rglob(EVENTS))

    deleted = call("sweep.py", "delete_all", "--output_dir", out, *sweep, "--num_hparams", 2, "--skip_confirmation")
    assert deleted.returncode == 0 and list(out.iterdir()) == []


@pytest.mark.slow
def test_a_resumed_trial_has_one_curve(launch_here, tmp_path):
    out, options = tmp_path / "out", (*STATEFUL, "--rounds", "300", "--tensorboard")
    trial = kill_after(Sweep(out, *options), 20)
    begun = events_of(trial)[0]["val_acc"]
    launched = launch_here(out, *options)
    assert launched.returncode == 0, launched.stderr
    assert "resumes after round" in (trial_of(out) / "server.log").read_text()
    scalars, rows = events_of(trial)[0], collect([out]).rounds
    assert {name: scalars[name] for name in METRICS} == {name: pairs(rows, name) for name in METRICS}
    assert len(begun) >= 19 and begun == scalars["val_acc"][: len(begun)]  # the killed one wrote as it ran


@pytest.mark.parametrize("command", [("sweep", "launch", "--skip_confirmation"), ("server_benchmark",)])
def test_without_tensorboard_it_is_refused(run_without, tmp_path, command):
    refused = run_without("tensorboard", *command, "--output_dir", tmp_path / "out", "--tensorboard")
    last = refused.stderr.splitlines()[-1]
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert "--tensorboard needs tensorboard" in last and "pip install tensorboard" in last
    assert not (tmp_path / "out").exists()
