"""Training with all data in one place: the ceiling that a federated algorithm is measured against."""

from federated.algorithms.fedavg import Fedavg


class Centralized(Fedavg):
    """A single client trains on the samples of all. A round is local_epochs passes over them."""

    pooled = True
    uses_average_alone = False  # there are no clients
