"""The data sets: samples as arrays, one entry of REGISTRY each.

torchvision reads the large ones and downloads them if they are missing. It is imported for that alone, as that takes a
second: what it read is kept as arrays that every process of the machine maps.
"""

import dataclasses
import functools
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable

import numpy as np

from federated.options import UsageError

SHIPPED = pathlib.Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Spec:
    """What is known of a data set before it is read, and how it is read.

    read(data_dir) returns {name: array} of
        train_inputs, test_inputs  uint8 or float32 [samples, *shape]
        train_labels, test_labels  whole numbers [samples] from 0 to num_classes - 1
        train_owners, test_owners  only with num_owners: who owns each sample, whole numbers [samples] from 0 to num_owners - 1
    """

    shape: tuple[int, ...]  # of a sample: (channels, height, width) of an image, (features,) of a row of a table
    num_classes: int
    read: Callable[[str], dict]
    scale: float = 1.0  # the largest value of a pixel
    mean: tuple[float, ...] | None = None  # of each channel or feature of the training set, in units of scale;
    std: tuple[float, ...] | None = None  # computed if not given
    num_owners: int | None = None

    @property
    def is_image(self) -> bool:
        return len(self.shape) == 3

    @property
    def channel_shape(self) -> tuple[int, ...]:
        """That of one number a channel or feature, to go with samples."""
        return self.shape[0], *[1] * (len(self.shape) - 1)

    def __str__(self) -> str:
        return "x".join(map(str, self.shape)) + (" images" if self.is_image else " features")


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Inputs are uint8 or float32 [samples, *spec.shape], labels and owners int64 [samples]. `spec` has mean and std."""

    spec: Spec
    train_inputs: np.ndarray
    train_labels: np.ndarray
    test_inputs: np.ndarray
    test_labels: np.ndarray
    train_owners: np.ndarray | None = None
    test_owners: np.ndarray | None = None


def load(name: str, data_dir: str) -> Dataset:
    """The data set `name`, checked and with its normalisation.

    Raises UsageError if its files are missing and cannot be downloaded, or its arrays are not what its Spec says.
    """
    spec = REGISTRY[name]
    try:
        arrays = spec.read(data_dir)
    except OSError as error:
        raise UsageError(f"dataset {name!r} cannot be read ({error}): name the --data_dir that has it") from error
    checked = {}
    for part in ("train", "test"):
        inputs = checked[f"{part}_inputs"] = arrays[f"{part}_inputs"]
        if inputs.dtype not in (np.uint8, np.float32) or inputs.shape[1:] != spec.shape:
            raise UsageError(
                f"dataset {name!r}: its {part}_inputs are {inputs.dtype} {list(inputs.shape)}, not uint8 or float32 "
                f"[samples, {', '.join(map(str, spec.shape))}]"
            )
        if inputs.dtype == np.float32 and not np.isfinite(inputs).all():
            raise UsageError(f"dataset {name!r}: its {part}_inputs hold numbers that are not finite")
        for what, count in (("labels", spec.num_classes), ("owners", spec.num_owners)):
            if count is not None:
                checked[f"{part}_{what}"] = _numbers(name, f"{part}_{what}", arrays, len(inputs), count)
    if spec.mean is None:
        spec = dataclasses.replace(spec, **_normalisation(checked["train_inputs"], spec.scale))
    return Dataset(spec, **checked)


def _numbers(name, what, arrays, samples, count):
    """The labels or owners of `samples` samples as int64."""
    numbers = arrays[what].astype(np.int64)
    if numbers.shape != (samples,) or not samples or numbers.min() < 0 or numbers.max() >= count:
        raise UsageError(f"dataset {name!r}: its {what} are not one number from 0 to {count - 1} for each of {samples} samples")
    return numbers


def _normalisation(inputs, scale):
    """Mean and standard deviation of each channel or feature; 1 instead of a deviation of 0."""
    axes = (0, *range(2, inputs.ndim))
    mean, std = (of(inputs, axis=axes, dtype=np.float64) / scale for of in (np.mean, np.std))
    return {"mean": tuple(mean.tolist()), "std": tuple(np.where(std > 0, std, 1).tolist())}


def _heart_disease(data_dir):
    with np.load(SHIPPED / "heart_disease.npz") as arrays:
        return dict(arrays)


def _digits(data_dir):
    with np.load(SHIPPED / "digits.npz") as arrays:
        return {
            "train_inputs": arrays["train_images"][:, None],
            "train_labels": arrays["train_labels"],
            "test_inputs": arrays["test_images"][:, None],
            "test_labels": arrays["test_labels"],
        }


_TRAIN_OR_NOT = {"train": {"train": True}, "test": {"train": False}}


def _images(name, shape, num_classes, mean, std, reader, folder, parts=_TRAIN_OR_NOT):
    """The Spec of images that torchvision's class `reader` reads, with the arguments in `parts` for the one and the other part.
    It looks for its files in `folder` below --data_dir."""
    return Spec(shape, num_classes, functools.partial(_read_images, name, reader, folder, parts), 255, mean, std)


def _read_images(name, reader, folder, parts, data_dir):
    decoded = pathlib.Path(data_dir) / "decoded" / name
    if not decoded.is_dir():
        _decode(name, reader, folder, parts, pathlib.Path(data_dir), decoded)
    arrays = {}
    for part in parts:
        images = np.load(decoded / f"{part}_images.npy", mmap_mode="c")
        arrays[f"{part}_inputs"] = images if images.ndim == 4 else images[:, None]
        arrays[f"{part}_labels"] = np.load(decoded / f"{part}_labels.npy")
    return arrays


def _decode(name, reader, folder, parts, data_dir, decoded) -> None:
    """Have torchvision read the files, after a download if they are missing, and write them as arrays."""
    from torchvision import datasets

    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        read = {part: getattr(datasets, reader)(data_dir, download=True, **options) for part, options in parts.items()}
    except Exception as error:  # a reader of torchvision fails in many ways
        raise UsageError(
            f"dataset {name!r} could be neither read from {str(data_dir / folder)!r} nor downloaded "
            f"({' '.join(str(error).split()) or repr(error)}): put torchvision's {reader} files there, or name "
            "another --data_dir"
        ) from error
    try:
        _write(read, decoded)
    except OSError as error:
        raise UsageError(
            f"cannot write decoded data to {str(decoded)!r} ({error.strerror}): name another --data_dir"
        ) from error


def _write(parts, decoded) -> None:
    """Write the arrays and then give their directory its name. Where another process was first, its arrays stay."""
    decoded.parent.mkdir(exist_ok=True)
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{decoded.name}-", dir=decoded.parent))
    try:
        for part, read in parts.items():
            images = np.asarray(read.data)
            if images.shape[-1] == 3:  # CIFAR's readers have colours last, SVHN's has them first
                images = images.transpose(0, 3, 1, 2)
            labels = read.labels if hasattr(read, "labels") else read.targets
            np.save(temporary / f"{part}_images.npy", np.ascontiguousarray(images))
            np.save(temporary / f"{part}_labels.npy", np.asarray(labels, dtype=np.uint8))
        temporary.chmod(0o755)
        try:
            os.rename(temporary, decoded)
        except OSError:
            if not decoded.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


_GREY, _COLOUR = (1, 28, 28), (3, 32, 32)
_CIFAR10_MEAN, _CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
_CIFAR100_MEAN, _CIFAR100_STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
_SVHN_MEAN, _SVHN_STD = (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)
_BALANCED = {part: {"split": "balanced", **which} for part, which in _TRAIN_OR_NOT.items()}
_BY_SPLIT = {part: {"split": part} for part in _TRAIN_OR_NOT}

REGISTRY = {
    "digits": Spec((1, 8, 8), 10, _digits, 16, (0.3054,), (0.3761,)),
    "heart_disease": Spec((13,), 2, _heart_disease, num_owners=4),
    "mnist": _images("mnist", _GREY, 10, (0.1307,), (0.3081,), "MNIST", "MNIST/raw"),
    "fashion_mnist": _images("fashion_mnist", _GREY, 10, (0.2860,), (0.3530,), "FashionMNIST", "FashionMNIST/raw"),
    # as torchvision gives them, lying on their side (transposed)
    "emnist": _images("emnist", _GREY, 47, (0.1751,), (0.3332,), "EMNIST", "EMNIST/raw", _BALANCED),
    "kmnist": _images("kmnist", _GREY, 10, (0.1918,), (0.3483,), "KMNIST", "KMNIST/raw"),
    "svhn": _images("svhn", _COLOUR, 10, _SVHN_MEAN, _SVHN_STD, "SVHN", "", _BY_SPLIT),
    "cifar10": _images("cifar10", _COLOUR, 10, _CIFAR10_MEAN, _CIFAR10_STD, "CIFAR10", "cifar-10-batches-py"),
    "cifar100": _images("cifar100", _COLOUR, 100, _CIFAR100_MEAN, _CIFAR100_STD, "CIFAR100", "cifar-100-python"),
}
