"""FedCM (Xu et al., 2021, Algorithm 1)."""

from federated.algorithms.fedavg import Fedavg


class Fedcm(Fedavg):
    """A local step goes along alpha g + (1 - alpha) D, with D the mean of what the last round's steps went along, zeros at
    first. The server moves to the clients' average: its learning rate, for D, is that of the clients' mean number of steps."""

    broadcasts = 2  # x, D
    local_optimizers = ("sgd",)
    takes_momentum = False  # D takes the steps for gradients
    uses_average_alone = False  # it takes their numbers of steps

    def correct_gradient(self, client) -> None:
        alpha = self.hparams["alpha"]
        client.gradient.mul_(alpha).add_(client.broadcast[1][: len(client.gradient)], alpha=1 - alpha)

    def step(self, server, average) -> None:
        steps = (server.samples / server.samples.sum() * server.steps).sum()
        direction = server.broadcast[1][: server.num_parameters]
        direction.copy_(server.parameters).sub_(average[0][: server.num_parameters])
        direction.div_(steps * self.hparams["learning_rate"])
        server.weights.copy_(average[0])
