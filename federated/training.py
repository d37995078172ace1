"""Local training and evaluation: model, data and hyper-parameters in, weights and metrics out."""

import contextlib
import ctypes
import dataclasses
import os

import torch
from torch import nn
from torch.nn import functional
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from federated import algorithms, augmentation, models
from federated.channel import Memory
from federated.datasets import Dataset
from federated.evaluation import BLOCK, Plan
from federated.flat import Flat
from federated.options import UsageError
from federated.partition import Part
from federated.seeds import stream_seed
from federated.settings import Settings

# Samples of a batch where the algorithm has no batch size
FULL_BATCH = 1024
# An epoch's samples are gathered and normalised this many bytes (as float32) at a time.
GATHER_BYTES = 1 << 26


def keep_freed_memory():
    """Have glibc's malloc keep what is freed for the next layer, where it would give large blocks back to the system and
    fault them in anew: the McMahan CNN evaluates in two thirds of the time, at the same peak. Elsewhere it does nothing."""
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def resolve_device(settings: Settings) -> torch.device:
    """The device of `settings`, ready for reproducible work. Raises UsageError where this machine lacks what they ask for."""
    name = settings.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    elif name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no CUDA device here")
    if settings.precision == "bf16":
        if name == "cuda":
            supported = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            supported = torch.cpu._is_avx512_bf16_supported()
        if not supported:
            raise UsageError(f"--precision bf16: this {name} has no bf16 arithmetic; use fp32")
    torch.set_num_threads(settings.threads)
    if name == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs for the same bits each time
        torch.set_deterministic_debug_mode("warn")  # the log tells of an operation that has no such algorithm
        torch.utils.deterministic.fill_uninitialized_memory = False
    return torch.device(name)


class LocalOptimizer:
    """Adam (Kingma and Ba, ICLR 2015) or SGD over the flat weights, with the moments in a row of memory.

    Rows are the clients' own, so that any process can go on with any client. torch's functional optimizers are used:
    they take the moments as arguments, and importing the classes costs 0.8 s.
    """

    def __init__(self, settings: Settings, hparams: dict, flat: Flat):
        self._weights, self._gradient = flat.weights[: flat.num_parameters], flat.gradient
        self.row_size = self.row_size_of(settings, hparams, flat.num_parameters)
        # step(row) goes on from the moments in `row` [row_size], zeros at first, and keeps them there
        if settings.local_optimizer == "adam":
            self._arguments = {
                "lr": hparams["learning_rate"],
                "beta1": 0.9,
                "beta2": 0.999,
                "eps": 1e-8,
                "weight_decay": 0.0,
                "amsgrad": False,
            }
            self.step = self._adam
        else:
            self._arguments = {
                "lr": hparams["learning_rate"],
                "momentum": hparams.get("momentum", 0.0),
                "weight_decay": hparams["weight_decay"],
                "dampening": 0.0,
                "nesterov": False,
            }
            self.step = self._sgd

    @staticmethod
    def row_size_of(settings: Settings, hparams: dict, num_parameters: int) -> int:
        """How many float32 numbers a client's moments are."""
        if settings.local_optimizer == "adam":
            return 2 * num_parameters + 1  # two moments, and the count of steps
        return num_parameters if hparams.get("momentum") else 0

    def _adam(self, row):
        size = len(self._gradient)
        first, second, steps = row[:size], row[size:-1], row[-1]
        adam([self._weights], [self._gradient], [first], [second], [], [steps], fused=True, maximize=False, **self._arguments)

    def _sgd(self, row):
        momentum = row if self.row_size else None
        sgd([self._weights], [self._gradient], [momentum], fused=True, maximize=False, **self._arguments)


