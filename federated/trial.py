"""A trial and its directory, which holds all that is known of it.

OUTPUT_DIR/<sweep>/<md5 of hparams>/trial_<seed>/    one trial: logs, lock, checkpoint, failed.json, event file
…/trial_<seed>/results.json                          settings, seeds, hyper-parameters, curves by round, provenance
…/trial_<seed>/clients.npz                           the metrics of each client by round
…/trial_<seed>/done                                  written last: whether it exists says whether the trial is done
"""

import contextlib
import dataclasses
import fnmatch
import hashlib
import json
import os
import pathlib
import re
import time
import typing

import numpy as np

from federated import algorithms
from federated.files import open_regular, read_regular, write_atomically
from federated.lock import Lock, LockedError, Owner, is_held, read_lock
from federated.settings import Settings, write_sweep_file


def hparams_hash(hparams: dict) -> str:
    """The name of the directory of a hyper-parameter set: 32 hexadecimal digits."""
    return hashlib.md5(json.dumps(hparams, sort_keys=True).encode()).hexdigest()


def trial_path(output_dir: pathlib.Path, settings: Settings, hparams: dict, trial_seed: int) -> pathlib.Path:
    """The directory of a trial in a sweep; `Trial.job_dir` and `Trial.sweep_dir` are those above it."""
    return output_dir / settings.name / hparams_hash(hparams) / f"trial_{trial_seed}"


# Files of a trial's directory
RESULTS, CLIENTS, DONE, FAILED, MODEL = "results.json", "clients.npz", "done", "failed.json", "model.pt"
CHECKPOINTS = CHECKPOINT, PREVIOUS, DAMAGED = "checkpoint.npz", "checkpoint.previous.npz", "checkpoint.damaged.npz"
EVENTS = "events.out.tfevents.*.trial"  # TensorBoard looks for names that begin so
_MAX_FAILED_BYTES = 1 << 24
# All that a trial writes there: nothing else is ever deleted
_OWN_FILES = re.compile(
    "|".join(map(re.escape, (RESULTS, CLIENTS, DONE, FAILED, MODEL, *CHECKPOINTS)))
    + f"|{fnmatch.translate(EVENTS)}"
    + r"|(server|client_process_\d+)\.log|\.[a-z.]+\.[0-9a-f]+\.tmp"
)


class DivergedError(Exception):
    """A loss is no longer a finite number."""


NOT_LAUNCHED, INCOMPLETE, RUNNING, COMPLETE = "Not launched", "Incomplete", "Running", "Done"
QUEUED = "Queued"  # only the launcher's queue knows; nothing on disk says so


