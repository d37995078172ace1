"""A trial's samples on the device, and the batches made of them."""

from collections.abc import Iterator

import torch

from federated.data import augmentation
from federated.data.datasets import Dataset
from federated.settings import Settings

# Samples of a batch if the algorithm has no batch size
FULL_BATCH = 1024
# An epoch's samples are gathered and normalised this many bytes (as float32) at a time.
GATHER_BYTES = 1 << 26


class DeviceData:
    """The training and the test set, as the data set has them. Images and features are normalised and augmented as they are
    gathered, sequences become the whole numbers that an embedding takes."""

    def __init__(self, dataset: Dataset, settings: Settings, device: torch.device) -> None:
        """Raises UsageError if the augmentation does not fit the data."""
        spec = dataset.spec
        augmentation.check(settings.augmentation, spec)
        self._augmentation = settings.augmentation
        self._device = device
        self._is_sequence = spec.is_sequence
        if not self._is_sequence:
            self._mean, self._std = (
                torch.tensor(values).mul(spec.scale).view(spec.channel_shape).to(device) for values in (spec.mean, spec.std)
            )
        # A CPU's convolutions want channels last: the McMahan CNN trains at 1.25x and evaluates at 1.7x the speed, in bf16 at
        # 1.5x and 2.5x. GPUs want it for bf16 only.
        wants_channels_last = spec.is_image and (device.type == "cpu" or settings.precision == "bf16")
        self._memory_format = torch.channels_last if wants_channels_last else torch.contiguous_format

        def on_device(array):
            return torch.from_numpy(array).to(device)

        self._train = on_device(dataset.train_inputs), on_device(dataset.train_labels)
        self._test = on_device(dataset.test_inputs), on_device(dataset.test_labels)

    def gather(
        self, is_test: bool, indices: torch.Tensor, augmenting: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the inputs, as the model takes them, and the labels of the test or the training set at `indices`, augmented
        by draws from `augmenting` if given."""
        inputs, labels = self._test if is_test else self._train
        indices = indices.to(self._device, non_blocking=True)
        inputs = inputs.index_select(0, indices)
        if augmenting is not None:
            inputs = augmentation.apply(self._augmentation, inputs, augmenting)
        labels = labels.index_select(0, indices)
        if self._is_sequence:
            return inputs.long(), labels
        return inputs.float().sub_(self._mean).div_(self._std).to(memory_format=self._memory_format), labels

    def training_batches(
        self, indices: torch.Tensor, sizes: list[int], augmenting: torch.Generator
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (inputs, labels) of the training samples at `indices`, in their order, in batches of `sizes`, all but the last
        of which are equal."""
        inputs, _ = self._train
        at_a_time = max(1, GATHER_BYTES // (4 * inputs[0].numel() * sizes[0]))
        for first in range(0, len(sizes), at_a_time):
            some = sizes[first : first + at_a_time]
            start = first * sizes[0]
            inputs, labels = self.gather(False, indices[start : start + sum(some)], augmenting)
            yield from zip(inputs.split(some), labels.split(some))


def batch_sizes(samples: int, hparams: dict) -> list[int]:
    """Return the sizes of an epoch's batches. A last batch of one sample joins the one before it, since BatchNorm cannot
    normalise a single sample."""
    batch_size = hparams.get("batch_size", FULL_BATCH)
    full, rest = divmod(samples, batch_size)
    sizes = [batch_size] * full + [rest] * (rest > 0)
    if rest == 1 and full:
        sizes[-2:] = [batch_size + 1]
    return sizes
