"""Checkpoints, from which a trial resumes after its processes were killed: the latest, whole or absent, and the one before it.

The file is numpy's .npz, whose members carry checksums; nothing in it is pickled.
"""

import contextlib
import json
import os
import pathlib
import struct
import typing
import zipfile

import numpy as np

from federated.files import open_regular, write_atomically
from federated.trial import CHECKPOINT, DAMAGED, KEPT, PREVIOUS

_STATE = "state"


def save(directory: pathlib.Path, state: dict, arrays: dict[str, np.ndarray], name: str = CHECKPOINT) -> None:
    """Write `arrays` and `state`, which JSON can hold, as the checkpoint `name` in `directory`. The CHECKPOINT before it is
    kept as PREVIOUS."""
    members: dict[str, typing.Any] = {_STATE: np.frombuffer(json.dumps(state).encode(), np.uint8), **arrays}

    def write(file) -> None:
        np.savez(file, **members)
        if name == CHECKPOINT:
            with contextlib.suppress(FileNotFoundError):
                os.replace(directory / CHECKPOINT, directory / PREVIOUS)

    write_atomically(directory / name, write)


def rounds_asked(directory: pathlib.Path) -> int:
    """The number of rounds that the unfinished trial of a checkpoint was started for; 0 if none can be read."""
    for name in (CHECKPOINT, PREVIOUS):  # a kill may have fallen between the two renames
        try:
            with open_regular(directory / name) as file, np.load(file, allow_pickle=False) as members:
                return int(json.loads(members[_STATE].tobytes())["trial"]["rounds"])
        except (OSError, ValueError, TypeError, KeyError, EOFError, NotImplementedError, zipfile.BadZipFile, struct.error):
            continue
    return 0


def load(directory: pathlib.Path) -> tuple[dict, dict[str, np.ndarray]] | None:
    """Return the state and arrays of the latest whole checkpoint, None if there is none. Sets damaged ones aside. Tries the
    one that the trial kept when it was done with fewer rounds last."""
    for name in (CHECKPOINT, PREVIOUS, KEPT):
        path = directory / name
        try:
            with open_regular(path) as file:
                if (member := zipfile.ZipFile(file).testzip()) is not None:
                    raise zipfile.BadZipFile(f"{member} has a wrong checksum")
                file.seek(0)
                with np.load(file, allow_pickle=False) as members:
                    arrays = {name: members[name] for name in members.files}
            return json.loads(arrays.pop(_STATE).tobytes()), arrays
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, EOFError, NotImplementedError, zipfile.BadZipFile, struct.error) as error:
            os.replace(path, directory / DAMAGED)
            print(f"{path} is damaged ({error}): it is set aside as {DAMAGED}", flush=True)
    return None
