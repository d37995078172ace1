"""FedBN (Li et al., ICLR 2021, Algorithm 1)."""

from federated.algorithms.fedper import Fedper


class Fedbn(Fedper):
    """BatchNorm's parameters and statistics stay with the client. Plain FedAvg on a model without BatchNorm."""

    def kept(self, client):
        from torch.nn.modules.batchnorm import _BatchNorm

        return client.mask_of([module for module in client.model.modules() if isinstance(module, _BatchNorm)])
