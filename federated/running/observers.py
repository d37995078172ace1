"""Observers of a trial's rounds, for all that is not learning: times, checkpoints, event files, the best model."""

import time
import typing
from collections.abc import Callable

import numpy as np
import torch

from federated import models
from federated.data.datasets import Spec
from federated.files import write_atomically
from federated.learning.flat import Flat
from federated.learning.record import SELECTED, Record
from federated.running import checkpoint
from federated.settings import ServerOptions
from federated.trial import CHECKPOINT, KEPT, MODEL, Trial

# The largest share of a trial's time that checkpoints may take, unless each round makes one
CHECKPOINT_SHARE = 0.05


class Observer:
    """Three hooks on the loop over rounds."""

    def start(self) -> None:
        """All client processes have joined."""

    def after_round(self, round: int) -> None:
        """Round `round`, counted from 1, is over: the global model has made its step."""

    def finish(self) -> None:
        """All rounds are over and the client processes are dismissed. `done` is written after this."""


class Clock(Observer):
    """Counts the seconds of a trial by stage of the server and, within the rounds, by stage of the client processes."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def note(self, stage: str) -> None:
        """Count the time since the last note as that of `stage`."""
        now = time.perf_counter()
        self.seconds[stage] = now - self._last
        self._last = now

    def add(self, seconds: dict[str, float]) -> None:
        """Count more seconds of each stage."""
        for stage, more in seconds.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + more

    def start(self) -> None:
        self.note("join")

    def finish(self) -> None:
        self.note("rounds")


Snapshot = Callable[[int], tuple[dict, dict[str, np.ndarray]]]


class Checkpoints(Observer):
    """Saves a checkpoint after a round if the last one is old enough. A trial that is given more rounds resumes from the one
    after the last round. It is saved before that round's model is evaluated, as a longer trial may not evaluate it."""

    def __init__(self, trial: Trial, snapshot: Snapshot, options: ServerOptions, clock: Clock, first: int) -> None:
        """snapshot(round) returns the state and the arrays to save; this run begins after round `first`. With
        `checkpoint_seconds` 0, save after each round."""
        self._trial, self._snapshot, self._clock, self._first = trial, snapshot, clock, first
        self._every_seconds, self._keep = options.checkpoint_seconds, options.keep_checkpoints
        self._next = time.monotonic() + self._every_seconds

    def start(self) -> None:
        if self._first == self._trial.settings.rounds:  # no round follows
            self.after_round(self._first)

    def after_round(self, round: int) -> None:
        is_kept = self._keep and round == self._trial.settings.rounds
        if time.monotonic() < self._next and not is_kept:
            return
        self._trial.check_not_taken_over()
        begin = time.monotonic()
        checkpoint.save(self._trial.directory, *self._snapshot(round), name=KEPT if is_kept else CHECKPOINT)
        took = time.monotonic() - begin
        if self._every_seconds:  # a large model with many clients may take long to write
            self._next = time.monotonic() + max(self._every_seconds, took / CHECKPOINT_SHARE)
        self._clock.add({"checkpoint": took})


class EventFile(Observer):
    """Writes TensorBoard's event file while the trial runs."""

    def __init__(self, trial: Trial, record: Record) -> None:
        from federated.learning.tensorboard_events import Events  # needs the optional package tensorboard

        self._events = Events(trial, record)

    def after_round(self, round: int) -> None:
        self._events.write(round - 1)  # the model after `round` rounds is evaluated in the next one

    def finish(self) -> None:
        self._events.finish()


class BestModel(Observer):
    """Writes the model of the best round as a plain state_dict, which torch loads without this project."""

    def __init__(self, trial: Trial, record: Record, spec: Spec) -> None:
        self._trial, self._record, self._spec = trial, record, spec

    def finish(self) -> None:
        trial = self._trial
        model = models.build(trial.settings.model_arch, self._spec, trial.hparams["dropout_rate"], 0)
        Flat(model).weights.copy_(torch.from_numpy(self._record.arrays[SELECTED]))
        tensors: dict[str, typing.Any] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        trial.check_not_taken_over()
        write_atomically(trial.directory / MODEL, lambda file: torch.save(tensors, file))
