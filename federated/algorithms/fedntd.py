"""FedNTD (Lee et al., NeurIPS 2022, section 4)."""

from federated.algorithms.fedavg import Fedavg


class Fedntd(Fedavg):
    """The loss has beta times the divergence KL(global || local) of the probabilities of all classes but the true one, at
    temperature tau. It keeps a client from forgetting the global model's knowledge of classes that the client lacks. The global
    model is in evaluation mode."""

    def train(self, client) -> None:
        self._global = client.frozen(client.global_weights)
        super().train(client)

    def loss(self, client, inputs, logits, labels):
        import torch
        from torch.nn import functional

        others = torch.arange(logits.shape[1] - 1, device=logits.device)
        others = others + (others >= labels[:, None])  # [samples, classes - 1]: each sample's not-true classes
        local, world = (each.gather(1, others) / self.hparams["tau"] for each in (logits, self._global(inputs)[0]))
        divergence = functional.kl_div(local.log_softmax(1), world.softmax(1), reduction="batchmean")
        return super().loss(client, inputs, logits, labels) + self.hparams["beta"] * divergence
