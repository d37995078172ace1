"""A worker trains and evaluates the clients that a process hosts."""

import functools

import numpy as np
import torch

from federated import algorithms, models
from federated.data.datasets import Dataset
from federated.data.partition import ClientSplit, test_set
from federated.learning import compression
from federated.learning.captured import CapturedSteps, CudaGraphs, is_capturable, sizes_to_capture
from federated.learning.client import Client, TrainingClient
from federated.learning.client_row import ClientRow, RowLayout
from federated.learning.device import resolve_device
from federated.learning.device_data import DeviceData, batch_sizes
from federated.learning.evaluation import BLOCK, EvaluationPlan
from federated.learning.evaluator import evaluate_blocks
from federated.learning.local_model import Backward, LocalModel
from federated.learning.memory import SharedMatrices
from federated.learning.optimizer import LocalOptimizer
from federated.seeds import stream_seed
from federated.settings import Settings


class Worker:
    """Does the work of one client process: the server's broadcast goes in, updates and evaluations come out, all through the
    trial's memory.

    algorithm, model, optimizer, data  what all clients share
    train_indices                      the training samples of each client
    plan                               which samples are evaluated by which model
    backward                           the model's `backward`, or what replays it
    broadcast                          [broadcasts, size]: what the server sent, on the device
    """

    def __init__(
        self,
        settings: Settings,
        hparams: dict,
        trial_seed: int,
        dataset: Dataset,
        splits: list[ClientSplit],
        memory: SharedMatrices,
    ) -> None:
        self.device = resolve_device(settings)
        self.settings, self.hparams, self.trial_seed = settings, hparams, trial_seed
        self.algorithm = algorithms.load(settings.algorithm)(hparams)
        self.data = DeviceData(dataset, settings, self.device)

        def build():
            return models.build(settings.model_arch, dataset.spec, hparams["dropout_rate"], 0).to(self.device)

        self.model = LocalModel(build, self.device, settings.precision, self.algorithm.uses_features)
        self.optimizer = LocalOptimizer(settings, hparams, self.model.flat)
        self._scratch_moments = torch.zeros(self.algorithm.optimizers, self.optimizer.num_moments, device=self.device)
        self._memory = memory
        self._layout = RowLayout.of(settings, hparams, self.model.flat)
        self._samples = [each.train for each in splits]
        if self.algorithm.pooled:
            self._samples = [np.concatenate(self._samples)]
        self._labels, self._num_classes = dataset.train_labels, dataset.spec.num_classes
        self.train_indices = list(map(torch.from_numpy, self._samples))
        self.mean_samples = sum(map(len, self.train_indices)) / len(self.train_indices)
        self.plan = EvaluationPlan(splits, test_set(dataset, settings, splits), self.algorithm.personal)
        self.backward: Backward = self.model.backward
        if self.device.type == "cuda" and is_capturable(self.algorithm):
            self.backward = CapturedSteps(self.model, self.frequent_sizes(), CudaGraphs(self.device))

    def frequent_sizes(self) -> set[int]:
        """Return the batch sizes that are captured if any are."""
        return sizes_to_capture(size for each in self.train_indices for size in batch_sizes(len(each), self.hparams))

    @property
    def progress(self) -> int:
        """A number that grows as long as the work advances."""
        return self.model.passes

    def receive(self) -> None:
        """Load the server's broadcast. Call this before any work on it."""
        self.broadcast = torch.from_numpy(self._memory.broadcast).to(self.device)

    def train(self, number: int, round: int, batches: int | None = None) -> TrainingClient:
        """Train client `number` from the broadcast weights, for the settings' local epochs but on no more than so many
        `batches`. The caller passes the client to `upload` before the next one."""
        client = self._training_client(number, round)
        client.max_batches = batches
        self.algorithm.train(client)
        return client

    def _training_client(self, number: int, round: int, is_evaluated: bool = False) -> TrainingClient:
        """Return a client that is ready to train from the broadcast weights. One that trains only to be evaluated has random
        streams of its own and moments that start at zero, so that it leaves no trace."""
        streams = "evaluation " if is_evaluated else ""
        torch.manual_seed(stream_seed(self.trial_seed, number, round, f"{streams}dropout"))
        self.model.release_copies()
        row = self.row_of(number)
        keeps_moments = self._layout.num_moments and not is_evaluated
        moments = row.moments if keeps_moments else self._scratch_moments.zero_()
        client = TrainingClient(self, number, round, row, moments, streams)
        client.weights.copy_(client.global_weights)
        self.model.module.train()
        return client

    def upload(self, client: TrainingClient, updates: torch.Tensor) -> None:
        """Fill `updates` [uploads, size], which is on the CPU, with what arrives of what the algorithm sends of
        `client`, and store its row."""
        is_here = updates.device == self.device
        filled = updates if is_here else torch.empty(updates.shape, device=self.device)
        self.algorithm.upload(client, filled)
        if not is_here:
            updates.copy_(filled)
        if compression.is_lossy(self.settings):
            self._compress(client, updates[0][: len(client.gradient)])
        client.row.store()

    def _compress(self, client: TrainingClient, sent: torch.Tensor) -> None:
        """Compress the update in `sent` [num_parameters], which is on the CPU."""
        generator = torch.Generator().manual_seed(stream_seed(self.trial_seed, client.number, client.round, "compression"))
        start = torch.from_numpy(self._memory.broadcast[0][: len(sent)])
        if not self.algorithm.sends_change:
            sent.sub_(start)
        compression.compress(sent, client.row.memory, self.settings, generator)
        if not self.algorithm.sends_change:
            sent.add_(start)

    def evaluate(self, numbers: list[int], round: int) -> None:
        """Evaluate the blocks of these `numbers` of the plan after `round` rounds, each into its row of the memory's
        evaluation."""
        blocks = [self.plan.blocks[number] for number in numbers]
        results = evaluate_blocks(blocks, self.model, self.data, functools.partial(self._load_weights, round))
        for number, result in zip(numbers, results):  # only now, as this waits for a GPU
            torch.from_numpy(self._memory.evaluation[number]).view(2, BLOCK)[:, : result.shape[1]].copy_(result)

    def _load_weights(self, round: int, number: int | None) -> None:
        """Give the model the weights of client `number`'s own model after `round` rounds, the global ones for None."""
        self.model.flat.weights.copy_(self.broadcast[0])
        if number is None:
            return
        if self.algorithm.trains_to_personalize:
            self.algorithm.personalize(self._training_client(number, round, is_evaluated=True))
        else:
            self.algorithm.personalize(Client(number, self.model, self.row_of(number)))

    def label_counts(self, number: int) -> torch.Tensor:
        """Return client `number`'s number of training samples of each label, float32 [classes]."""
        counts = np.bincount(self._labels[self._samples[number]], minlength=self._num_classes)
        return torch.from_numpy(counts.astype(np.float32)).to(self.device)

    def row_of(self, number: int) -> ClientRow:
        """Return the row of client `number`."""
        return ClientRow(self._memory.clients[number], self._layout, self.device)
