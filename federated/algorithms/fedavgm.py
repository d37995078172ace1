"""FedAvgM (Hsu et al., 2019, section 4.2)."""

from federated.algorithms.fedavg import Fedavg


class Fedavgm(Fedavg):
    """The server's step has momentum: v = beta v + delta, w = w + eta v, with delta the clients' mean change."""

    server_vectors = 1

    def step(self, server, average) -> None:
        delta = average[0][: server.num_parameters] - server.parameters
        velocity = server.state[0][: server.num_parameters]
        velocity.mul_(self.hparams["server_momentum"]).add_(delta)
        parameters = server.parameters.add(velocity, alpha=self.hparams["server_learning_rate"])
        server.weights.copy_(average[0])  # BatchNorm's statistics have no momentum
        server.parameters.copy_(parameters)
