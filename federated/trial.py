"""A trial and its directory, which holds everything that is known of it.

OUTPUT_DIR/<sweep>/<md5 of hparams>/hparams.json     the hyper-parameter set and its number
OUTPUT_DIR/<sweep>/<md5 of hparams>/trial_<seed>/    one trial: logs, lock, checkpoint, failed.json, event file
…/trial_<seed>/results.json                          settings, seeds, hyper-parameters, curves by round, provenance
…/trial_<seed>/clients.npz                           the metrics of each client by round
…/trial_<seed>/done                                  written last: the trial is done once it exists
"""

import contextlib
import dataclasses
import fnmatch
import hashlib
import json
import math
import os
import pathlib
import re
import time
import typing

import numpy as np

from federated.files import open_regular, read_regular, write_atomically
from federated.lock import Holder, Lock, LockedError, is_held, read_lock
from federated.search import Space
from federated.settings import Settings, write_sweep_file


def hparams_hash(hparams: dict) -> str:
    """The name of a hyper-parameter set's directory: 32 hexadecimal digits."""
    return hashlib.md5(json.dumps(hparams, sort_keys=True).encode()).hexdigest()


def trial_path(job_dir: pathlib.Path, trial_seed: int) -> pathlib.Path:
    """The directory of a trial. That of its hyper-parameter set is OUTPUT_DIR / `Settings.name` / `hparams_hash`."""
    return job_dir / f"trial_{trial_seed}"


HPARAMS = "hparams.json"  # in the directory of a hyper-parameter set
# Files of a trial's directory
RESULTS, CLIENTS, DONE, FAILED, MODEL = "results.json", "clients.npz", "done", "failed.json", "model.pt"
CHECKPOINTS = CHECKPOINT, PREVIOUS, DAMAGED = "checkpoint.npz", "checkpoint.previous.npz", "checkpoint.damaged.npz"
KEPT = "checkpoint.kept.npz"  # of a done trial: its state after the last round, from which it resumes for more
EVENTS = "events.out.tfevents.*.trial"  # TensorBoard looks for names that begin so
_MAX_FAILED_BYTES = 1 << 24
# All files that a trial writes; no other file is ever deleted
_OWN_FILES = re.compile(
    "|".join(map(re.escape, (RESULTS, CLIENTS, DONE, FAILED, MODEL, *CHECKPOINTS, KEPT)))
    + f"|{fnmatch.translate(EVENTS)}"
    + r"|(server|client_process_\d+)\.log|clients\.\d+\.npz|\.[a-z.]+\.[0-9a-f]+\.tmp"
)


class DivergedError(Exception):
    """A loss is no longer a finite number."""


NOT_LAUNCHED, INCOMPLETE, RUNNING, COMPLETE = "Not launched", "Incomplete", "Running", "Done"
FAILED_FOR_GOOD = "Failed"  # it diverged, and would diverge again
QUEUED = "Queued"  # only the launcher's queue knows; nothing on disk says so


