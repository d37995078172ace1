"""Local training without communication: the baseline that a personalised algorithm has to beat."""

from federated.algorithms.fedper import Fedper


class Local(Fedper):
    """Each client keeps all of its model."""

    def kept(self, client):
        return client.mask_of([client.model])
