"""FedDecorr (Shi et al., ICLR 2023, section 4)."""

from federated.algorithms.fedavg import Fedavg


class Feddecorr(Fedavg):
    """The loss adds beta times a penalty on the correlations of the features, which go into the classifier, over the samples
    of a batch. It keeps features from collapsing into a few dimensions.

    The penalty is that of the official code, for which the published beta was chosen: with Z [n, d] the features normalised
    to mean 0 and deviation 1, the mean square of Z'Z off its diagonal, over n. That is about n times the paper's
    |K|^2 / d^2, with K = Z'Z / n, whose diagonal has no gradient.
    """

    uses_features = True

    def loss(self, client, inputs, logits, labels):
        plain, features = super().loss(client, inputs, logits, labels), client.features.float()
        samples, size = features.shape
        if samples == 1:
            return plain
        products = (features - features.mean(0)) / (features.var(0) + 1e-8).sqrt()
        products = products.T @ products
        off_diagonal = products.square().sum() - products.diagonal().square().sum()
        return plain + self.hparams["beta"] * off_diagonal / (size * max(1, size - 1) * samples)
