"""The metrics of a trial, round by round."""

import math
import time
from collections.abc import Callable

import numpy as np

from federated import algorithms
from federated.data.partition import ClientSplit
from federated.learning.evaluation import EvaluationPlan
from federated.learning.log_lines import RoundLine
from federated.metrics import over_clients, weighted_mean
from federated.settings import Settings
from federated.trial import DivergedError

SELECTED = "selected_model"  # the weights of the best round so far [size], in Record.arrays


class Record:
    """The metrics of a trial, round by round, in `arrays`, which are part of a checkpoint. They start as NaN, which stays if a
    client did not train or nothing was evaluated. Index 0 of a metric is the loss, 1 the accuracy; entry r of an evaluation
    is of the model after r rounds.
    """

    def __init__(
        self,
        settings: Settings,
        plan: EvaluationPlan,
        splits: list[ClientSplit],
        broadcast_bytes: Callable[[], np.ndarray],
        update_bytes: int,
        selected_size: int = 0,
    ) -> None:
        """`broadcast_bytes` returns what the server sends to all participants of each round together [rounds], and an update
        that arrives has `update_bytes`. With `selected_size`, the size of the flat model, the record keeps the weights of the
        best round so far."""
        self.rounds, self._plan = settings.rounds, plan
        self._broadcast_bytes, self._update_bytes = broadcast_bytes, update_bytes
        self._personal = algorithms.load(settings.algorithm).personal
        self._samples = [[len(getattr(each, name)) for each in splits] for name in ("train", "val", "test")]
        self._val_samples = self._samples[1]
        self.arrays = {name: np.full(shape, np.nan) for name, shape in self.shapes(settings).items()}
        if selected_size:
            self.arrays[SELECTED] = np.zeros(selected_size, np.float32)
        self._printed = 0.0

    @staticmethod
    def shapes(settings: Settings) -> dict[str, tuple[int, ...]]:
        """The shapes of the metrics in `arrays`, which are float64."""
        return {
            "train": (settings.rounds, 2, settings.num_clients),
            "test": (settings.rounds + 1, 2),
            "val": (settings.rounds + 1, 2, settings.num_clients),
            "local_test": (settings.rounds + 1, 2, settings.num_clients),
            "step_time": (settings.rounds,),
        }

    def evaluated(self, round: int, rows: np.ndarray, weights: np.ndarray) -> None:
        """Record the metrics of the model after `round` rounds, whose `weights` are [size], from the memory's rows of
        evaluation. Raises DivergedError if one is not finite."""
        metrics = self._plan.metrics(rows)
        for name, values in metrics.items():
            self.arrays[name][round] = values
        if not (np.isfinite(metrics["test"]).all() and np.isfinite(metrics["val"]).all()):
            raise DivergedError(f"diverged: the loss after round {round} of {self.rounds} is not finite")
        if SELECTED in self.arrays and round == self.best_round():
            self.arrays[SELECTED][:] = weights
        if time.monotonic() - self._printed > 1 or round == self.rounds:
            self._printed = time.monotonic()
            val_acc = float(weighted_mean(metrics["val"][1], self._val_samples))
            print(RoundLine(round, self.rounds, metrics["test"][1], val_acc), flush=True)

    def best_round(self) -> int | None:
        """The round with the best validation accuracy, weighted by samples, the earliest of equal ones; None before any. The
        initial model does not count, as in collect_results.py."""
        accuracies = weighted_mean(self.arrays["val"][1:, 1].T, self._val_samples)
        return None if np.isnan(accuracies).all() else int(np.nanargmax(accuracies)) + 1

    def trained(self, round: int, reports: dict[int, dict], seconds: float) -> None:
        """Record what those that trained in `round`, counted from 0, reported. Raises DivergedError if a number is not
        finite."""
        for client, report in reports.items():
            self.arrays["train"][round, :, client] = report["loss"], report["accuracy"]
        self.arrays["step_time"][round] = seconds
        if not all(math.isfinite(report["loss"]) and math.isfinite(report["accuracy"]) for report in reports.values()):
            raise DivergedError(f"diverged: a training loss of round {round + 1} of {self.rounds} is not finite")

    def over_clients(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """The curves over the rounds from `start` to before `stop`, counted from 0: see metrics.over_clients."""
        first = {"train": start, "val": start + 1, "test": start + 1, "local_test": start + 1}
        train, val, test, local_test = (  # contiguous, as the bits of a sum depend on the memory's order
            np.ascontiguousarray(self.arrays[name][row : row + stop - start].T) for name, row in first.items()
        )
        return over_clients(train, val, test, local_test, self._samples, self._personal)

    def trained_clients(self) -> list[int]:
        """The numbers of the clients that have trained so far."""
        return np.flatnonzero(np.isfinite(self.arrays["train"][:, 0]).any(axis=0)).tolist()

    def curves(self) -> dict[str, np.ndarray]:
        """The curves for results.json, [rounds] each: see metrics.over_clients; entry r is of round r + 1."""
        trained = np.isfinite(self.arrays["train"][:, 0]).sum(axis=1)
        return {
            **self.over_clients(0, self.rounds),
            "round_seconds": self.arrays["step_time"],
            "bytes_sent": self._broadcast_bytes() + trained * self._update_bytes,
        }

    def results(self) -> dict:
        """The measurements for results.json. A value that does not exist is None."""
        return {
            "initial_test_loss": float(self.arrays["test"][0, 0]),
            "initial_test_acc": float(self.arrays["test"][0, 1]),
            "curves": {
                name: [None if math.isnan(value) else value for value in values.tolist()]
                for name, values in self.curves().items()
            },
        }

    def clients(self) -> dict[str, np.ndarray]:
        """The arrays of clients.npz: float32 [clients, rounds] for each metric, NaN if there is none, and int64 [clients] for
        each number of samples."""
        after = {name: self.arrays[name][1:] for name in ("val", "local_test")}  # without the initial model
        metrics = {"train": self.arrays["train"], "val": after["val"], "local": after["local_test"]}
        return {
            **{
                f"{name}_{what}": np.ascontiguousarray(values[:, place].T, np.float32)
                for name, values in metrics.items()
                for place, what in enumerate(("loss", "acc"))
            },
            **{f"{name}_samples": np.array(sizes, np.int64) for name, sizes in zip(("train", "val", "local"), self._samples)},
        }
