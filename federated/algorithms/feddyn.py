"""FedDyn (Acar et al., ICLR 2021, Algorithm 1)."""

from federated.algorithms.fedavg import Fedavg


class Feddyn(Fedavg):
    """A linear and a quadratic term make the minima of the clients' losses agree with the global one: a client minimises
    f_i(w) - <h_i, w> + alpha_i/2 |w - w_global|^2, then h_i -= alpha_i (w - w_global); the server's h -= alpha mean of all
    clients' changes, and w_global = mean of the participants' w - h / alpha.

    As in the official code alpha_i is alpha over the client's share of the samples times the number of clients, so that
    the optimum is that of the loss over all samples; means are not weighted.
    """

    client_vectors = 1  # h_i
    server_vectors = 1  # h
    local_optimizers = ("sgd",)
    uses_average_alone = False  # it takes how many there are

    def correct_gradient(self, client) -> None:
        client.gradient.sub_(client.state[0][: len(client.gradient)])
        client.gradient.add_(client.parameters - client.global_parameters, alpha=self.hparams["alpha"] / client.relative_size)

    def upload(self, client, updates) -> None:
        updates[0].copy_(client.weights)
        change = client.parameters - client.global_parameters
        client.state[0][: len(change)].sub_(change, alpha=self.hparams["alpha"] / client.relative_size)

    def weights(self, server):
        return [[1 / len(server.samples)] * len(server.samples)]

    def step(self, server, average) -> None:
        alpha = self.hparams["alpha"]
        h = server.state[0][: server.num_parameters]
        change = average[0][: server.num_parameters] - server.parameters
        h.sub_(change, alpha=alpha * len(server.samples) / server.num_clients)
        server.weights.copy_(average[0])
        server.parameters.sub_(h, alpha=1 / alpha)