class Client:
    """One client's turn in a process: what the client half of an algorithm works on.

    Vectors are float32 and as long as the flat model; the parameters come first, then BatchNorm's statistics.

    number                     which client it is
    weights, gradient          [size], [num_parameters]: the model's own memory
    broadcast, global_weights  [broadcasts, size], [size]: what the server sent; the first vector
    state                      [client_vectors, size]: what it keeps between rounds, zeros while `is_new`
    samples, relative_size     training samples; those over the mean of all clients
    steps                      local steps made in this turn
    """

    def __init__(self, worker: "Worker", number: int, round: int):
        self._worker, self.number = worker, number
        self.model = worker.model
        self.mask_of = worker.flat.mask_of
        self.weights, self.gradient = worker.flat.weights, worker.flat.gradient
        self.parameters = self.weights[: len(self.gradient)]
        self.broadcast = worker.broadcast
        self.global_weights = self.broadcast[0]
        self.global_parameters = self.global_weights[: len(self.gradient)]
        self.is_new, self.state, self._moments = worker.kept_by(number)
        self._indices = worker.train_indices[number]
        self.samples = len(self._indices)
        self.relative_size = self.samples / worker.mean_samples
        self.steps = 0
        self._order, self._augmenting = (
            torch.Generator().manual_seed(stream_seed(worker.trial_seed, number, round, purpose))
            for purpose in ("order", "augmentation")
        )
        self._seen = []  # logits, labels, loss, number of samples of each recorded batch

    def batches(self, epochs: int | None = None):
        """Batches of the client's samples in a new order each epoch; as many epochs as the settings say, if not given."""
        worker = self._worker
        for _ in range(epochs or worker.settings.local_epochs):
            order = self._indices[torch.randperm(self.samples, generator=self._order)]
            for inputs, labels in worker.batches(order, self._augmenting):
                yield Batch(inputs, labels)

    def backward(self, batch: "Batch", is_recorded: bool = True):
        """Make `gradient` that of the algorithm's loss of `batch` at `weights`. What is not recorded does not count in the
        metrics."""
        worker = self._worker
        self.gradient.zero_()
        with worker.autocast():
            logits = self.model(batch.inputs)
            loss = worker.algorithm.loss(self, batch.inputs, logits, batch.labels)
        loss.backward()
        worker.progress += 1
        if is_recorded:
            self._seen.append((logits.detach(), batch.labels, loss.detach(), len(batch)))

    def step(self, optimizer: int = 0, only: torch.Tensor | None = None):
        """Make a step of the local optimizer of that number along `gradient`, of the entries of `only` [size] where given."""
        before = None if only is None else self.parameters.clone()
        self._worker.optimizer.step(self._moments[optimizer])
        if only is not None:
            self.parameters.copy_(self.parameters.where(only[: len(before)], before))
        self.steps += 1

    @property
    def classifier(self) -> nn.Linear:
        """The model's last linear layer. Raises UsageError where it has none."""
        return classifier_of(self.model)

    @property
    def features(self) -> torch.Tensor:
        """What went into the classifier in the last forward pass [samples, features]."""
        return self._worker.features[self.classifier]

    def frozen(self, weights: torch.Tensor):
        """A function from inputs to the features of the model with `weights` [size], in evaluation mode, without gradient."""
        return self._worker.frozen(weights)

    def metrics(self) -> dict:
        """The mean loss and accuracy over the samples as they were trained on."""
        logits, labels, losses, sizes = zip(*self._seen)
        correct = (torch.cat(logits).argmax(1) == torch.cat(labels)).sum()
        sizes = torch.tensor(sizes, dtype=torch.float64, device=correct.device)
        loss = torch.stack(losses).double().dot(sizes) / sizes.sum()
        return {"loss": loss.item(), "accuracy": correct.item() / sizes.sum().item()}


@dataclasses.dataclass
class Batch:
    """inputs float32 [samples, …], labels int64 [samples]."""

    inputs: torch.Tensor
    labels: torch.Tensor

    def __len__(self):
        return len(self.labels)


def row_size_of(settings: Settings, hparams: dict, flat: Flat) -> int:
    """How many float32 numbers a client keeps between rounds: whether it ever trained, the algorithm's vectors, and the
    moments of its local optimizers."""
    algorithm = algorithms.load(settings.algorithm)
    moments = LocalOptimizer.row_size_of(settings, hparams, flat.num_parameters) if settings.optimizer_state == "keep" else 0
    kept = algorithm.client_vectors * flat.size + algorithm.optimizers * moments
    return kept + 1 if kept else 0


