"""FedNova (Wang et al., NeurIPS 2020, equations 5 to 8)."""

from federated.algorithms.fedavg import Fedavg


def effective_steps(steps, momentum: float):
    """The sum of what each of `steps` gradients counts in SGD's change of the weights, |a|_1: with momentum, which starts at
    zero, a gradient counts in all later steps too (section 4 and the official code)."""
    return (steps - momentum * (1 - momentum**steps) / (1 - momentum)) / (1 - momentum)


class Fednova(Fedavg):
    """Clients' changes are divided by how many steps they made, so that who makes more has no more say; their mean is
    multiplied by the mean number of steps. Plain FedAvg if all make the same number."""

    local_optimizers = ("sgd",)
    keeps_moments = False  # the count of momentum starts with each round
    uses_average_alone = False  # it takes their numbers of steps

    def upload(self, client, updates) -> None:
        updates[0].copy_(client.weights)
        steps = effective_steps(client.steps, self.hparams["momentum"])
        change = client.parameters - client.global_parameters
        updates[0][: len(change)].copy_(client.global_parameters).add_(change, alpha=1 / steps)

    def step(self, server, average) -> None:
        shares = server.samples / server.samples.sum()
        steps = (shares * effective_steps(server.steps, self.hparams["momentum"])).sum()
        direction = average[0][: server.num_parameters] - server.parameters
        parameters = server.parameters.add(direction, alpha=steps)
        server.weights.copy_(average[0])
        server.parameters.copy_(parameters)
