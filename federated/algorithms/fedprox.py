"""FedProx (Li et al., MLSys 2020, Algorithm 2)."""

from federated.algorithms.fedavg import Fedavg


class Fedprox(Fedavg):
    """A proximal term mu/2 |w - w_global|^2 holds local weights near the global ones."""

    def correct_gradient(self, client) -> None:
        client.gradient.add_(client.parameters - client.global_parameters, alpha=self.hparams["mu"])
