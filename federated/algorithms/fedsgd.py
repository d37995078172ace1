"""FedSGD (McMahan et al., AISTATS 2017, section 2)."""

from federated.algorithms.fedavg import Fedavg


class Fedsgd(Fedavg):
    """One step a round, along the gradient over all data of the participants. Each participant makes the step of its own
    gradient; the average of these steps is the step of the average gradient. --local_epochs has no meaning here."""

    local_optimizers = ("sgd",)
    takes_momentum = False

    def train(self, client) -> None:
        gradient_over_all(client)
        client.step()


def gradient_over_all(client, is_recorded: bool = True) -> None:
    """Set client.gradient to the gradient over all its samples, summed over batches that fit into memory."""
    gradient = client.gradient.new_zeros(len(client.gradient))
    for batch in client.batches(epochs=1):
        client.backward(batch, is_recorded)
        gradient.add_(client.gradient, alpha=len(batch) / client.samples)
    client.gradient.copy_(gradient)
