"""FedBABU (Oh et al., ICLR 2022, Algorithm 1)."""

from federated.algorithms.finetune import Finetune


class Fedbabu(Finetune):
    """Clients train the layers below the classifier, which stays as it was drawn, the same for all. To be judged, each trains
    the whole model on its own data. Clients send changes, so that the classifier's is zero to the bit."""

    sends_change = True

    def train(self, client) -> None:
        body = ~client.mask_of([client.classifier])
        for batch in client.batches():
            client.backward(batch)
            client.step(only=body)

    def upload(self, client, updates) -> None:
        updates[0].copy_(client.weights).sub_(client.global_weights)

    def step(self, server, average) -> None:
        server.weights.add_(average[0])
