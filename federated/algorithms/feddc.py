"""FedDC (Gao et al., CVPR 2022, Algorithm 1)."""

from federated.algorithms.fedavg import Fedavg


class Feddc(Fedavg):
    """A client keeps how far its weights have drifted from the global ones, h_i, summed over its rounds. It minimises
    f_i(w) + alpha_i/2 |w + h_i - w_global|^2 + <c/s_i - c_i, w>, and the server sends the participants' mean of w + the mean of
    all h_i. The last term is SCAFFOLD's: c_i becomes c_i - c/s_i + (w_global - w) / (K eta) after K steps of size eta.

    As in the official code s_i is the client's number of samples over the mean of all clients, alpha_i = alpha / s_i, c is
    the mean of all s_i c_i, and other means are not weighted. K counts the client's own steps, there those of a mean client.
    Its alpha is 0.1 for MNIST and 0.01 for CIFAR-10, with five local epochs: only alpha damps the drifts, so that with few
    steps a round the small one lets them swing until training breaks down.
    """

    broadcasts = 2  # w_global, c
    uploads = 2  # w, the change of s_i c_i
    client_vectors = 2  # h_i, c_i
    server_vectors = 1  # the mean of all h_i
    local_optimizers = ("sgd",)
    takes_momentum = False  # c_i takes the steps for gradients
    uses_average_alone = False  # it takes their control variates

    def correct_gradient(self, client) -> None:
        drift, variate = client.state[:, : len(client.gradient)]
        drifted = client.parameters + drift - client.global_parameters
        client.gradient.add_(drifted, alpha=self.hparams["alpha"] / client.relative_size)
        client.gradient.add_(client.broadcast[1][: len(drift)], alpha=1 / client.relative_size).sub_(variate)

    def upload(self, client, updates) -> None:
        drift, variate = client.state[:, : len(client.gradient)]
        change = client.parameters - client.global_parameters
        drift.add_(change)
        updates[0].copy_(client.weights)
        new = updates[1].zero_()[: len(change)]
        new.sub_(change).div_(client.steps * self.hparams["learning_rate"])
        new.sub_(client.broadcast[1][: len(change)], alpha=1 / client.relative_size)
        variate.add_(new)
        new.mul_(client.relative_size)

    def weights(self, server):
        count = len(server.samples)
        return [[1 / count] * count, [1 / server.num_clients] * count]

    def step(self, server, average) -> None:
        drift = server.state[0][: server.num_parameters]
        change = average[0][: server.num_parameters] - server.parameters
        drift.add_(change, alpha=len(server.samples) / server.num_clients)
        server.weights.copy_(average[0])
        server.parameters.add_(drift)
        server.broadcast[1].add_(average[1])