@dataclasses.dataclass(frozen=True)
class Trial:
    """One trial: its settings, hyper-parameters, seed and directory."""

    settings: Settings
    hparams: dict
    hparams_seed: int
    trial_seed: int
    directory: pathlib.Path
    space: Space | None = None  # the search space that a launch took the hyper-parameters from
    may_get_more_rounds: bool = False  # by a later rung, so it keeps its last checkpoint

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
        """True if there are results of all rounds."""
        return self.rounds_done() >= self.settings.rounds

    def rounds_done(self) -> float:
        return rounds_done(self.directory)

    def rounds_kept(self) -> int:
        """The number of rounds from which it can resume although it is done: its results have a checkpoint beside them."""
        done = self.rounds_done()
        return int(done) if 0 < done < math.inf and (self.directory / KEPT).is_file() else 0

    def broken_results(self) -> list[pathlib.Path]:
        """The result files of a done trial that are missing or truncated. Looks at their first and last bytes only;
        collect_results.py checks all of them."""
        return [
            self.directory / name
            for name, (start, end, end_bytes) in _FRAMES.items()
            if not _is_framed(self.directory / name, start, end, end_bytes)
        ]

    def state(self) -> str:
        """NOT_LAUNCHED, INCOMPLETE, RUNNING, COMPLETE or FAILED_FOR_GOOD, by what is on disk now."""
        if not self.directory.exists():
            return NOT_LAUNCHED
        if self.is_done():
            return COMPLETE
        if is_held(self.directory):
            return RUNNING
        return FAILED_FOR_GOOD if self.has_failed() else INCOMPLETE

    def has_failed(self) -> bool:
        """True if the last attempt failed in a way in which every further one would."""
        failures = self.failures()
        return bool(failures) and failures[-1].get("is_final") is True

    def server_options(self) -> dict:
        """The options that tell the trial's server what to compute, {name: value}."""
        return {
            **dataclasses.asdict(self.settings),
            "hparams": self.hparams,
            "hparams_seed": self.hparams_seed,
            "output_dir": self.directory,
            "trial_seed": self.trial_seed,
        }

    def description(self) -> dict:
        """The entries of results.json that identify the trial."""
        return {
            "settings": dataclasses.asdict(self.settings),
            "hparams_seed": self.hparams_seed,
            "hparams": self.hparams,
            "trial_seed": self.trial_seed,
        }

    def identity(self) -> dict:
        """Everything that the results depend on, {name: value}."""
        return {
            **self.settings.values(),
            "hparams": self.hparams,
            "hparams_seed": self.hparams_seed,
            "trial_seed": self.trial_seed,
        }

    def prepare(self) -> None:
        """Make the directory of the trial and write its sweep's settings and its hyper-parameters."""
        write_sweep_file(self.sweep_dir, self.settings)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.note_hparams()

    def note_hparams(self) -> None:
        """Write the hyper-parameters and their number into the directory of their set."""
        self.job_dir.mkdir(parents=True, exist_ok=True)
        if not (self.job_dir / HPARAMS).exists():
            known = {"hparams_seed": self.hparams_seed, "hparams": self.hparams}
            write_atomically(self.job_dir / HPARAMS, json.dumps(known) + "\n")

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
        """Remove files that a killed process had not finished writing."""
        for path in self.directory.glob(".*.tmp"):
            path.unlink(missing_ok=True)

    def record_failure(self, role: str, reason: str, log_lines: typing.Sequence[str] = (), is_final: bool = False) -> None:
        """Write failed.json: which process ended the trial, why, the last lines of its log, and the earlier failures.
        `is_final`: every further attempt would fail in the same way."""
        record = {
            "role": role,
            "reason": reason,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "log": list(log_lines),
            "is_final": is_final,
            "earlier": self.failures(),
        }
        write_atomically(self.directory / FAILED, json.dumps(record, indent=1) + "\n")

    def failures(self) -> list[dict]:
        """The failures of the attempts at this trial, as record_failure writes them, the first one first."""
        try:
            last = json.loads(read_regular(self.directory / FAILED, _MAX_FAILED_BYTES))
            return [*last.pop("earlier"), last]
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return []

    def check_not_taken_over(self) -> None:
        """Raises LockedError if another process has taken over this one's lock."""
        holder = read_lock(self.directory)
        if holder is not None and holder != Holder.this_process():
            raise LockedError(f"{str(self.directory)!r} was taken over by {holder}")

    def forget_attempts(self, keep_checkpoint: bool = True) -> None:
        """Remove the files that only an unfinished trial needs; the results have their history. The checkpoint after the last
        round stays if `keep_checkpoint`."""
        names = (FAILED, *CHECKPOINTS, *([] if keep_checkpoint else [KEPT]))
        for path in (*(self.directory / name for name in names), *self.directory.glob("clients.[0-9]*.npz")):
            path.unlink(missing_ok=True)

    def extras(self) -> dict[str, list[pathlib.Path]]:
        """{option: the files that the trial has written because of it}."""
        return {"save_model": list(self.directory.glob(MODEL)), "tensorboard": list(self.directory.glob(EVENTS))}

    def write_results(self, results: dict, clients: dict[str, np.ndarray]) -> None:
        """Write clients.npz and results.json, each whole or not at all, and then `done`. Earlier results of fewer rounds stay
        valid until the new results.json gets its name; until then `clients_path` returns their file."""
        done, present = self.rounds_done(), self.directory / CLIENTS

        def write(file: typing.BinaryIO) -> None:
            np.savez_compressed(file, allow_pickle=False, **clients)
            if 0 < done < self.settings.rounds and clients_path(self.directory, int(done)) == present:
                with contextlib.suppress(FileNotFoundError):
                    os.replace(present, _clients_of(self.directory, int(done)))

        write_atomically(self.directory / CLIENTS, write)
        write_atomically(self.directory / RESULTS, json.dumps(results, allow_nan=False) + "\n")
        write_atomically(self.directory / DONE, "")