class Worker:
    """What one process needs to host clients: the data, one model that they take in turn, and the trial's memory."""

    def __init__(self, settings: Settings, hparams: dict, trial_seed: int, dataset: Dataset, parts: list[Part], memory: Memory):
        self.device = resolve_device(settings)
        self.settings, self.hparams, self.trial_seed = settings, hparams, trial_seed
        self.progress = 0  # grows as long as there is progress
        self.algorithm = algorithms.load(settings.algorithm)(hparams)
        spec = dataset.spec
        augmentation.check(settings.augmentation, spec)
        self._augment = augmentation.REGISTRY[settings.augmentation]
        self._build = lambda: models.build(settings.model_arch, spec, hparams["dropout_rate"], 0).to(self.device)
        self.model = self._build()
        self.flat = Flat(self.model)
        self.optimizer = LocalOptimizer(settings, hparams, self.flat)
        self._scratch_moments = torch.zeros(self.algorithm.optimizers, self.optimizer.row_size, device=self.device)
        self._memory = memory
        self._spares = []
        self._spares_in_use = 0
        self.features = {}
        if self.algorithm.uses_features:
            self._note_features(classifier_of(self.model))

        def on_device(array):
            return torch.from_numpy(array).to(self.device)

        self._mean, self._std = (
            torch.tensor(values).mul(spec.scale).view(spec.channel_shape).to(self.device) for values in (spec.mean, spec.std)
        )
        # Channels last is what a CPU's convolutions want: the McMahan CNN trains at 1.25x and evaluates at 1.7x the speed,
        # in bf16 at 1.5x and 2.5x. GPUs want it for bf16 only.
        pays = spec.is_image and (self.device.type == "cpu" or settings.precision == "bf16")
        self._memory_format = torch.channels_last if pays else torch.contiguous_format
        self._train = on_device(dataset.train_inputs), on_device(dataset.train_labels)
        self._test = on_device(dataset.test_inputs), on_device(dataset.test_labels)
        self.train_indices = [torch.from_numpy(part.train) for part in parts]
        if self.algorithm.pooled:
            self.train_indices = [torch.cat(self.train_indices)]
        self.mean_samples = sum(map(len, self.train_indices)) / len(self.train_indices)
        self.plan = Plan(parts, len(dataset.test_labels), self.algorithm.personal)

    def receive(self):
        """Take what the server has sent, before any work on it."""
        self.broadcast = torch.from_numpy(self._memory.broadcast).to(self.device)  # [broadcasts, size]

    def train(self, number: int, round: int) -> Client:
        """Train client `number` from the broadcast weights; `upload` hands on what it reached."""
        torch.manual_seed(stream_seed(self.trial_seed, number, round, "dropout"))
        self._spares_in_use = 0
        client = Client(self, number, round)
        client.weights.copy_(client.global_weights)
        self.model.train()
        self.algorithm.train(client)
        return client

    def upload(self, client: Client, updates: torch.Tensor):
        """Fill `updates` [uploads, size] with what the algorithm sends of `client`, and the client's row with what it keeps."""
        here = updates.to(self.device)
        self.algorithm.upload(client, here)
        updates.copy_(here)  # nothing to do on the CPU, where `to` gives the same tensor
        self._kept.copy_(self._row)
        self._memory.clients[client.number, :1] = 1

    def evaluate(self, blocks: list[int]):
        """Evaluate: row `block` of the memory's evaluation becomes its samples' losses, then whether each was right."""
        self.model.eval()
        holds, results = (), []
        with torch.inference_mode():
            for number in blocks:
                block = self.plan.blocks[number]
                if holds != (block.client,):
                    holds = (block.client,)
                    self.flat.weights.copy_(self.broadcast[0])
                    if block.client is not None:
                        self.algorithm.personalize(Client(self, block.client, 0))
                inputs, labels = self._gather(self._test if block.is_test else self._train, torch.from_numpy(block.indices))
                with self.autocast():
                    logits = self.model(inputs)
                logits = logits.float()
                losses = functional.cross_entropy(logits, labels, reduction="none")
                results.append(torch.stack([losses, logits.argmax(1) == labels]))
                self.progress += 1
        for number, result in zip(blocks, results):  # only now, as a GPU is waited for here
            torch.from_numpy(self._memory.evaluation[number]).view(2, BLOCK)[:, : result.shape[1]].copy_(result)

    def kept_by(self, number: int) -> tuple[bool, torch.Tensor, torch.Tensor]:
        """Of a client: whether it never trained, its state [client_vectors, size] and its moments [optimizers, moments]."""
        kept = self._memory.clients[number]
        is_new = not (len(kept) and kept[0])
        self._kept = torch.from_numpy(kept)
        self._row = row = self._kept.to(self.device)
        vectors, size = self.algorithm.client_vectors, self.flat.size
        state, moments = row[1 : 1 + vectors * size].view(vectors, size), row[1 + vectors * size :]
        if not len(moments):
            return is_new, state, self._scratch_moments.zero_()
        return is_new, state, moments.view(self.algorithm.optimizers, -1)

    def frozen(self, weights: torch.Tensor):
        """See Client."""
        if self._spares_in_use == len(self._spares):
            model = self._build().eval()
            self._note_features(classifier_of(model))
            self._spares.append((model, Flat(model)))
        model, flat = self._spares[self._spares_in_use]
        self._spares_in_use += 1
        flat.weights.copy_(weights)

        def features(inputs):
            with torch.no_grad(), self.autocast():
                model(inputs)
            return self.features[classifier_of(model)]

        return features

    def _note_features(self, classifier):
        """Have `features` hold what goes into a model's classifier."""
        classifier.register_forward_pre_hook(lambda module, inputs: self.features.update({module: inputs[0]}))

    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    def batches(self, indices: torch.Tensor, augmenting: torch.Generator):
        """Batches (inputs, labels) of the samples at `indices`, in their order, augmented by draws from `augmenting`. A last
        batch of one sample joins the one before it, since BatchNorm cannot normalise a single sample."""
        sizes = batch_sizes(len(indices), self.hparams)
        batch_size = sizes[0]
        sample_bytes = 4 * self._train[0][0].numel()
        a_time = max(1, GATHER_BYTES // (sample_bytes * batch_size))
        for first in range(0, len(sizes), a_time):
            chunk = sizes[first : first + a_time]
            start = first * batch_size
            inputs, labels = self._gather(self._train, indices[start : start + sum(chunk)], augmenting)
            yield from zip(inputs.split(chunk), labels.split(chunk))

    def _gather(self, source, indices, augmenting=None):
        """The normalised inputs and the labels at `indices`, augmented where a generator to draw from is given."""
        inputs, labels = source
        indices = indices.to(self.device, non_blocking=True)
        inputs = inputs.index_select(0, indices)
        if self._augment is not None and augmenting is not None:
            inputs = self._augment(inputs, augmenting)
        return (
            inputs.float().sub_(self._mean).div_(self._std).to(memory_format=self._memory_format),
            labels.index_select(0, indices),
        )

    def autocast(self):
        if self.settings.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)


def batch_sizes(samples: int, hparams: dict) -> list[int]:
    """The sizes of an epoch's batches."""
    batch_size = hparams.get("batch_size", FULL_BATCH)
    full, rest = divmod(samples, batch_size)
    sizes = [batch_size] * full + [rest] * (rest > 0)
    if rest == 1 and full:
        sizes[-2:] = [batch_size + 1]
    return sizes


def classifier_of(model: nn.Module) -> nn.Linear:
    """See Client."""
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise UsageError("the algorithm needs a model that ends in a linear layer, and this one has none")
    return linear[-1]
