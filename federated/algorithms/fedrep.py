"""FedRep (Collins et al., ICML 2021, Algorithm 1)."""

from federated.algorithms.fedper import Fedper


class Fedrep(Fedper):
    """As FedPer, but the client first trains its classifier for head_epochs, with the layers below fixed. It then trains these
    layers for --local_epochs, with the classifier fixed."""

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
