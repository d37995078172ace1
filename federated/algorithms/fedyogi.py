"""FedYogi (Reddi et al., ICLR 2021, Algorithm 2)."""

from federated.algorithms.fedadagrad import Fedadagrad


class Fedyogi(Fedadagrad):
    """v = v - (1 - beta2) delta^2 sign(v - delta^2)."""

    def second_moment(self, v, square) -> None:
        v.sub_(square * (v - square).sign(), alpha=1 - self.hparams["beta2"])
