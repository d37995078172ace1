"""The code of a paper: an algorithm, a model and a data set of its own. See README.md."""

import pathlib

import numpy as np
from networks import Rows

from federated import algorithms, models
from federated.algorithms.fedavg import Fedavg
from federated.data import datasets
from federated.domains import Choice, Hparam


@algorithms.register
class Trimmed(Fedavg):
    """The server bounds how far the average may move the weights in a round: its change is scaled to at most `bound`."""

    hyperparameters = {"bound": Hparam(1.0, Choice((0.3, 1.0, 3.0)), low=1e-6)}  # noqa: RUF012

    def step(self, server, average):
        change = average[0] - server.weights
        server.weights.add_(change, alpha=min(1.0, self.hparams["bound"] / (float(change.norm()) + 1e-12)))


@models.register("rows_gru")
def rows_gru(spec, dropout_rate):
    return Rows(spec.shape[-1], spec.num_classes, dropout_rate)


def read_keystrokes(data_dir):
    with np.load(pathlib.Path(data_dir) / "keystrokes.npz") as arrays:
        return dict(arrays)


datasets.register("keystrokes", datasets.Spec((8, 4), 3, read_keystrokes, num_owners=6))
