"""FedExP (Jhunjhunwala et al., ICLR 2023, Algorithm 1)."""

from federated.algorithms.fedavg import Fedavg


class Fedexp(Fedavg):
    """The server goes further than the clients' mean change delta, the more so the less their changes delta_i agree: its step
    is max(1, mean |delta_i|^2 / (2 (|delta|^2 + epsilon))).

    As in the official code means are weighted by samples, which the paper takes for equal. The paper judges the mean of the
    last two global models, here the last one is judged as everywhere.
    """

    uses_average_alone = False  # it takes the norms of their changes

    def receive(self, server, place, upload) -> None:
        if place == 0:
            self._squares = []
        change = upload[0][: server.num_parameters] - server.parameters
        self._squares.append(change.square().sum().item())

    def step(self, server, average) -> None:
        shares = server.samples / server.samples.sum()
        mean = average[0][: server.num_parameters]
        square = (mean - server.parameters).square().sum().item()
        rate = max(1.0, (shares * self._squares).sum() / (2 * (square + self.hparams["epsilon"])))
        parameters = server.parameters.lerp(mean, rate)
        server.weights.copy_(average[0])
        server.parameters.copy_(parameters)
