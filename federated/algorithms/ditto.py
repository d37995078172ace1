"""Ditto (Li et al., ICML 2021, Algorithm 1)."""

from federated.algorithms.fedavg import Fedavg


class Ditto(Fedavg):
    """Each client takes part in FedAvg and also trains a model of its own, v. The term lambda/2 |v - w_global|^2 holds it near
    the global weights at the start of the round."""

    client_vectors = 1  # v
    optimizers = 2  # of the global model, of its own
    personal = True

    def train(self, client) -> None:
        super().train(client)
        reached = client.weights.clone()
        client.weights.copy_(client.global_weights if client.is_new else client.state[0])
        for batch in client.batches():
            client.backward(batch, is_recorded=False)
            client.gradient.add_(client.parameters - client.global_parameters, alpha=self.hparams["lambda"])
            client.step(optimizer=1)
        client.state[0].copy_(client.weights)
        client.weights.copy_(reached)

    def personalize(self, client) -> None:
        if not client.is_new:
            client.weights.copy_(client.state[0])
