"""FedRep (Collins et al., ICML 2021, Algorithm 1)."""

from federated.algorithms.fedper import Fedper


class Fedrep(Fedper):
    """As FedPer, but the client trains its classifier first, with the layers below fixed, and then these, with the
    classifier fixed: head_epochs, then --local_epochs."""

    optimizers = 2  # of the classifier, of the layers below

    def train(self, client) -> None:
        self.personalize(client)
        head = self.kept(client)
        for batch in client.batches(self.hparams["head_epochs"]):
            client.backward(batch)
            client.step(only=head, optimizer=0)
        for batch in client.batches():
            client.backward(batch)
            client.step(only=~head, optimizer=1)
