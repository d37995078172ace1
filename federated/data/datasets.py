"""The data sets: samples as arrays, one entry of REGISTRY each.

torchvision reads the large ones and downloads them if they are missing. It is imported for that alone, as that takes a
second: see federated.data.decoded.
"""

import dataclasses
import functools
import pathlib
import zipfile
import zlib
from collections.abc import Callable

import numpy as np

from federated.data import decoded
from federated.extension import Registry, explain
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


REGISTRY: Registry[Spec] = Registry("dataset")


def register(name: str, spec: Spec) -> None:
    """Let options name a data set. Raises UsageError if its Spec cannot be, or the name exists."""
    REGISTRY.require(isinstance(spec, Spec) and callable(spec.read), name, "a Spec with a function that reads it")
    sizes = (*spec.shape, spec.num_classes, 1 if spec.num_owners is None else spec.num_owners)
    is_size = all(isinstance(size, int) and size > 0 for size in sizes)
    REGISTRY.require(
        bool(spec.shape) and is_size, name, f"of whole numbers: {spec.shape}, {sizes[-2]} classes, {sizes[-1]} owners"
    )
    REGISTRY.add(name, spec)


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
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:  # missing, cut, or of another format
        raise UsageError(f"dataset {name!r} cannot be read ({explain(error)}): name the --data_dir that has it") from error
    names = [
        f"{part}_{what}" for part in ("train", "test") for what in ("inputs", "labels", "owners")[: 2 + bool(spec.num_owners)]
    ]
    if not isinstance(arrays, dict) or any(not isinstance(arrays.get(array), np.ndarray) for array in names):
        raise UsageError(f"dataset {name!r}: what its function returns is not a dict with the arrays {', '.join(names)}")
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
    with np.errstate(invalid="ignore"):
        numbers = arrays[what].astype(np.int64)
    if (
        (numbers != arrays[what]).any()
        or numbers.shape != (samples,)
        or not samples
        or numbers.min() < 0
        or numbers.max() >= count
    ):
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


def _images(name, shape, num_classes, mean, std, reader, folder, patterns=None, parts=_TRAIN_OR_NOT):
    """The Spec of images that torchvision's class `reader` reads, with the arguments in `parts` for the one and the other part,
    from files with the given patterns below --data_dir, by default all in `folder`, in which it unpacks what it downloads."""
    files = decoded.Files(name, reader, folder, patterns or (f"{folder}/*",), parts)
    return Spec(shape, num_classes, functools.partial(_read_images, files), 255, mean, std)


def _read_images(files, data_dir):
    arrays = {}
    for name, values in decoded.read(files, data_dir).items():
        part, _, what = name.partition("_")
        arrays[f"{part}_inputs" if what == "images" else name] = values[:, None] if values.ndim == 3 else values
    return arrays


_GREY, _COLOUR = (1, 28, 28), (3, 32, 32)
_CIFAR10_MEAN, _CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
_CIFAR100_MEAN, _CIFAR100_STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
_SVHN_MEAN, _SVHN_STD = (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)
_CIFAR10, _CIFAR100 = "cifar-10-batches-py", "cifar-100-python"
_CIFAR10_FILES = ("cifar-10-python.tar.gz", f"{_CIFAR10}/*")
_CIFAR100_FILES = ("cifar-100-python.tar.gz", f"{_CIFAR100}/*")
_EMNIST_FILES = ("EMNIST/raw/gzip.zip", "EMNIST/raw/emnist-balanced-*")
_BALANCED = {part: {"split": "balanced", **which} for part, which in _TRAIN_OR_NOT.items()}
_BY_SPLIT = {part: {"split": part} for part in _TRAIN_OR_NOT}

register("digits", Spec((1, 8, 8), 10, _digits, 16, (0.3054,), (0.3761,)))
register("heart_disease", Spec((13,), 2, _heart_disease, num_owners=4))
register("mnist", _images("mnist", _GREY, 10, (0.1307,), (0.3081,), "MNIST", "MNIST/raw"))
register("fashion_mnist", _images("fashion_mnist", _GREY, 10, (0.2860,), (0.3530,), "FashionMNIST", "FashionMNIST/raw"))
# as torchvision gives them, lying on their side (transposed)
register("emnist", _images("emnist", _GREY, 47, (0.1751,), (0.3332,), "EMNIST", "EMNIST/raw", _EMNIST_FILES, _BALANCED))
register("kmnist", _images("kmnist", _GREY, 10, (0.1918,), (0.3483,), "KMNIST", "KMNIST/raw"))
register("svhn", _images("svhn", _COLOUR, 10, _SVHN_MEAN, _SVHN_STD, "SVHN", "", ("t*_32x32.mat",), _BY_SPLIT))
register("cifar10", _images("cifar10", _COLOUR, 10, _CIFAR10_MEAN, _CIFAR10_STD, "CIFAR10", _CIFAR10, _CIFAR10_FILES))
register("cifar100", _images("cifar100", _COLOUR, 100, _CIFAR100_MEAN, _CIFAR100_STD, "CIFAR100", _CIFAR100, _CIFAR100_FILES))
