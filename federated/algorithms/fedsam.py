"""FedSAM (Qu et al., ICML 2022, Algorithm 1)."""

from federated.algorithms.fedavg import Fedavg


class Fedsam(Fedavg):
    """A local step goes along the gradient at the worst point nearby, w + rho g / |g| with g the gradient at w (Foret et al.,
    ICLR 2021). BatchNorm's statistics are those of w."""

    def train(self, client) -> None:
        for batch in client.batches():
            client.backward(batch)
            before = client.weights.clone()
            length = client.gradient.norm().clamp_min(1e-12)
            client.parameters.add_(client.gradient / length, alpha=self.hparams["rho"])
            client.backward(batch, is_recorded=False)
            client.weights.copy_(before)
            client.step()
