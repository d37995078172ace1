"""The clients that the client half of an algorithm works on."""

import dataclasses
import typing
from collections.abc import Iterator

import torch
from torch import nn

from federated.learning.client_row import ClientRow
from federated.learning.device_data import batch_sizes
from federated.learning.local_model import Frozen, LocalModel, classifier_of
from federated.options import UsageError, shown
from federated.seeds import stream_seed

if typing.TYPE_CHECKING:
    from federated.learning.worker import Worker


class Client:
    """A client whose turn it is to use the model of this process: what `personalize` works on.

    Vectors are float32 and as long as the flat model; the parameters come first, then BatchNorm's statistics.

    number             which client it is
    model              the torch module
    weights, gradient  [size], [num_parameters]: the model's own memory
    parameters         [num_parameters]: the first entries of `weights`
    rounds             the number of rounds it has trained in; always 0 if it keeps nothing
    is_new             whether that is none
    state              [client_vectors, size]: what it keeps between rounds, zeros if it is new
    mask_of            see Flat.mask_of
    """

    def __init__(self, number: int, model: LocalModel, row: ClientRow) -> None:
        self.number, self.row = number, row
        self.model, self.mask_of = model.module, model.flat.mask_of
        self.weights, self.gradient = model.flat.weights, model.flat.gradient
        self.parameters = self.weights[: len(self.gradient)]
        self.rounds, self.is_new, self.state = row.rounds, row.rounds == 0, row.state

    @property
    def classifier(self) -> nn.Linear:
        """The model's last linear layer. Raises UsageError if it has none."""
        return classifier_of(self.model)


class TrainingClient(Client):
    """A client that trains in a round, or to be evaluated: what the other methods of the client half work on.

    broadcast          [broadcasts, size]: what the server sent
    global_weights     [size]: its first vector
    global_parameters  [num_parameters]: the first entries of that
    samples            its number of training samples
    relative_size      their number over the mean of all clients
    steps              local steps made in this round
    """

    def __init__(
        self, worker: "Worker", number: int, round: int, row: ClientRow, moments: torch.Tensor, streams: str = ""
    ) -> None:
        """Training updates `moments` [optimizers, num_moments]. `streams` begins the names of its random streams."""
        super().__init__(number, worker.model, row)
        self._worker = worker
        self.broadcast = worker.broadcast
        self.global_weights = self.broadcast[0]
        self.global_parameters = self.global_weights[: len(self.gradient)]
        self._indices = worker.train_indices[number]
        self.samples = len(self._indices)
        self.relative_size = self.samples / worker.mean_samples
        self.steps = 0
        self._moments = moments
        self._order, self._augmenting = (
            torch.Generator().manual_seed(stream_seed(worker.trial_seed, number, round, f"{streams}{purpose}"))
            for purpose in ("order", "augmentation")
        )
        # Of each recorded batch: logits, labels, loss, number of samples
        self._seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]] = []

    def batches(self, epochs: int | None = None) -> Iterator["Batch"]:
        """Yield batches of the client's samples in a new order each epoch, for `epochs` or else the settings' local epochs."""
        worker = self._worker
        sizes = batch_sizes(self.samples, worker.hparams)
        for _ in range(epochs or worker.settings.local_epochs):
            order = self._indices[torch.randperm(self.samples, generator=self._order)]
            for inputs, labels in worker.data.training_batches(order, sizes, self._augmenting):
                yield Batch(inputs, labels)

    def backward(self, batch: "Batch", is_recorded: bool = True) -> None:
        """Set `gradient` to that of the algorithm's loss of `batch` at `weights`. The metrics leave out a batch that is not
        recorded."""
        worker = self._worker
        logits, loss = worker.backward(batch.inputs, batch.labels, self._loss)
        if is_recorded:
            self._seen.append((logits, batch.labels, loss, len(batch)))

    def _loss(self, inputs: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The algorithm's loss. Raises UsageError if that of one's own algorithm is none."""
        algorithm = self._worker.algorithm
        loss = algorithm.loss(self, inputs, logits, labels)
        if not (isinstance(loss, torch.Tensor) and loss.ndim == 0 and loss.requires_grad):
            what = f"a tensor {list(loss.shape)}" if isinstance(loss, torch.Tensor) else shown(loss)
            raise UsageError(f"{type(algorithm).__name__}: loss() returned {what}, not a scalar that depends on the weights")
        return loss

    def step(self, optimizer: int = 0, only: torch.Tensor | None = None) -> None:
        """Make a step of the local optimizer of that number along `gradient`. If `only` [size] is given, change those entries
        only."""
        moments = self._moments[optimizer]
        if only is None:
            self._worker.optimizer.step(moments)
        else:
            before = self.parameters.clone()
            self._worker.optimizer.step(moments)
            self.parameters.copy_(self.parameters.where(only[: len(before)], before))
        self.steps += 1

    @property
    def label_counts(self) -> torch.Tensor:
        """The number of its training samples of each label, float32 [classes]."""
        return self._worker.label_counts(self.number)

    @property
    def features(self) -> torch.Tensor:
        """The inputs of the classifier in the last forward pass [samples, features]."""
        return self._worker.model.features[self.classifier]

    def frozen(self, weights: torch.Tensor) -> Frozen:
        """Return a function from inputs to the logits and the features of the model with `weights` [size], in evaluation mode
        and without gradient; features are None unless the algorithm uses_features."""
        return self._worker.model.frozen(weights)

    def metrics(self) -> dict[str, float]:
        """Return the mean loss and accuracy over the training samples, each at its own step."""
        logits, labels, losses, samples = zip(*self._seen)
        correct = (torch.cat(logits).argmax(1) == torch.cat(labels)).sum()
        sizes = torch.tensor(samples, dtype=torch.float64, device=correct.device)
        loss = torch.stack(losses).double().dot(sizes) / sizes.sum()
        return {"loss": loss.item(), "accuracy": correct.item() / sizes.sum().item()}


@dataclasses.dataclass
class Batch:
    """inputs float32 [samples, …], labels int64 [samples]."""

    inputs: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)
