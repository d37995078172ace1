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

from federated.data import decoded, domains, leaf
from federated.extension import Registry, explain
from federated.options import UsageError

SHIPPED = pathlib.Path(__file__).parent
MANY_CLIENTS = 100  # by default, of the owners that the files name


@dataclasses.dataclass(frozen=True)
class Spec:
    """What is known of a data set before it is read, and how it is read.

    read(data_dir) returns {name: array} of
        train_inputs, test_inputs  uint8 or float32 [samples, *shape]; sequences: uint8, int32 or int64 below num_tokens
        train_labels, test_labels  whole numbers [samples] from 0 to num_classes - 1
        train_owners, test_owners  only with num_owners or many_owners: who owns each sample [samples], whole numbers from 0 to
                                   num_owners - 1; with many_owners names of any kind
    """

    shape: tuple[int, ...]  # of a sample: (channels, height, width) of an image, (features,) of a row of a table, (length,)
    num_classes: int
    read: Callable[[str], dict]
    scale: float = 1.0  # the largest value of a pixel
    mean: tuple[float, ...] | None = None  # of each channel or feature of the training set, in units of scale;
    std: tuple[float, ...] | None = None  # computed if not given
    num_owners: int | None = None
    many_owners: bool = False  # whether only the files say how many owners there are
    num_tokens: int | None = None  # how many values an entry of a sequence may have; None: samples are no sequences

    @property
    def is_image(self) -> bool:
        return len(self.shape) == 3

    @property
    def is_sequence(self) -> bool:
        return self.num_tokens is not None

    @property
    def has_owners(self) -> bool:
        return self.num_owners is not None or self.many_owners

    @property
    def default_clients(self) -> int:
        """Of a federation, if nothing is said of it."""
        return self.num_owners or (MANY_CLIENTS if self.many_owners else 2)

    @property
    def default_model(self) -> str:
        return "mlp" if self.is_image else "lstm" if self.is_sequence else "logistic"

    @property
    def channel_shape(self) -> tuple[int, ...]:
        """That of one number a channel or feature, to go with samples."""
        return self.shape[0], *[1] * (len(self.shape) - 1)

    def __str__(self) -> str:
        if self.is_sequence:
            return f"sequences of {self.shape[0]}"
        return "x".join(map(str, self.shape)) + (" images" if self.is_image else " features")


REGISTRY: Registry[Spec] = Registry("dataset")


