"""FedPer (Arivazhagan et al., 2019), and what every algorithm shares whose clients keep a part of the model."""

from federated.algorithms.fedavg import Fedavg


class Fedper(Fedavg):
    """The classifier stays with the client; the layers below are averaged. What is kept starts from the common initial
    weights and never leaves: the client sends that part of the global weights back as it came."""

    client_vectors = 1  # its weights, of which only the kept part is used
    personal = True
    has_global_model = False
    uses_average_alone = False  # a part of the model stays with them

    def kept(self, client):
        """Which entries of the weights are the client's own, bool [size]."""
        return client.mask_of([client.classifier])

    def personalize(self, client) -> None:
        if not client.is_new:
            client.weights.copy_(client.state[0].where(self.kept(client), client.weights))

    def train(self, client) -> None:
        self.personalize(client)
        super().train(client)

    def upload(self, client, updates) -> None:
        client.state[0].copy_(client.weights)
        updates[0].copy_(client.global_weights.where(self.kept(client), client.weights))
