"""FedAvg with local fine-tuning (Wang et al., 2019): the baseline that personalised algorithms have to beat."""

from federated.algorithms.fedavg import Fedavg


class Finetune(Fedavg):
    """FedAvg. For each evaluation, all clients train the global model for finetune_epochs on their own data, also clients that
    no round has chosen. These models are then discarded: training continues as if there had been no evaluation."""

    personal = True
    trains_to_personalize = True

    def personalize(self, client) -> None:
        for batch in client.batches(self.hparams["finetune_epochs"]):
            client.backward(batch, is_recorded=False)
            client.step()