def register(name: str, spec: Spec) -> None:
    """Let options name a data set. Raises UsageError if its Spec cannot be, or the name exists."""
    REGISTRY.require(isinstance(spec, Spec) and callable(spec.read), name, "a Spec with a function that reads it")
    sizes = (*spec.shape, spec.num_classes, *(1 if each is None else each for each in (spec.num_owners, spec.num_tokens)))
    is_size = all(isinstance(size, int) and size > 0 for size in sizes)
    REGISTRY.require(
        bool(spec.shape) and is_size,
        name,
        f"of whole numbers: {spec.shape}, {sizes[-3]} classes, {sizes[-2]} owners, {sizes[-1]} tokens",
    )
    REGISTRY.require(
        len(spec.shape) == 1 or not spec.is_sequence, name, f"of sequences: their shape is {spec.shape} and has to be (length,)"
    )
    REGISTRY.add(name, spec)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Inputs are [samples, *spec.shape], labels and owners int64 [samples]. `spec` has mean and std but for sequences, and
    num_owners if there are owners."""

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
    names = [f"{part}_{what}" for part in ("train", "test") for what in ("inputs", "labels", "owners")[: 2 + spec.has_owners]]
    if not isinstance(arrays, dict) or any(not isinstance(arrays.get(array), np.ndarray) for array in names):
        raise UsageError(f"dataset {name!r}: what its function returns is not a dict with the arrays {', '.join(names)}")
    if spec.many_owners:
        owners, count = _numbered_owners(arrays)
        arrays, spec = arrays | owners, dataclasses.replace(spec, num_owners=count)
    checked = {}
    for part in ("train", "test"):
        inputs = checked[f"{part}_inputs"] = arrays[f"{part}_inputs"]
        _check_inputs(name, f"{part}_inputs", inputs, spec)
        for what, count in (("labels", spec.num_classes), ("owners", spec.num_owners)):
            if count is not None:
                checked[f"{part}_{what}"] = _numbers(name, f"{part}_{what}", arrays, len(inputs), count)
    if spec.mean is None and not spec.is_sequence:
        spec = dataclasses.replace(spec, **_normalisation(checked["train_inputs"], spec.scale))
    return Dataset(spec, **checked)


def _check_inputs(name, what, inputs, spec):
    kinds = (np.uint8, np.int32, np.int64) if spec.is_sequence else (np.uint8, np.float32)
    if inputs.dtype not in kinds or inputs.shape[1:] != spec.shape:
        raise UsageError(
            f"dataset {name!r}: its {what} are {inputs.dtype} {list(inputs.shape)}, not "
            f"{' or '.join(kind.__name__ for kind in kinds)} [samples, {', '.join(map(str, spec.shape))}]"
        )
    if inputs.dtype == np.float32 and not np.isfinite(inputs).all():
        raise UsageError(f"dataset {name!r}: its {what} hold numbers that are not finite")
    if spec.is_sequence and len(inputs) and not 0 <= inputs.min() <= inputs.max() < spec.num_tokens:
        raise UsageError(f"dataset {name!r}: its {what} hold other numbers than those from 0 to {spec.num_tokens - 1}")


def _numbered_owners(arrays):
    """The owners of both parts as numbers from 0 on, in the order of what names them, and how many they are."""
    names = [arrays[f"{part}_owners"].reshape(-1) for part in ("train", "test")]
    known, numbers = np.unique(np.concatenate(names), return_inverse=True)
    train, test = np.split(numbers, [len(names[0])])
    return {"train_owners": train, "test_owners": test}, len(known)


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


def _files(name, reader, folder, patterns=None, parts=_TRAIN_OR_NOT):
    """What torchvision's class `reader` reads, with the arguments in `parts` for the one and the other part, from files with
    the given patterns below --data_dir, by default all in `folder`, in which it unpacks what it downloads."""
    return decoded.Torchvision(name, folder, patterns or (f"{folder}/*",), reader, parts)


def _register_images(files, shape, num_classes, mean, std):
    """Register images that torchvision reads."""
    register(files.name, Spec(shape, num_classes, functools.partial(_read_images, files), 255, mean, std))


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
_BALANCED = {part: {"split": "balanced", **which} for part, which in _TRAIN_OR_NOT.items()}
_EMNIST_FILES = ("EMNIST/raw/gzip.zip", "EMNIST/raw/emnist-balanced-*")
_MNIST = _files("mnist", "MNIST", "MNIST/raw")
_FASHION_MNIST = _files("fashion_mnist", "FashionMNIST", "FashionMNIST/raw")
_EMNIST = _files("emnist", "EMNIST", "EMNIST/raw", _EMNIST_FILES, _BALANCED)
_KMNIST = _files("kmnist", "KMNIST", "KMNIST/raw")
_SVHN = _files("svhn", "SVHN", "", ("t*_32x32.mat",), {part: {"split": part} for part in _TRAIN_OR_NOT})
_USPS = _files("usps", "USPS", "", ("usps*.bz2",))
_CIFAR10 = _files("cifar10", "CIFAR10", "cifar-10-batches-py", ("cifar-10-python.tar.gz", "cifar-10-batches-py/*"))
_CIFAR100 = _files("cifar100", "CIFAR100", "cifar-100-python", ("cifar-100-python.tar.gz", "cifar-100-python/*"))
_DOMAINS = domains.Domains.of("domains", _MNIST, _USPS, _SVHN)
_HALF = (0.5,) * 3
_CHARACTERS = len(leaf.CHARACTERS)

register("digits", Spec((1, 8, 8), 10, _digits, 16, (0.3054,), (0.3761,)))
register("heart_disease", Spec((13,), 2, _heart_disease, num_owners=4))
_register_images(_MNIST, _GREY, 10, (0.1307,), (0.3081,))
_register_images(_FASHION_MNIST, _GREY, 10, (0.2860,), (0.3530,))
_register_images(_EMNIST, _GREY, 47, (0.1751,), (0.3332,))  # as torchvision gives them, on their side (transposed)
_register_images(_KMNIST, _GREY, 10, (0.1918,), (0.3483,))
_register_images(_SVHN, _COLOUR, 10, _SVHN_MEAN, _SVHN_STD)
_register_images(_CIFAR10, _COLOUR, 10, _CIFAR10_MEAN, _CIFAR10_STD)
_register_images(_CIFAR100, _COLOUR, 100, _CIFAR100_MEAN, _CIFAR100_STD)
# from 0 to 1 as in LEAF and Reddi et al. (ICLR 2021)
register("femnist", Spec(_GREY, 62, functools.partial(decoded.read, leaf.FEMNIST), 255, (0.0,), (1.0,), many_owners=True))
register(
    "shakespeare",
    Spec(
        (leaf.LENGTH,), _CHARACTERS, functools.partial(decoded.read, leaf.SHAKESPEARE), many_owners=True, num_tokens=_CHARACTERS
    ),
)
# from -1 to 1 as FedBN's digits (Li et al., ICLR 2021)
register("domains", Spec(_COLOUR, 10, functools.partial(decoded.read, _DOMAINS), 255, _HALF, _HALF, num_owners=3))