def failure_line(failure: dict) -> str:
    """One line on a failure that `Trial.failures` lists: the process, the reason, and the last line of its log."""
    log = failure.get("log")
    last = [str(line) for line in log[-1:]] if isinstance(log, list) else []
    text = ": ".join([f"{failure.get('role', 'a process')} {failure.get('reason', 'failed')}", *last])
    return text.encode(errors="replace").decode()  # JSON may hold half a surrogate pair, which UTF-8 cannot


def clients_path(directory: pathlib.Path, rounds: int) -> pathlib.Path:
    """The file of the clients' metrics for results of `rounds` rounds: not clients.npz while longer results replace these."""
    path = _clients_of(directory, rounds)
    return path if path.exists() else directory / CLIENTS


def _clients_of(directory: pathlib.Path, rounds: int) -> pathlib.Path:
    return directory / f"clients.{rounds}.npz"


def rounds_done(directory: pathlib.Path) -> float:
    """The number of rounds of the results in a trial's directory: 0 if it is not done, infinity if they cannot be read, which
    collect_results.py reports. Reads only the settings, which come first in results.json."""
    if not (directory / DONE).is_file():
        return 0
    try:
        with open_regular(directory / RESULTS) as file:
            start = file.read(_MAX_SETTINGS_BYTES).decode()
        settings, _ = json.JSONDecoder().raw_decode(start, start.index("{", 1))
        return int(settings["rounds"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return math.inf


_MAX_SETTINGS_BYTES = 1 << 14


def sets_there(sweep_dir: pathlib.Path) -> dict[str, set[int]]:
    """{name of a hyper-parameter set's directory: the seeds of its trials} of all sets in a sweep's directory."""
    found: dict[str, set[int]] = {}
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(sweep_dir) as entries:
        for entry in entries:
            if _JOB_DIR.fullmatch(entry.name) and entry.is_dir():
                trials = map(_TRIAL_DIR.fullmatch, os.listdir(entry.path))
                found[entry.name] = {int(trial[1]) for trial in trials if trial is not None}
    return found


_JOB_DIR, _TRIAL_DIR = re.compile("[0-9a-f]{32}"), re.compile("trial_(0|[1-9][0-9]*)")


def trial_seed_of(directory: pathlib.Path) -> int:
    """The seed of the trial in a directory. Raises ValueError if the directory is no trial's."""
    if (name := _TRIAL_DIR.fullmatch(directory.name)) is None:
        raise ValueError(f"{str(directory)!r} is not the directory of a trial")
    return int(name[1])


def remove_job_dir(job_dir: pathlib.Path) -> None:
    """Remove the directory of a hyper-parameter set whose trials were deleted. Raises OSError if something is left in it."""
    (job_dir / HPARAMS).unlink(missing_ok=True)
    job_dir.rmdir()


def read_hparams(job_dir: pathlib.Path) -> tuple[int, dict] | None:
    """The number and the hyper-parameters of the set in a directory; None if its file is missing or invalid."""
    try:
        known = json.loads(read_regular(job_dir / HPARAMS, _MAX_HPARAMS_BYTES))
        seed, hparams = known["hparams_seed"], known["hparams"]
        return (seed, hparams) if type(seed) is int and hparams_hash(hparams) == job_dir.name else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


_MAX_HPARAMS_BYTES = 1 << 20


# The first bytes of a complete file, the first bytes of its end, and the end's length; a zip file ends in a record
_FRAMES = {RESULTS: (b"{", b"}\n", 2), CLIENTS: (b"PK\x03\x04", b"PK\x05\x06", 22)}


def _is_framed(path: pathlib.Path, start: bytes, end: bytes, end_bytes: int) -> bool:
    try:
        with open_regular(path) as file:
            first = file.read(len(start))
            file.seek(-end_bytes, os.SEEK_END)
            return first == start and file.read(len(end)) == end
    except OSError:
        return False
