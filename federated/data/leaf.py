"""The data of LEAF (Caldas et al., 2018), as its preprocessing writes them below --data_dir, which may be LEAF's own `data`:

    femnist/data/train/*.json, femnist/data/test/*.json, and so shakespeare/…

Each file is {"users": [user, …], "num_samples": [number, …], "user_data": {user: {"x": [sample, …], "y": [label, …]}}}.
"""

import dataclasses
import hashlib
import json
import pathlib
import string
import typing
from collections.abc import Callable

import numpy as np

from federated.data.decoded import Files, Noted, stamp_of
from federated.files import read_regular
from federated.options import UsageError, shown

MAX_BYTES = 1 << 31  # of a file; LEAF's have 100 writers each, or all of Shakespeare
LENGTH = 80  # of a sequence
CHARACTERS = (
    "\n !\"&'(),-.0123456789:;>?" + string.ascii_uppercase + "[]" + string.ascii_lowercase + "}"
)  # LEAF's, in its order
_NUMBERS = np.full(1 << 7, 255, np.uint8)  # of characters
_NUMBERS[list(map(ord, CHARACTERS))] = range(len(CHARACTERS))


@dataclasses.dataclass(frozen=True)
class Leaf(Files):
    """The train and test files of a data set. Its owners are the users in alphabetical order, whatever files they are in."""

    inputs: Callable[[list], np.ndarray]  # of a user's "x"; raises ValueError
    labels: Callable[[list], np.ndarray]  # of a user's "y"

    def array_names(self) -> tuple[str, ...]:
        return tuple(f"{part}_{what}" for part in ("train", "test") for what in ("inputs", "labels", "owners"))

    def decode(self, data_dir: pathlib.Path, temporary: pathlib.Path) -> tuple[Noted, dict[str, np.ndarray]]:
        noted: Noted = {}
        parts: dict[str, dict[str, _User]] = {"train": {}, "test": {}}
        for name, path in self.present(data_dir).items():
            part = parts[path.parent.name]
            try:
                stamp, content = stamp_of(path), read_regular(path, MAX_BYTES)
                noted[name] = {"stamp": stamp, "sha256": hashlib.sha256(content).hexdigest()}
                part |= self._users(content, part)
            except (OSError, ValueError, TypeError, OverflowError, RecursionError) as error:
                reason = error.strerror if isinstance(error, OSError) else error
                raise UsageError(f"dataset {self.name!r}: {str(path)!r} is no file of LEAF's: {reason}") from error
        for name, part in parts.items():
            if not part:
                raise UsageError(
                    f"dataset {self.name!r}: no samples are in {str(data_dir / self.folder / name)!r}: put the .json files "
                    "there that LEAF's preprocess.sh -t sample makes, or name another --data_dir"
                )
        numbers = {user: number for number, user in enumerate(sorted(parts["train"].keys() | parts["test"].keys()))}
        return noted, {name: array for part, users in parts.items() for name, array in _arrays(part, users, numbers)}

    def _users(self, content: bytes, known: dict[str, "_User"]) -> dict[str, "_User"]:
        """{user: samples} of a file. Raises ValueError if it is not of LEAF's form, or has a user that is `known`."""

        def as_arrays(value: dict) -> typing.Any:
            """A user's samples, as soon as they are read: as numbers of Python they take 40 times the memory."""
            if isinstance(value.get("x"), list) and isinstance(value.get("y"), list):
                user = _User(self.inputs(value["x"]), self.labels(value["y"]))
                if len(user.inputs) != len(user.labels):
                    raise ValueError(f"a user has {len(user.inputs)} samples and {len(user.labels)} labels")
                return user
            return value

        value = json.loads(content, object_hook=as_arrays)
        found = value.get("user_data") if isinstance(value, dict) else None
        if not (isinstance(found, dict) and all(isinstance(each, _User) for each in found.values())):
            raise ValueError('it has no "user_data" of users with "x" and "y"')
        if set(value.get("users") or ()) != found.keys():
            raise ValueError('its "users" are not those of its "user_data"')
        if twice := found.keys() & known.keys():
            raise ValueError(f"user {shown(min(twice))} is in another file, too")
        return found


class _User(typing.NamedTuple):
    inputs: np.ndarray
    labels: np.ndarray


def _arrays(part: str, users: dict[str, _User], numbers: dict[str, int]) -> typing.Iterator[tuple[str, np.ndarray]]:
    names = sorted(users)
    yield f"{part}_inputs", np.concatenate([users[name].inputs for name in names])
    yield f"{part}_labels", np.concatenate([users[name].labels for name in names])
    yield f"{part}_owners", np.repeat([numbers[name] for name in names], [len(users[name].labels) for name in names])


def _pixels(images: list) -> np.ndarray:
    """uint8 [samples, 1, 28, 28] of lists of 784 numbers from 0 to 1."""
    pixels = np.array(images, dtype=np.float64).reshape(len(images), 1, 28, 28) * 255
    whole = np.rint(pixels)
    if not ((whole >= 0) & (whole <= 255) & (np.abs(pixels - whole) < 1e-3)).all():
        raise ValueError("a pixel is not one of the 256 greys from 0 to 1")
    return whole.astype(np.uint8)


def _classes(labels: list) -> np.ndarray:
    if set(map(type, labels)) - {int} or not all(0 <= label < 62 for label in labels):
        raise ValueError("a label is not a whole number from 0 to 61")
    return np.array(labels, dtype=np.uint8)


def _characters(texts: list, length: int = LENGTH) -> np.ndarray:
    """uint8 [samples, length] of texts of that length."""
    if not all(isinstance(text, str) and len(text) == length for text in texts):
        raise ValueError(f"a sample is not a text of {length} characters")
    codes = np.frombuffer("".join(texts).encode("utf-32-le"), np.uint32)
    numbers = _NUMBERS[np.minimum(codes, len(_NUMBERS) - 1)]
    if (numbers == 255).any():
        raise ValueError(f"it has the character {chr(codes[numbers == 255][0])!r}, which is none of LEAF's {len(CHARACTERS)}")
    return numbers.reshape(len(texts), length)


def _next_characters(texts: list) -> np.ndarray:
    return _characters(texts, 1)[:, 0]


def _files(name: str, inputs: Callable[[list], np.ndarray], labels: Callable[[list], np.ndarray]) -> Leaf:
    folder = f"{name}/data"
    return Leaf(name, folder, (f"{folder}/train/*.json", f"{folder}/test/*.json"), inputs, labels)


FEMNIST = _files("femnist", _pixels, _classes)
SHAKESPEARE = _files("shakespeare", _characters, _next_characters)
