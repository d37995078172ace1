"""Shows a partition: labels by client, as a table and as a picture."""

import pathlib

import numpy as np

from federated.data.datasets import Dataset
from federated.data.partition import ClientSplit
from federated.options import UsageError

PICTURES = (".png", ".svg", ".pdf")


def label_counts(data: Dataset, splits: list[ClientSplit]) -> np.ndarray:
    """int [clients, labels]: each client's number of training and validation samples of each label."""
    owned = [np.concatenate([each.train, each.val]) for each in splits]
    return np.array([np.bincount(data.train_labels[samples], minlength=data.spec.num_classes) for samples in owned])


def table(data: Dataset, splits: list[ClientSplit]) -> str:
    """A row for each client, and one of sums: label counts, then numbers of training, validation and test samples."""
    from tabulate import tabulate  # a launch does without

    sizes = np.array([[len(each.train), len(each.val), len(each.test)] for each in splits])
    numbers = np.hstack([label_counts(data, splits), sizes])
    rows = [[client, *row] for client, row in enumerate(numbers.tolist())] + [["all", *numbers.sum(axis=0).tolist()]]
    headers = ["client", *map(str, range(data.spec.num_classes)), "train", "validation", "test"]
    return tabulate(rows, headers=headers, tablefmt="github")


def save_picture(data: Dataset, splits: list[ClientSplit], title: str, path: pathlib.Path) -> None:
    """Write a heat map of the label counts to `path`, whose suffix names the format."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    counts = label_counts(data, splits)
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
