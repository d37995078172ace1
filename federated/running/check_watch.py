"""An extension by which federated.running.check watches its trials: it prints the name of state that changes and that no trial
keeps, and kills the server of the trial in RESUMED after its first round, once."""

import hashlib
import io
import os
import random
import signal
import typing

import numpy as np
import torch

from federated.learning.worker import Worker
from federated.running.check import RESUMED, STATE
from federated.running.observers import Observer
from federated.running.rounds import TrialServer


def state_of(algorithm: typing.Any, modules: typing.Iterable = ()) -> dict[str, bytes]:
    """{name of what one's own code may have changed: a digest}."""
    own = {f"self.{name}": value for name, value in vars(algorithm).items()}
    of_class = {f"{type(algorithm).__name__}.{name}": value for name, value in vars(type(algorithm)).items()}
    of_model = {
        f"{name} of the model's {type(module).__name__}": value
        for module in modules
        for name, value in vars(module).items()
        if not name.startswith("_") and name != "training"
    }
    numbers = {"the random numbers of numpy": np.random.get_state(), "those of random": random.getstate()}
    return {name: _digest(value) for name, value in (own | of_class | of_model | numbers).items()}


def _digest(value: object) -> bytes:
    try:
        torch.save(value, content := io.BytesIO())
        return hashlib.sha256(content.getvalue()).digest()
    except Exception:  # what cannot be written, such as a function
        return str(id(value)).encode()


def print_changes(before: dict[str, bytes], after: dict[str, bytes], where: str) -> None:
    """Print the names of state whose digests differ."""
    for name in after:
        if before.get(name) != after[name]:
            print(f"{STATE}{name} ({where})", flush=True)


class Watch(Observer):
    def __init__(self, server: TrialServer) -> None:
        self._server, self._state = server, state_of(server.algorithm)

    def after_round(self, round: int) -> None:
        print_changes(self._state, state_of(self._server.algorithm), "on the server")
        if round == 1 and RESUMED in self._server.trial.directory.parts:
            os.kill(os.getpid(), signal.SIGKILL)


make_observers, train, upload = TrialServer._make_observers, Worker.train, Worker.upload


def watched_train(self, number, round, batches=None):
    self.state_before = state_of(self.algorithm, self.model.module.modules())
    return train(self, number, round, batches)


def watched_upload(self, client, updates):
    upload(self, client, updates)
    print_changes(self.state_before, state_of(self.algorithm, self.model.module.modules()), "in a client process")


TrialServer._make_observers = lambda self: [*make_observers(self), Watch(self)]  # type: ignore[method-assign]
Worker.train, Worker.upload = watched_train, watched_upload  # type: ignore[method-assign]
