"""FedLC (Zhang et al., ICML 2022), the fine-grained calibrated cross-entropy."""

from federated.algorithms.fedavg import Fedavg


class Fedlc(Fedavg):
    """The loss lowers the logit of each class by tau n^(-1/4), with n the client's number of samples of the class. A rare class
    gets a larger margin, and training hardly moves the logit of a missing one.

    The paper's denominator leaves out the true class. Here, as in public implementations, the loss is cross-entropy, unchanged
    if tau = 0. A missing class counts as 1e-8 samples, which gives a margin of 100 tau.
    """

    def train(self, client) -> None:
        self._margins = self.hparams["tau"] * client.label_counts.clamp_min(1e-8) ** -0.25
        super().train(client)

    def loss(self, client, inputs, logits, labels):
        return super().loss(client, inputs, logits - self._margins, labels)
