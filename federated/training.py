"""Local training and evaluation: model, data and hyper-parameters in, weights and metrics out."""

import contextlib
import ctypes

import numpy as np
import torch
from torch.nn import functional
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from federated import algorithms, augmentation, models
from federated.channel import Memory
from federated.datasets import Dataset
from federated.flat import Flat
from federated.options import UsageError
from federated.partition import Part
from federated.seeds import stream_seed
from federated.trial import Settings

# Evaluation goes in fixed blocks, so that its bits do not depend on which process evaluates what.
EVALUATION_BLOCK = 512
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
        supported = torch.cuda.is_bf16_supported() if name == "cuda" else torch.cpu._is_avx512_bf16_supported()
        if not supported:
            raise UsageError(f"--precision bf16: this {name} has no bf16 arithmetic; use fp32")
    torch.set_num_threads(settings.threads)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    return torch.device(name)


class LocalOptimizer:
    """Adam (Kingma and Ba, ICLR 2015) or SGD over the flat weights, with its moments in a row of memory.

    The row is the client's own, so that any process can go on with any client. torch's functional optimizers are used:
    they take the moments as arguments, and importing the classes costs 0.8 s.
    """

    def __init__(self, settings: Settings, hparams: dict, flat: Flat):
        self._weights, self._gradient = flat.weights[: flat.num_parameters], flat.gradient
        self.row_size = self.row_size_of(settings, hparams, flat.num_parameters)
        self._row = None
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
                "momentum": hparams["momentum"],
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
        return num_parameters if hparams["momentum"] else 0

    def use(self, row: torch.Tensor):
        """Go on from the moments in `row` [row_size], zeros at first, and keep them there."""
        self._row = row

    def _adam(self):
        size = len(self._gradient)
        first, second, steps = self._row[:size], self._row[size:-1], self._row[-1]
        adam([self._weights], [self._gradient], [first], [second], [], [steps], fused=True, maximize=False, **self._arguments)

    def _sgd(self):
        momentum = self._row if self.row_size else None
        sgd([self._weights], [self._gradient], [momentum], fused=True, maximize=False, **self._arguments)


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
        self.model = models.build(settings.model_arch, spec, hparams["dropout_rate"], 0).to(self.device)
        self.flat = Flat(self.model)
        self.optimizer = LocalOptimizer(settings, hparams, self.flat)
        self._scratch_row = torch.zeros(self.optimizer.row_size, device=self.device)
        self._broadcast, self._moments, self._evaluation = map(
            torch.from_numpy, (memory.broadcast, memory.moments, memory.evaluation)
        )

        def on_device(array):
            return torch.from_numpy(array).to(self.device)

        self._mean, self._std = (
            torch.tensor(values, device=self.device).mul(spec.scale).view(spec.channel_shape)
            for values in (spec.mean, spec.std)
        )
        # Channels last is what a CPU's convolutions want: the McMahan CNN trains at 1.25x and evaluates at 1.7x the speed,
        # in bf16 at 1.5x and 2.5x. GPUs want it for bf16 only.
        pays = spec.is_image and (self.device.type == "cpu" or settings.precision == "bf16")
        self._memory_format = torch.channels_last if pays else torch.contiguous_format
        self._train = on_device(dataset.train_inputs), on_device(dataset.train_labels)
        self._test = on_device(dataset.test_inputs), on_device(dataset.test_labels)
        self._train_indices = [torch.from_numpy(part.train) for part in parts]
        self._blocks = evaluation_blocks(len(dataset.test_labels), parts)

    def train(self, client: int, round: int) -> dict:
        """Train `client` from the broadcast weights; `upload` hands on what it reached.

        Returns the mean loss and accuracy over the samples as they were trained on.
        """
        settings, flat, model, optimizer = self.settings, self.flat, self.model, self.optimizer
        flat.weights.copy_(self._broadcast[0])
        keep = settings.optimizer_state == "keep"
        row = self._moments[client] if keep else self._scratch_row.zero_()
        if row.device != self.device:
            row = self._scratch_row.copy_(row)
        optimizer.use(row)

        order = torch.Generator().manual_seed(stream_seed(self.trial_seed, client, round, "order"))
        torch.manual_seed(stream_seed(self.trial_seed, client, round, "dropout"))
        augmenting = torch.Generator().manual_seed(stream_seed(self.trial_seed, client, round, "augmentation"))
        indices = self._train_indices[client]
        model.train()
        all_logits, all_labels, losses, sizes = [], [], [], []
        for _ in range(settings.local_epochs):
            permutation = indices[torch.randperm(len(indices), generator=order)]
            for images, labels in self._batches(self._train, permutation, self.hparams["batch_size"], augmenting):
                flat.gradient.zero_()
                with self._autocast():
                    logits = model(images)
                    loss = functional.cross_entropy(logits, labels)
                loss.backward()
                optimizer.step()
                self.progress += 1
                all_logits.append(logits.detach())
                all_labels.append(labels)
                losses.append(loss.detach())
                sizes.append(len(labels))
        if keep and row is self._scratch_row:
            self._moments[client].copy_(row)
        seen = sum(sizes)
        correct = (torch.cat(all_logits).argmax(1) == torch.cat(all_labels)).sum()
        loss = torch.stack(losses).double().dot(torch.tensor(sizes, dtype=torch.float64, device=self.device))
        return {"loss": loss.item() / seen, "accuracy": correct.item() / seen}

    def upload(self, updates: torch.Tensor):
        """Fill `updates` [uploads, size] with what the algorithm sends of the client trained last."""
        self.algorithm.upload(self.flat.weights, updates)

    def evaluate(self, blocks: list[int]):
        """Evaluate the broadcast weights: row `block` of the memory's evaluation becomes its samples' losses, then whether
        each was right."""
        self.flat.weights.copy_(self._broadcast[0])
        self.model.eval()
        with torch.inference_mode():
            for block in blocks:
                is_test, indices = self._blocks[block]
                images, labels = self._gather(self._test if is_test else self._train, torch.from_numpy(indices))
                with self._autocast():
                    logits = self.model(images)
                logits = logits.float()
                result = self._evaluation[block].view(2, EVALUATION_BLOCK)[:, : len(indices)]
                result[0].copy_(functional.cross_entropy(logits, labels, reduction="none"))
                result[1].copy_(logits.argmax(1) == labels)
                self.progress += 1

    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    def _batches(self, source, indices, batch_size, augmenting=None):
        """Batches of the samples at `indices`, in their order. A last batch of one sample joins the one before it, since
        BatchNorm cannot normalise a single sample."""
        sizes = batch_sizes(len(indices), batch_size)
        sample_bytes = 4 * source[0][0].numel()
        a_time = max(1, GATHER_BYTES // (sample_bytes * batch_size))
        for first in range(0, len(sizes), a_time):
            chunk = sizes[first : first + a_time]
            start = first * batch_size
            images, labels = self._gather(source, indices[start : start + sum(chunk)], augmenting)
            yield from zip(images.split(chunk), labels.split(chunk))

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

    def _autocast(self):
        if self.settings.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)


def batch_sizes(samples: int, batch_size: int) -> list[int]:
    """The sizes of an epoch's batches."""
    full, rest = divmod(samples, batch_size)
    sizes = [batch_size] * full + [rest] * (rest > 0)
    if rest == 1 and full:
        sizes[-2:] = [batch_size + 1]
    return sizes


def evaluation_blocks(test_samples: int, parts: list[Part]) -> list[tuple[bool, np.ndarray]]:
    """(is it of the test set, indices) of each block: first the test set, then all clients' held-out samples in their order."""
    val = np.concatenate([part.val for part in parts])
    return [
        (is_test, indices[start : start + EVALUATION_BLOCK])
        for is_test, indices in ((True, np.arange(test_samples)), (False, val))
        for start in range(0, len(indices), EVALUATION_BLOCK)
    ]
