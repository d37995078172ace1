"""The data sets: images as byte arrays that every process of the machine maps, decoded once.

A data set is one entry of REGISTRY. torchvision reads and, where asked to, downloads the files; it is imported for that
alone, since it takes a second to import.
"""

import dataclasses
import os
import pathlib
import shutil
import tempfile

import numpy as np

from federated.options import UsageError

SHIPPED = pathlib.Path(__file__).parent / "data"


@dataclasses.dataclass(frozen=True)
class Spec:
    """What is known of a data set before it is read."""

    shape: tuple[int, int, int]  # channels, height, width
    num_classes: int
    scale: float  # the largest value of a pixel
    mean: tuple[float, ...]  # of each channel of the training set, in units of scale
    std: tuple[float, ...]
    torchvision: str | None = None  # the class that reads it; None: the file ships with the project
    folder: str = ""  # where that class looks for its files, below --data_dir


REGISTRY = {
    "digits": Spec((1, 8, 8), 10, 16, (0.3054,), (0.3761,)),
    "mnist": Spec((1, 28, 28), 10, 255, (0.1307,), (0.3081,), "MNIST", "MNIST/raw"),
    "fashion_mnist": Spec((1, 28, 28), 10, 255, (0.2860,), (0.3530,), "FashionMNIST", "FashionMNIST/raw"),
    "cifar10": Spec((3, 32, 32), 10, 255, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), "CIFAR10", "cifar-10-batches-py"),
    "cifar100": Spec((3, 32, 32), 100, 255, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), "CIFAR100", "cifar-100-python"),
}


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Images are uint8 [samples, channels, height, width], labels int64 [samples]."""

    spec: Spec
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def load(name: str, data_dir: str) -> Dataset:
    """The data set `name`, decoded now if it never was on this machine.

    Raises UsageError, with the folder to put the files into, where they are missing and cannot be downloaded.
    """
    spec = REGISTRY[name]
    if spec.torchvision is None:
        with np.load(SHIPPED / f"{name}.npz") as arrays:
            return _dataset(spec, arrays)
    decoded = pathlib.Path(data_dir) / "decoded" / name
    if not decoded.is_dir():
        _decode(name, spec, pathlib.Path(data_dir), decoded)
    return _dataset(spec, {key: np.load(decoded / f"{key}.npy", mmap_mode="c") for key in _ARRAYS})


_ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")


def _dataset(spec, arrays):
    train_images, train_labels, test_images, test_labels = (arrays[key] for key in _ARRAYS)
    return Dataset(
        spec,
        train_images.reshape(-1, *spec.shape),
        train_labels.astype(np.int64),
        test_images.reshape(-1, *spec.shape),
        test_labels.astype(np.int64),
    )


def _decode(name, spec, data_dir, decoded):
    """Have torchvision read the files, after a download where they are missing, and write them as arrays."""
    from torchvision import datasets

    reader = getattr(datasets, spec.torchvision)
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        parts = {"train": reader(data_dir, train=True, download=True), "test": reader(data_dir, train=False)}
    except Exception as error:  # a reader of torchvision fails in many ways
        raise UsageError(
            f"dataset {name!r} could be neither read from {str(data_dir / spec.folder)!r} nor downloaded "
            f"({' '.join(str(error).split()) or repr(error)}): put torchvision's {spec.torchvision} files there, or name "
            "another --data_dir"
        ) from error
    try:
        _write(parts, decoded)
    except OSError as error:
        raise UsageError(
            f"cannot write decoded data to {str(decoded)!r} ({error.strerror}): name another --data_dir"
        ) from error


def _write(parts, decoded):
    """Write the arrays and then give their directory its name. Where another process was first, its arrays stay."""
    decoded.parent.mkdir(exist_ok=True)
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{decoded.name}-", dir=decoded.parent))
    try:
        for part, read in parts.items():
            images = np.asarray(read.data)
            if images.ndim == 4:  # torchvision has colours last
                images = images.transpose(0, 3, 1, 2)
            np.save(temporary / f"{part}_images.npy", np.ascontiguousarray(images))
            np.save(temporary / f"{part}_labels.npy", np.asarray(read.targets, dtype=np.uint8))
        temporary.chmod(0o755)
        try:
            os.rename(temporary, decoded)
        except OSError:
            if not decoded.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
