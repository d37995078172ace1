"""FedAdagrad (Reddi et al., ICLR 2021, Algorithm 2), and what FedAdam and FedYogi share with it."""

from federated.algorithms.fedavg import Fedavg


class Fedadagrad(Fedavg):
    """The server's step is adaptive: m = beta1 m + (1 - beta1) delta, w = w + eta m / (sqrt(v) + tau), with delta the
    clients' mean change and v = v + delta^2. As in the paper there is no bias correction, and v starts at tau^2. Its
    Adagrad has beta1 = 0."""

    server_vectors = 2  # m, v

    def start(self, server) -> None:
        server.state[1].fill_(self.hparams["tau"] ** 2)

    def step(self, server, average) -> None:
        beta1, tau = self.hparams.get("beta1", 0.0), self.hparams["tau"]
        delta = average[0][: server.num_parameters] - server.parameters
        m, v = server.state[:, : server.num_parameters]
        m.mul_(beta1).add_(delta, alpha=1 - beta1)
        self.second_moment(v, delta.square())
        parameters = server.parameters.addcdiv(m, v.sqrt().add_(tau), value=self.hparams["server_learning_rate"])
        server.weights.copy_(average[0])  # BatchNorm's statistics are only averaged
        server.parameters.copy_(parameters)

    def second_moment(self, v, square) -> None:
        """Update v [num_parameters] in place by delta^2 (line 10 of Algorithm 2)."""
        v.add_(square)
