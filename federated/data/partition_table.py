"""Shows a partition: labels by client, as a table and as a picture."""

import pathlib

import numpy as np

from federated.data.datasets import Dataset
from federated.data.partition import Part
from federated.options import UsageError

PICTURES = (".png", ".svg", ".pdf")


def label_counts(data: Dataset, parts: list[Part]) -> np.ndarray:
    """int [clients, labels]: each client's number of training and validation samples of each label."""
    owned = [np.concatenate([part.train, part.val]) for part in parts]
    return np.array([np.bincount(data.train_labels[samples], minlength=data.spec.num_classes) for samples in owned])


def table(data: Dataset, parts: list[Part]) -> str:
    """A row for each client, and one of sums: label counts, then numbers of training, validation and test samples."""
    from tabulate import tabulate  # a launch does without

    sizes = np.array([[len(part.train), len(part.val), len(part.test)] for part in parts])
    numbers = np.hstack([label_counts(data, parts), sizes])
    rows = [[client, *row] for client, row in enumerate(numbers.tolist())] + [["all", *numbers.sum(axis=0).tolist()]]
    headers = ["client", *map(str, range(data.spec.num_classes)), "train", "validation", "test"]
    return tabulate(rows, headers=headers, tablefmt="github")


def save_picture(data: Dataset, parts: list[Part], title: str, path: pathlib.Path) -> None:
    """Write a heat map of the label counts to `path`, whose suffix names the format."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    counts = label_counts(data, parts)
    clients, labels = counts.shape
    figure = Figure(figsize=(min(4 + labels / 4, 16), min(2 + clients / 4, 16)), layout="constrained")
    axes = figure.add_subplot(xlabel="label", ylabel="client", title=title)
    image = axes.imshow(counts, cmap="Blues", vmin=0, aspect="auto", interpolation="nearest")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, label="training samples")
    try:
        figure.savefig(path)
    except OSError as error:
        raise UsageError(f"--picture: {str(path)!r} cannot be written ({error.strerror})") from error
