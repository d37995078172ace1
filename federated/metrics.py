"""Means over clients. A trial records them for each round, and the collector checks them."""

import typing

import numpy as np
from numpy.typing import ArrayLike


def weighted_mean(values: ArrayLike, weights: ArrayLike) -> np.ndarray:
    """Weighted mean over axis 0, ignoring NaN; NaN if a column has no value. values [clients, …]; weights [clients] or a prefix
    of that shape."""
    values, weights = np.asarray(values, dtype=float), np.asarray(weights)
    has_none = np.isnan(values)
    weights = np.where(has_none, 0, weights.reshape(weights.shape + (1,) * (values.ndim - weights.ndim)))
    with np.errstate(invalid="ignore"):
        return (np.where(has_none, 0, values) * weights).sum(axis=0) / weights.sum(axis=0)


def over_clients(
    train: np.ndarray,
    val: np.ndarray,
    test: np.ndarray,
    local_test: np.ndarray,
    samples: typing.Sequence[ArrayLike],
    personal: bool,
) -> dict[str, np.ndarray]:
    """The curves of a trial over its rounds, {name: [rounds]}, from train_loss to accuracy; reporting.collect.COLUMNS says what
    each is. train, val and local_test [clients, 2, rounds] are losses, then accuracies; test is [2, rounds]; samples
    [3, clients] are those of train, val and local_test. `personal` says whether clients have models of their own; `accuracy`
    is then theirs, else the global model's."""
    accuracies, each = local_test[:, 1], np.ones(len(local_test))
    stacked = np.stack([train, val, local_test, local_test], axis=1)  # one call, as servers make it in each round
    train, val, local, equal = weighted_mean(stacked, np.stack([*samples, each], axis=1))
    columns = {
        "train_loss": train[0],
        "train_acc": train[1],
        "val_loss": val[0],
        "val_acc": val[1],
        "test_loss": test[0],
        "test_acc": test[1],
        "local_loss": local[0],
        "local_acc_weighted": local[1],
        "local_acc_mean": equal[1],
        "local_acc_worst": np.fmin.reduce(accuracies, axis=0),
        "local_acc_std": np.sqrt(weighted_mean((accuracies - equal[1]) ** 2, each)),
    }
    return columns | {"accuracy": columns["local_acc_weighted" if personal else "test_acc"]}
