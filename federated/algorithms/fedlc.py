"""FedLC (Zhang et al., ICML 2022), the fine-grained calibrated cross-entropy."""

from federated.algorithms.fedavg import Fedavg


class Fedlc(Fedavg):
    """In the loss the logit of each class is lowered by tau n^(-1/4), with n how many samples of it the client has: what is
    rare there needs a larger margin, and what is missing is left alone.

    The paper's denominator leaves out the true class. Here, as in public implementations, the loss is cross-entropy, which
    tau = 0 leaves as it is. A missing class counts as 1e-8 samples, whose margin is 100 tau.
    """

    def train(self, client) -> None:
        self._margins = self.hparams["tau"] * client.label_counts.clamp_min(1e-8) ** -0.25
        super().train(client)

    def loss(self, client, inputs, logits, labels):
        return super().loss(client, inputs, logits - self._margins, labels)
