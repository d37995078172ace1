"""The model that --save_model keeps: torch's own, without this project, and that of the round which the table is of."""

import json

import pytest
import torch
from helpers import STATEFUL, Sweep, kill_after, results, trial_of
from torch import nn

from federated.data import datasets
from federated.trial import MODEL


def digits_resnet18():
    """torchvision's, with a 3x3 first convolution, no first max-pool, and dropout before the last layer."""
    from torchvision.models.resnet import BasicBlock, ResNet  # takes seconds

    model = ResNet(BasicBlock, [2, 2, 2, 2], num_classes=10)
    model.conv1 = nn.Conv2d(1, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    model.fc = nn.Sequential(nn.Dropout(0.5), model.fc)
    return model


def curves_of(trial):
    return json.loads((trial / "results.json").read_text())["curves"]


def selected_round(curves):
    """The round of the best validation accuracy, counted from 0."""
    return curves["val_acc"].index(max(curves["val_acc"]))


@pytest.mark.slow
def test_a_fresh_resnet18_of_torchvision_reaches_the_same_accuracy(launch_here, tmp_path):
    hparams = '{"learning_rate": 0.001, "batch_size": 16}'
    options = ("--model_arch", "resnet18", "--rounds", 3, "--num_hparams", 1, "--hparams", hparams, "--samples_per_client", 60)
    launched = launch_here(tmp_path / "out", *options, "--save_model")
    assert launched.returncode == 0, launched.stderr
    trial = trial_of(tmp_path / "out")
    model = digits_resnet18()
    model.load_state_dict(torch.load(trial / MODEL, weights_only=True))
    data = datasets.load("digits", "data")
    mean, std = (torch.tensor(values) * data.spec.scale for values in (data.spec.mean, data.spec.std))
    inputs = (torch.from_numpy(data.test_inputs).float() - mean) / std
    with torch.inference_mode():
        right = model.eval()(inputs).argmax(1) == torch.from_numpy(data.test_labels)
    curves = curves_of(trial)
    accuracies = curves["test_acc"]
    assert accuracies[selected_round(curves)] == right.double().mean().item() > 0.2
    assert len(set(accuracies)) == 3  # so that another round's model would be seen

    assert launch_here(tmp_path / "plain", *options).returncode == 0
    assert results(tmp_path / "plain") == results(tmp_path / "out")
    assert not list((tmp_path / "plain").rglob(MODEL))


@pytest.mark.slow
def test_the_selected_model_survives_a_kill(launch_here, tmp_path):
    """With a learning rate at which the best round is an early one, so that it lies before the checkpoint."""
    options = (*STATEFUL, "--rounds", "300", "--local_optimizer", "sgd", "--hparams", '{"learning_rate": 1.5}', "--save_model")
    assert launch_here(tmp_path / "whole", *options, "--checkpoint_seconds", 10).returncode == 0
    best = selected_round(curves_of(trial_of(tmp_path / "whole")))
    kill_after(Sweep(tmp_path / "killed", *options), best + 2)
    launched = launch_here(tmp_path / "killed", *options)
    assert launched.returncode == 0, launched.stderr
    whole, killed = (torch.load(trial_of(tmp_path / name) / MODEL, weights_only=True) for name in ("whole", "killed"))
    assert results(tmp_path / "whole") == results(tmp_path / "killed")
    assert whole.keys() == killed.keys() and all(whole[name].equal(killed[name]) for name in whole)


@pytest.mark.slow
def test_a_checkpoint_with_or_without_a_selected_model_is_gone_on_from(launch_here, tmp_path):
    for first, then, said in (((), ("--save_model",), "starts again"), (("--save_model",), (), "resumes after")):
        out = tmp_path / said
        trial = kill_after(Sweep(out, *STATEFUL, "--rounds", "300", *first), 5)
        launched = launch_here(out, *STATEFUL, "--rounds", "300", *then)
        assert launched.returncode == 0, launched.stderr
        assert said in (trial / "server.log").read_text()
        assert (trial / MODEL).exists() == bool(then)
    assert results(tmp_path / "starts again") == results(tmp_path / "resumes after")


def test_deleting_takes_the_model_along(launch_here, call, tmp_path):
    assert launch_here(tmp_path / "out", "--num_hparams", 1, "--save_model").returncode == 0
    assert list((tmp_path / "out").rglob(MODEL))
    one = ("--num_hparams", 1, "--num_trials", 1)
    deleted = call("sweep.py", "delete_all", "--output_dir", tmp_path / "out", *one, "--skip_confirmation")
    assert deleted.returncode == 0 and list((tmp_path / "out").iterdir()) == []


def test_there_has_to_be_a_global_model(launch_here, tmp_path):
    refused = launch_here(tmp_path / "out", "--algorithm", "Fedper", "--save_model")
    assert refused.returncode == 2 and not (tmp_path / "out").exists()
    assert "--save_model: Fedper has no global model to keep" in refused.stderr.splitlines()[-1]
