"""The work that all peers share, so that they differ in overhead only: the trials, and a client's epoch in plain PyTorch."""

import functools
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import torch
from torch import nn

from benchmarks.plain import accuracy, optimizer_of
from federated import models
from federated.data import datasets, partition
from federated.learning.device_data import batch_sizes
from federated.seeds import stream_seed
from federated.settings import Settings
from hparams_registry import default_hparams, random_hparams

# Optimizer moments are reset each round, as Flower's clients keep none.
WORK = {
    "digits": Settings(optimizer_state="reset"),
    "fashion_mnist": Settings(
        model_arch="cnn", dataset="fashion_mnist", samples_per_client=10_000, rounds=3, optimizer_state="reset"
    ),
}


def trials_of(work, count):
    """[(hparams, trial seed)] of the first `count` trials, with one trial of each set before the next of any."""
    sets = 5 if work == "digits" else 1
    hparams = [default_hparams("Fedavg", "digits"), *(random_hparams("Fedavg", "digits", k) for k in range(1, sets))]
    return [(hparams[index % sets], index // sets) for index in range(count)]


class Client:
    """One client's data, and its epoch from given weights."""

    def __init__(self, work, data_dir, hparams, trial_seed, number):
        torch.set_num_threads(1)
        self.settings, self.hparams, self.trial_seed, self.number = WORK[work], hparams, trial_seed, number
        data = datasets.load(self.settings.dataset, data_dir)
        part = partition.split(data, self.settings, trial_seed)[number]
        self.images, self.labels = (
            normalised(data, data.train_inputs[part.train]),
            torch.from_numpy(data.train_labels[part.train]),
        )
        self.test = normalised(data, data.test_inputs), torch.from_numpy(data.test_labels)
        self.model = initial_model(work, hparams, trial_seed)

    def train(self, state, round):
        """The state after an epoch from `state`."""
        self.model.load_state_dict(state)
        self.model.train()
        optimizer = optimizer_of(self.settings, self.hparams, self.model)
        order = torch.Generator().manual_seed(stream_seed(self.trial_seed, self.number, round, "order"))
        torch.manual_seed(stream_seed(self.trial_seed, self.number, round, "dropout"))
        sizes = batch_sizes(len(self.labels), self.hparams)
        for batch in torch.randperm(len(self.labels), generator=order).split(sizes):
            optimizer.zero_grad()
            nn.functional.cross_entropy(self.model(self.images[batch]), self.labels[batch]).backward()
            optimizer.step()
        return self.model.state_dict()

    def test_accuracy(self, state):
        self.model.load_state_dict(state)
        return accuracy(self.model, *self.test)


@functools.lru_cache(maxsize=4)
def client_of(work, data_dir, hparams, trial_seed, number):
    """The Client with `hparams` as JSON, kept by this process for the rounds to come."""
    return Client(work, data_dir, json.loads(hparams), trial_seed, number)


def normalised(data, images):
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (data.spec.mean, data.spec.std))
    return (torch.from_numpy(images) / data.spec.scale - mean) / std


def initial_model(work, hparams, trial_seed):
    settings = WORK[work]
    spec = datasets.REGISTRY[settings.dataset]
    return models.build(settings.model_arch, spec, hparams["dropout_rate"], stream_seed(trial_seed, "model"))
