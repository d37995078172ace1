"""Trials with their real server and client as threads of the test's process, and the samples as a plain user has them."""

import threading
import types

import torch

import client_benchmark
from federated.running import checkpoint
from federated.running.listener import Listener
from federated.running.rounds import serve
from federated.settings import ServerOptions, Settings
from federated.trial import Trial
from hparams_registry import default_hparams

SEED = 7
SIZE = {"samples_per_client": 60, "num_clients": 3, "local_optimizer": "sgd", "rounds": 3}


class Run(types.SimpleNamespace):
    """broadcast [broadcasts, size] at the end; rounds: {name: array} of the checkpoint after each; the Trial; Settings."""

    def kept(self, client, vector=0, round=-1):
        """A vector that a client keeps [size]."""
        start = 1 + vector * self.broadcast.shape[1]
        return torch.from_numpy(self.rounds[round][f"client_{client}"][start : start + self.broadcast.shape[1]])


def trainer(tmp_path, monkeypatch):
    """train(algorithm, hparams, **settings) runs a trial and returns its Run."""
    numbers = iter(range(100))

    def train(algorithm="Fedavg", hparams=(), **settings):
        settings = Settings(algorithm=algorithm, **{**SIZE, **settings})
        several_steps = {} if algorithm == "Fedsgd" else {"batch_size": 16}
        hparams = default_hparams(algorithm, settings.dataset, settings.local_optimizer) | several_steps | dict(hparams)
        rounds = []
        monkeypatch.setattr(
            checkpoint,
            "save",
            lambda directory, state, arrays, name: rounds.append({name: array.copy() for name, array in arrays.items()}),
        )
        this = Trial(settings, hparams, 0, SEED, tmp_path / str(next(numbers)))
        this.directory.mkdir()
        listener = Listener(None)
        options = ServerOptions(timeout=60, checkpoint_seconds=0)
        client = threading.Thread(target=client_benchmark.take_part, args=(listener.address, None, options))
        client.start()
        broadcast = serve(this, listener, 1, options).clone()
        client.join()
        return Run(broadcast=broadcast, rounds=rounds, trial=this, settings=settings, hparams=hparams)

    torch.set_num_threads(1)
    return train


def pixels(data, indices, is_test=False):
    """The samples of a data set's training or test set as a plain user would normalise them, and their labels."""
    mean, std = (torch.tensor(values).view(data.spec.channel_shape) for values in (data.spec.mean, data.spec.std))
    inputs, labels = (data.test_inputs, data.test_labels) if is_test else (data.train_inputs, data.train_labels)
    return (torch.from_numpy(inputs[indices]) / data.spec.scale - mean) / std, torch.from_numpy(labels[indices])
