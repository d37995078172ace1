"""pFedMe (Dinh et al., NeurIPS 2020, Algorithm 1)."""

from federated.algorithms.fedavg import Fedavg


class Pfedme(Fedavg):
    """Each client's own model theta is the proximal point of its loss at its local copy w of the global weights: per batch,
    inner_steps steps along grad f(theta) + lambda (theta - w), then w -= eta lambda (w - theta). The server moves by beta
    towards the average of the w."""

    client_vectors = 1  # theta
    local_optimizers = ("sgd",)
    takes_momentum = False
    personal = True

    def train(self, client) -> None:
        lambda_, rate = self.hparams["lambda"], self.hparams["personal_learning_rate"]
        local = client.weights.clone()  # w; client.weights is theta, at which gradients are taken
        parameters = local[: len(client.gradient)]
        for batch in client.batches():
            for _ in range(self.hparams["inner_steps"]):
                client.backward(batch)
                client.gradient.add_(client.parameters - parameters, alpha=lambda_)
                client.parameters.sub_(client.gradient, alpha=rate)
            parameters.sub_(parameters - client.parameters, alpha=self.hparams["learning_rate"] * lambda_)
        client.state[0].copy_(client.weights)
        client.parameters.copy_(parameters)

    def personalize(self, client) -> None:
        if not client.is_new:
            client.weights.copy_(client.state[0])

    def step(self, server, average) -> None:
        parameters = server.parameters.lerp(average[0][: server.num_parameters], self.hparams["beta"])
        server.weights.copy_(average[0])
        server.parameters.copy_(parameters)
