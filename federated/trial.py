"""A trial: its directory, which is all that is known of it.

OUTPUT_DIR/<sweep>/<md5 of hparams>/trial_<seed>/          one trial: logs, lock, checkpoint, failed.json, events
…/trial_<seed>/client_<i>/results.json, done               one client's results; done is written last
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

from federated import algorithms
from federated.files import write_atomically
from federated.lock import Lock, Locked, Owner, read_lock
from federated.settings import Settings, write_sweep_file


def hparams_hash(hparams: dict) -> str:
    return hashlib.md5(json.dumps(hparams, sort_keys=True).encode()).hexdigest()


# Files of a trial's directory
RESULTS, DONE, FAILED, MODEL = "results.json", "done", "failed.json", "model.pt"
CHECKPOINTS = CHECKPOINT, PREVIOUS, DAMAGED = "checkpoint.npz", "checkpoint.previous.npz", "checkpoint.damaged.npz"
EVENTS = "events.out.tfevents.*.trial"  # TensorBoard looks for names that begin so
# All that a trial writes there: nothing else is ever deleted
_OWN_FILES = re.compile(
    "|".join(map(re.escape, (RESULTS, DONE, FAILED, MODEL, *CHECKPOINTS)))
    + f"|{fnmatch.translate(EVENTS)}"
    + r"|(server|client_process_\d+)\.log|\.[a-z.]+\.[0-9a-f]+\.tmp"
)


class Diverged(Exception):
    """A loss is no longer a finite number."""


NOT_LAUNCHED, INCOMPLETE, RUNNING, COMPLETE = "Not launched", "Incomplete", "Running", "Done"
QUEUED = "Queued"  # a launcher's queue tells; there is nothing on disk


@dataclasses.dataclass(frozen=True)
class Trial:
    """One trial: what it computes and where."""

    settings: Settings
    hparams: dict
    hparams_seed: int
    trial_seed: int
    directory: pathlib.Path

    def client_directory(self, client: int) -> pathlib.Path:
        return self.directory / f"client_{client}"

    def log(self, role: str) -> pathlib.Path:
        return self.directory / f"{role}.log"

    def is_done(self) -> bool:
        return all(path.with_name(DONE).exists() and path.exists() for path in self._results())

    def cut_results(self) -> list[pathlib.Path]:
        """The results.json of a trial that is done which are not whole, by their first and last byte: all of them are read
        where they are collected."""
        return [path for path in self._results() if not _is_braced(path)]

    def _results(self):
        return [self.client_directory(client) / RESULTS for client in range(self.settings.num_clients)]

    def state(self) -> str:
        """NOT_LAUNCHED, INCOMPLETE, RUNNING or COMPLETE, by what is on disk now."""
        if not self.directory.exists():
            return NOT_LAUNCHED
        if self.is_done():
            return COMPLETE
        owner = read_lock(self.directory)
        return RUNNING if owner is not None and owner.may_live() else INCOMPLETE

    def server_arguments(self) -> list[str]:
        """The command line of the trial's server, but for how it is run (address, processes, data)."""
        options = {
            **{name: value for name, value in dataclasses.asdict(self.settings).items() if value is not None},
            "hparams": json.dumps(self.hparams),
            "hparams_seed": self.hparams_seed,
            "output_dir": self.directory,
            "trial_seed": self.trial_seed,
        }
        return [part for name, value in sorted(options.items()) for part in (f"--{name}", str(value))]

    def description(self) -> dict:
        """How results.json tells which trial it is of."""
        shown = ("dataset", "model_arch", "algorithm")
        return {
            **{name: getattr(self.settings, name) for name in shown},
            "hparams_seed": self.hparams_seed,
            "trial_seed": self.trial_seed,
            **self.hparams,
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

    def prepare(self):
        """Make the directories of the trial and note its sweep's settings."""
        write_sweep_file(self.directory.parent.parent, self.settings)
        for client in range(self.settings.num_clients):
            self.client_directory(client).mkdir(parents=True, exist_ok=True)

    def delete(self):
        """Delete the files this trial made, and its directories where nothing else is left in them. Raises Locked."""
        if self.directory.is_symlink() or not self.directory.is_dir():
            return
        lock = Lock(self.directory)
        directories = self._directories()
        for directory in directories:
            for path in directory.iterdir():
                if _OWN_FILES.fullmatch(path.name) and not path.is_dir():
                    path.unlink()
        lock.release()
        for directory in reversed(directories):
            with contextlib.suppress(OSError):
                directory.rmdir()

    def _directories(self):
        """The trial's own directories that exist: no link is followed."""
        below = [path for path in self.directory.glob("client_*") if path.is_dir() and not path.is_symlink()]
        return [self.directory, *below]

    def remove_half_written(self):
        """Remove what a process that was killed had not finished writing."""
        for directory in self._directories():
            for path in directory.glob(".*.tmp"):
                path.unlink(missing_ok=True)

    def record_failure(self, role: str, reason: str, log_lines: list[str] = ()):
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
            last = json.loads((self.directory / FAILED).read_text())
            return [*last.pop("earlier"), last]
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return []

    def check_not_taken_over(self):
        """Raises Locked where another process has taken over the lock that this one held."""
        owner = read_lock(self.directory)
        if owner is not None and owner != Owner.this_process():
            raise Locked(f"{str(self.directory)!r} was taken over by {owner}")

    def forget_attempts(self):
        """Once the trial is done: remove what only unfinished ones need. Their history is in the results."""
        for name in (FAILED, *CHECKPOINTS):
            (self.directory / name).unlink(missing_ok=True)

    def write_results(self, client: int, results: dict):
        """Write results.json of one client, whole, and then its done."""
        directory = self.client_directory(client)
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(directory / RESULTS, json.dumps(results, allow_nan=False) + "\n")
        write_atomically(directory / DONE, "")


def _is_braced(path: pathlib.Path) -> bool:
    try:
        with open(path, "rb") as file:
            first = file.read(1)
            file.seek(-2, os.SEEK_END)
            return (first, file.read()) == (b"{", b"}\n")
    except OSError:
        return False
