"""LG-FedAvg (Liang et al., 2020, Algorithm 1)."""

from federated.algorithms.fedper import Fedper


class Lgfedavg(Fedper):
    """The last global_layers layers are averaged; those below, which make a client's representation of its data, stay with it.
    A layer is a module with parameters of its own, also a normalisation. The paper's clients start from a model that FedAvg has
    trained, these from the common initial weights. A client is evaluated with its own model."""

    def kept(self, client):
        return ~mask_of_last(client, self.hparams["global_layers"])


def mask_of_last(client, count: int):
    """Which entries of the weights belong to the last `count` layers, bool [size]."""
    layers = [module for module in client.model.modules() if any(True for _ in module.parameters(recurse=False))]
    return client.mask_of(layers[-count:])
