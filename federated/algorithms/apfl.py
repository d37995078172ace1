"""APFL (Deng et al., 2020, Algorithm 1), with a mixing weight alpha that is fixed."""

from federated.algorithms.fedavg import Fedavg


class Apfl(Fedavg):
    """Each client's own model is the mixture alpha v + (1 - alpha) w of its vector v and the global weights. Each batch makes a
    step of w along the gradient at w, and a step of v along alpha times the gradient at the mixture."""

    client_vectors = 1  # v
    optimizers = 2  # of w, of v
    personal = True

    def train(self, client) -> None:
        own = (client.global_weights if client.is_new else client.state[0]).clone()
        size = len(client.gradient)
        for batch in client.batches():
            client.backward(batch)
            client.step(optimizer=0)
            local = client.weights.clone()
            self._mix(client, own)
            client.backward(batch, is_recorded=False)
            client.gradient.mul_(self.hparams["alpha"])
            client.parameters.copy_(own[:size])
            client.step(optimizer=1)
            own.copy_(client.weights)
            client.weights.copy_(local)
        client.state[0].copy_(own)

    def personalize(self, client) -> None:
        if not client.is_new:
            self._mix(client, client.state[0])

    def _mix(self, client, own) -> None:
        """Make client.weights the mixture, with BatchNorm's statistics of its own."""
        size = len(client.gradient)
        client.parameters.lerp_(own[:size], self.hparams["alpha"])
        client.weights[size:].copy_(own[size:])
