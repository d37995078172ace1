"""FedALA (Zhang et al., AAAI 2023, Algorithm 1)."""

from federated.algorithms.fedavg import Fedavg
from federated.algorithms.lgfedavg import mask_of_last

START_EPOCHS = 11  # the official code's minimum until the loss settles, and mostly all of them


class Fedala(Fedavg):
    """A client starts from theta + (w_global - theta) * W, entry by entry, with theta the weights that its last training
    reached. W is learned in the last weight_layers layers: W = clip(W - eta g * (w_global - theta), 0, 1) for each batch of
    weight_share of the samples, with theta and w_global fixed. In all other layers W is 1, which gives the global weights.

    W is learned for one pass a round, but for START_EPOCHS passes when the client first has a theta; the paper continues until
    it converges. As in the official code, a client is evaluated with the model that it would train next.
    """

    client_vectors = 2  # theta, W
    personal = True
    trains_to_personalize = True

    def train(self, client) -> None:
        client.state[1].copy_(client.state[1].new_ones(()) if client.is_new else self._aggregate(client))
        super().train(client)

    def upload(self, client, updates) -> None:
        super().upload(client, updates)
        client.state[0].copy_(client.weights)

    def personalize(self, client) -> None:
        if not client.is_new:
            self._aggregate(client)

    def _aggregate(self, client):
        """Set client.weights to the client's start, with its own BatchNorm statistics. Returns W [size]."""
        size = len(client.gradient)
        own, mixing = client.state[0].clone(), client.state[1].clone()
        learned, theta = mixing[:size], own[:size]
        rates = self.hparams["weight_learning_rate"] * mask_of_last(client, self.hparams["weight_layers"])[:size]
        gap = client.global_parameters - theta
        for _ in range(START_EPOCHS if client.rounds == 1 else 1):
            seen = 0
            for batch in client.batches(epochs=1):
                if seen >= self.hparams["weight_share"] * client.samples:
                    break
                seen += len(batch)
                client.parameters.copy_(theta.lerp(client.global_parameters, learned))
                client.backward(batch, is_recorded=False)
                learned.sub_(rates * client.gradient * gap).clamp_(0, 1)
        client.weights.copy_(own)
        client.parameters.copy_(theta.lerp(client.global_parameters, learned))
        return mixing
