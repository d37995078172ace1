"""Per-FedAvg (Fallah et al., NeurIPS 2020, Algorithm 1), the first-order variant."""

from federated.algorithms.fedavg import Fedavg
from federated.algorithms.fedsgd import gradient_over_all


class Perfedavg(Fedavg):
    """The global model is trained to be good after one step of size alpha along a client's gradient. A local step goes along
    the next batch's gradient at w - alpha g, with g one batch's gradient at w. A last batch without a next one serves for
    both. A client is evaluated after a step of size alpha along the gradient over all its samples."""

    local_optimizers = ("sgd",)
    personal = True
    trains_to_personalize = True

    def train(self, client) -> None:
        batches = client.batches()
        for batch in batches:
            client.backward(batch)
            before = client.weights.clone()
            client.parameters.sub_(client.gradient, alpha=self.hparams["alpha"])
            client.backward(next(batches, batch), is_recorded=False)
            client.weights.copy_(before)
            client.step()

    def personalize(self, client) -> None:
        gradient_over_all(client, is_recorded=False)
        client.parameters.sub_(client.gradient, alpha=self.hparams["alpha"])
