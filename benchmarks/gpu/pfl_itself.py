"""pfl-research's simulation of the workload of comparison.py, as its own benchmark of CIFAR-10 sets it up. Prints the seconds
without import and set-up: python pfl_itself.py CLIENTS CHOSEN ROUNDS TEST_SAMPLES"""

import sys
import time

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.central_evaluation import CentralEvaluationCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.internal.ops.pytorch_ops import get_default_device
from pfl.metrics import Weighted
from pfl.model.pytorch import PyTorchModel
from torch import nn

from federated import models
from federated.data import datasets

SAMPLES, BATCH, EVERY, RATE, EVALUATION_BATCH = 50, 10, 10, 0.1, 512


class Model(nn.Module):
    """The interface that pfl asks of a model: a loss for training, and sums for evaluation."""

    def __init__(self):
        super().__init__()
        self.layers = models.build("cnn_femnist", datasets.REGISTRY["cifar10"], 0.5, 0)

    def forward(self, images):
        return self.layers(images)

    def loss(self, images, labels, is_eval=False):
        self.eval() if is_eval else self.train()
        return nn.functional.cross_entropy(self(images), labels)

    @torch.no_grad()
    def metrics(self, images, labels, is_eval=True):
        self.eval() if is_eval else self.train()
        logits = self(images)
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        correct = (logits.argmax(1) == labels).sum().item()
        return {"loss": Weighted(loss, len(labels)), "accuracy": Weighted(correct, len(labels))}


def main(clients, chosen, rounds, test):
    device = get_default_device()
    generator = torch.Generator().manual_seed(0)

    def samples(count):  # on the device from the start, the best case for pfl
        images = torch.randn(count, 3, 32, 32, generator=generator).to(device)
        return [images, torch.randint(0, 10, (count,), generator=generator).to(device)]

    users = {number: samples(SAMPLES) for number in range(clients)}
    sampler = get_user_sampler("random", list(users))
    federated = FederatedDataset(lambda number: Dataset(users[number], train_kwargs={}), sampler)
    central = Dataset(samples(test), eval_kwargs={"is_eval": True})
    module = Model().to(device)
    model = PyTorchModel(module, torch.optim.SGD, torch.optim.SGD(module.parameters(), 1.0))
    backend = SimulatedBackend(training_data=federated, val_data=federated, postprocessors=[WeightByDatapoints()])

    def run(count):
        parameters = NNAlgorithmParams(count, EVERY, chosen, val_cohort_size=0)
        start = time.perf_counter()
        FederatedAveraging().run(
            algorithm_params=parameters,
            backend=backend,
            model=model,
            model_train_params=NNTrainHyperParams(local_batch_size=BATCH, local_num_epochs=1, local_learning_rate=RATE),
            model_eval_params=NNEvalHyperParams(local_batch_size=EVALUATION_BATCH),
            callbacks=[CentralEvaluationCallback(central, NNEvalHyperParams(local_batch_size=EVALUATION_BATCH), EVERY)],
            send_metrics_to_platform=False,
        )
        return time.perf_counter() - start

    np.random.seed(0)
    run(2)
    print(run(rounds))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
