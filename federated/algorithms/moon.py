"""MOON (Li et al., CVPR 2021, equations 2 and 3)."""

from federated.algorithms.fedavg import Fedavg


class Moon(Fedavg):
    """A contrastive term draws a batch's features towards those of the global model and away from those of the client's
    previous one. A client that never trained has the global model as its previous one, so that the term is constant.

    Features are the inputs of the classifier; there is no projection head.
    """

    client_vectors = 1  # the weights that its last training reached
    uses_features = True

    def train(self, client) -> None:
        self._global = client.frozen(client.global_weights)
        self._previous = client.frozen(client.global_weights if client.is_new else client.state[0])
        super().train(client)

    def loss(self, client, inputs, logits, labels):
        import torch
        from torch.nn import functional

        features = client.features
        similarities = [functional.cosine_similarity(features, other(inputs)[1]) for other in (self._global, self._previous)]
        contrast = torch.stack(similarities, dim=1) / self.hparams["temperature"]
        towards_global = functional.cross_entropy(contrast, torch.zeros_like(labels))
        return super().loss(client, inputs, logits, labels) + self.hparams["mu"] * towards_global

    def upload(self, client, updates) -> None:
        super().upload(client, updates)
        client.state[0].copy_(client.weights)
