"""Writes the rounds of a trial as an event file of TensorBoard. Importing this needs the package tensorboard."""

import math
import os
import socket
import time

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from tensorboard.summary.writer.record_writer import RecordWriter

from federated.learning.record import Record
from federated.trial import EVENTS, Trial


class Events:
    """The event file of one run of a trial. It replaces those of earlier runs, as the record has their rounds."""

    def __init__(self, trial: Trial, record: Record) -> None:
        """Create the file and write the trial's settings and hyper-parameters."""
        for path in trial.directory.glob(EVENTS):
            path.unlink()
        name = EVENTS.replace("*", f"{time.time():.0f}.{socket.gethostname()}.{os.getpid()}")
        self._writer = RecordWriter((trial.directory / name).open("xb"))
        self._record, self._written = record, 0
        self._add(file_version="brain.Event:2")
        # Runs that agree in all of these are one row of the HParams tab, which shows the means over them
        known = trial.identity() | trial.hparams
        for name in ("hparams", "hparams_seed", "trial_seed"):
            del known[name]
        self._add(summary=hparams_pb({name: value for name, value in known.items() if value is not None}))
        self._writer.flush()

    def write(self, round: int) -> None:
        """Write the rounds up to `round`, counted from 1, that it has not written yet."""
        if round <= self._written:
            return
        columns = self._record.over_clients(self._written, round)
        for step, values in enumerate(zip(*map(np.ndarray.tolist, columns.values())), start=self._written + 1):
            self._add_scalars(step, dict(zip(columns, values)))
        self._writer.flush()
        self._written = round

    def finish(self) -> None:
        """Write the remaining rounds, and the values of the round with the best validation accuracy, which tables show."""
        self.write(self._record.rounds)
        best = self._record.best_round()
        assert best is not None, "the last round is always evaluated"
        columns = self._record.over_clients(best - 1, best)
        self._add_scalars(best, {f"best/{name}": columns[name][0] for name in ("val_acc", "accuracy")})
        self._writer.flush()

    def _add_scalars(self, step, values) -> None:
        """Write `values`, {name: value}, and leave out NaN."""
        summary = Summary()
        for name, value in values.items():
            if not math.isnan(value):
                summary.value.add(tag=name, simple_value=value)
        self._add(step=step, summary=summary)

    def _add(self, **content) -> None:
        self._writer.write(Event(wall_time=time.time(), **content).SerializeToString())
