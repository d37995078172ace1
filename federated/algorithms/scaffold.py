"""SCAFFOLD (Karimireddy et al., ICML 2020, Algorithm 1, option II)."""

from federated.algorithms.fedavg import Fedavg


class Scaffold(Fedavg):
    """Control variates correct the drift of local training: c is the mean of the clients' c_i, and a local step goes along
    g - c_i + c. After K steps of size eta, c_i becomes c_i - c + (x - y_i) / (K eta). All start at zero.

    The weights are averaged by samples as in FedAvg, the control variates as in the paper.
    """

    broadcasts = 2  # x, c
    uploads = 2  # y_i, the change of c_i
    client_vectors = 1  # c_i
    local_optimizers = ("sgd",)
    takes_momentum = False  # c_i takes the steps for gradients
    uses_average_alone = False  # it takes their control variates

    def correct_gradient(self, client) -> None:
        size = len(client.gradient)
        client.gradient.add_(client.broadcast[1][:size]).sub_(client.state[0][:size])

    def upload(self, client, updates) -> None:
        size = len(client.gradient)
        updates[0].copy_(client.weights)
        change = updates[1].zero_()[:size]
        change.add_(client.global_parameters).sub_(client.parameters)
        change.div_(client.steps * self.hparams["learning_rate"]).sub_(client.broadcast[1][:size])
        client.state[0][:size].add_(change)

    def weights(self, server):
        return [*super().weights(server), [1 / server.num_clients] * len(server.samples)]

    def step(self, server, average) -> None:
        parameters = server.parameters.lerp(average[0][: server.num_parameters], self.hparams["server_learning_rate"])
        server.weights.copy_(average[0])
        server.parameters.copy_(parameters)
        server.broadcast[1].add_(average[1])
