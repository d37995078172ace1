"""FedAvg with local fine-tuning (Wang et al., 2019): the baseline that personalised algorithms have to beat."""

from federated.algorithms.fedavg import Fedavg


class Finetune(Fedavg):
    """FedAvg. To be judged, each client trains the global model for finetune_epochs on its own data. That model is given up
    afterwards: training goes on as if nothing had been evaluated. All clients train at each evaluation, also those that no
    round has chosen."""

    personal = True
    trains_to_personalize = True

    def personalize(self, client) -> None:
        for batch in client.batches(self.hparams["finetune_epochs"]):
            client.backward(batch, is_recorded=False)
            client.step()