@dataclasses.dataclass(frozen=True)
class Trial:
    """One trial: what it computes and where."""

    settings: Settings
    hparams: dict
    hparams_seed: int
    trial_seed: int
    directory: pathlib.Path

    @property
    def job_dir(self) -> pathlib.Path:
        """The directory of the hyper-parameter set."""
        return self.directory.parent

    @property
    def sweep_dir(self) -> pathlib.Path:
        return self.job_dir.parent

    def log(self, role: str) -> pathlib.Path:
        return self.directory / f"{role}.log"

    def is_done(self) -> bool:
        return (self.directory / DONE).is_file()

    def broken_results(self) -> list[pathlib.Path]:
        """The result files of a done trial that are missing or cut, by their first and last bytes. collect_results.py reads
        and checks them whole."""
        return [
            self.directory / name
            for name, (start, end, end_bytes) in _FRAMES.items()
            if not _is_framed(self.directory / name, start, end, end_bytes)
        ]

    def state(self) -> str:
        """NOT_LAUNCHED, INCOMPLETE, RUNNING or COMPLETE, by what is on disk now."""
        if not self.directory.exists():
            return NOT_LAUNCHED
        if self.is_done():
            return COMPLETE
        return RUNNING if is_held(self.directory) else INCOMPLETE

    def server_options(self) -> dict:
        """The options of the trial's server that say what it computes, {name: value}."""
        return {
            **dataclasses.asdict(self.settings),
            "hparams": self.hparams,
            "hparams_seed": self.hparams_seed,
            "output_dir": self.directory,
            "trial_seed": self.trial_seed,
        }

    def description(self) -> dict:
        """What results.json says of the trial, besides what was measured."""
        return {
            "settings": dataclasses.asdict(self.settings),
            "hparams_seed": self.hparams_seed,
            "hparams": self.hparams,
            "trial_seed": self.trial_seed,
        }

    def identity(self) -> dict:
        """All that its results are a function of."""
        return {
            **dataclasses.asdict(self.settings),
            "algorithm": algorithms.canonical(self.settings.algorithm),
            "hparams": self.hparams,
            "hparams_seed": self.hparams_seed,
            "trial_seed": self.trial_seed,
        }

    def prepare(self) -> None:
        """Make the directory of the trial and write its sweep's settings."""
        write_sweep_file(self.sweep_dir, self.settings)
        self.directory.mkdir(parents=True, exist_ok=True)

    def delete(self) -> None:
        """Delete the files that this trial made, and its directory if nothing else is left in it. Raises LockedError."""
        if self.directory.is_symlink() or not self.directory.is_dir():
            return
        lock = Lock(self.directory)
        for path in self.directory.iterdir():
            if _OWN_FILES.fullmatch(path.name) and not path.is_dir():
                path.unlink()
        lock.release()
        with contextlib.suppress(OSError):
            self.directory.rmdir()

    def remove_half_written(self) -> None:
        """Remove what a process that was killed had not finished writing."""
        for path in self.directory.glob(".*.tmp"):
            path.unlink(missing_ok=True)

    def record_failure(self, role: str, reason: str, log_lines: typing.Sequence[str] = ()) -> None:
        """Write failed.json: which process ended the trial, why, the last lines of its log, and the earlier failures."""
        record = {
            "role": role,
            "reason": reason,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "log": list(log_lines),
            "earlier": self.failures(),
        }
        write_atomically(self.directory / FAILED, json.dumps(record, indent=1) + "\n")

    def failures(self) -> list[dict]:
        """How the attempts at this trial failed so far, the first one first."""
        try:
            last = json.loads(read_regular(self.directory / FAILED, _MAX_FAILED_BYTES))
            return [*last.pop("earlier"), last]
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return []

    def check_not_taken_over(self) -> None:
        """Raises LockedError if another process has taken over the lock that this one held."""
        owner = read_lock(self.directory)
        if owner is not None and owner != Owner.this_process():
            raise LockedError(f"{str(self.directory)!r} was taken over by {owner}")

    def forget_attempts(self) -> None:
        """Once the trial is done: remove what only unfinished ones need. Their history is in the results."""
        for name in (FAILED, *CHECKPOINTS):
            (self.directory / name).unlink(missing_ok=True)

    def write_results(self, results: dict, clients: dict[str, np.ndarray]) -> None:
        """Write clients.npz and results.json, each whole or absent, and then the mark that the trial is done."""
        write_atomically(self.directory / CLIENTS, lambda file: np.savez_compressed(file, allow_pickle=False, **clients))
        write_atomically(self.directory / RESULTS, json.dumps(results, allow_nan=False) + "\n")
        write_atomically(self.directory / DONE, "")


# How a whole file begins, how its end begins, and how many bytes that end has; of a zip file, the last record
_FRAMES = {RESULTS: (b"{", b"}\n", 2), CLIENTS: (b"PK\x03\x04", b"PK\x05\x06", 22)}


def _is_framed(path: pathlib.Path, start: bytes, end: bytes, end_bytes: int) -> bool:
    try:
        with open_regular(path) as file:
            first = file.read(len(start))
            file.seek(-end_bytes, os.SEEK_END)
            return first == start and file.read(len(end)) == end
    except OSError:
        return False
