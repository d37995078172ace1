"""FedAdam (Reddi et al., ICLR 2021, Algorithm 2)."""

from federated.algorithms.fedadagrad import Fedadagrad


class Fedadam(Fedadagrad):
    """v = beta2 v + (1 - beta2) delta^2."""

    def second_moment(self, v, square) -> None:
        v.lerp_(square, 1 - self.hparams["beta2"])
