"""Files that were read once, kept as arrays that every process of the machine maps. They know which files they were made from
and are made anew if these change, or if they are not whole themselves.

    DATA_DIR/decoded/<data set>/    or below the user's cache directory, if DATA_DIR may not be written to
        <part>_images.npy, <part>_labels.npy, …
        made.json                   names, stamps and digests of the files that were read, and of these arrays
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
import typing

import numpy as np

from federated.files import read_regular, write_atomically
from federated.options import UsageError

MADE = "made.json"
_MAX_BYTES = 1 << 20  # of made.json


Noted = dict[str, dict]  # {name of a file: its stamp and digest}


@dataclasses.dataclass(frozen=True)
class Files:
    """The files of a data set below --data_dir."""

    name: str  # of the data set
    folder: str  # which messages name
    patterns: tuple[str, ...]  # of all files that may be read, below --data_dir

    def array_names(self) -> tuple[str, ...]:
        """Those of the arrays that `decode` makes."""
        raise NotImplementedError

    def decode(self, data_dir: pathlib.Path, temporary: pathlib.Path) -> tuple[Noted, dict[str, np.ndarray]]:
        """What is noted of the files that were read, and the arrays. `temporary` is an empty directory that goes. Raises
        UsageError if the files cannot be read, OSError if they cannot be written to `temporary`."""
        raise NotImplementedError

    def present(self, data_dir: pathlib.Path) -> dict[str, pathlib.Path]:
        """{name below data_dir: path} of the files that are there."""
        found = {path for pattern in self.patterns for path in data_dir.glob(pattern) if path.is_file()}
        return {str(path.relative_to(data_dir)): path for path in sorted(found)}


@dataclasses.dataclass(frozen=True)
class Torchvision(Files):
    """What torchvision's class `reader` reads, and downloads if it is missing."""

    reader: str
    parts: dict[str, dict]  # {"train" or "test": what the reader is to be given for it}

    def array_names(self) -> tuple[str, ...]:
        return tuple(f"{part}_{what}" for part in self.parts for what in ("images", "labels"))

    def decode(self, data_dir: pathlib.Path, temporary: pathlib.Path) -> tuple[Noted, dict[str, np.ndarray]]:
        """Has torchvision read copies, so that the files are as they were; what was downloaded joins them."""
        noted = _copy(self, data_dir, temporary)
        try:
            parts = self.read(temporary)
        except Exception as error:  # a reader of torchvision fails in many ways
            raise UsageError(
                f"dataset {self.name!r} could be neither read from {str(data_dir / self.folder)!r} nor downloaded "
                f"({' '.join(str(error).split()) or repr(error)}): put torchvision's {self.reader} files there, or name "
                "another --data_dir"
            ) from error
        noted |= _keep_downloads(self, temporary, data_dir)
        arrays = {}
        for part, read in parts.items():
            images = np.asarray(read.data)
            if images.shape[-1] == 3:  # CIFAR's readers have colours last, SVHN's has them first
                images = images.transpose(0, 3, 1, 2)
            arrays[f"{part}_images"] = np.ascontiguousarray(images)
            arrays[f"{part}_labels"] = np.asarray(read.labels if hasattr(read, "labels") else read.targets)
        return noted, arrays

    def archives(self) -> dict[str, str]:
        """{name below --data_dir: MD5} of the files that torchvision downloads."""
        reader = self._reader()
        if hasattr(reader, "tgz_md5"):
            return {reader.filename: reader.tgz_md5}
        if hasattr(reader, "split_list"):
            return {reader.split_list[part][1]: reader.split_list[part][2] for part in self.parts}
        if hasattr(reader, "url"):
            return {f"{self.folder}/{reader.url.rpartition('/')[2]}": reader.md5}
        return {f"{self.folder}/{name}": md5 for name, md5 in reader.resources}

    def read(self, root: pathlib.Path) -> dict:
        """{part: what torchvision read}, after it has unpacked and, if they are missing, downloaded files below `root`."""
        return {part: self._reader()(root, download=True, **options) for part, options in self.parts.items()}

    def _reader(self) -> typing.Any:
        from torchvision import datasets

        return getattr(datasets, self.reader)


def read(files: Files, data_dir: str) -> dict[str, np.ndarray]:
    """{name: array} of a data set. Raises UsageError if its files can be neither read nor downloaded, or there is no place for
    the arrays."""
    root = pathlib.Path(data_dir)
    beside, cached = places = root / "decoded", _cache_of(root)
    for place in places:
        if (arrays := _load(files, root, place / files.name)) is not None:
            return arrays
    try:
        with contextlib.ExitStack() as stack:
            try:
                place = stack.enter_context(_alone(beside, files.name))
            except OSError:
                place = stack.enter_context(_alone(cached, files.name))
            arrays = _load(files, root, place / files.name)  # another process may have made them meanwhile
            if arrays is None:
                _decode(files, root, place)
                arrays = _load(files, root, place / files.name)
    except OSError as error:
        raise UsageError(
            f"cannot write decoded data to {str(error.filename or beside)!r} ({error.strerror}): name another --data_dir, or a "
            "directory for such files in XDG_CACHE_HOME"
        ) from error
    if arrays is None:
        raise UsageError(
            f"dataset {files.name!r}: its files in {str(root / files.folder)!r} change as they are read: try again"
        )
    return arrays


def _cache_of(data_dir: pathlib.Path) -> pathlib.Path:
    """The directory for arrays if `data_dir` cannot hold them."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return pathlib.Path(cache) / "fedsweep" / hashlib.sha256(os.path.realpath(data_dir).encode()).hexdigest()[:16]


@contextlib.contextmanager
def _alone(place: pathlib.Path, name: str) -> typing.Iterator[pathlib.Path]:
    """`place`, in which no other process decodes this data set meanwhile. What one left that was killed is removed. Raises
    OSError if it cannot be written to."""
    _check_permissions(place)
    place.mkdir(parents=True, exist_ok=True)
    with open(place / f".{name}.lock", "w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        for left in place.glob(f".{name}-*"):
            shutil.rmtree(left)
        yield place


def _check_permissions(directory: pathlib.Path) -> None:
    """Raise PermissionError if `directory`, or the one that it will be made in, lets nobody write. That does not bind root,
    but it is what the owner of the data wants."""
    there = next(each for each in (directory, *directory.absolute().parents) if each.exists())
    if not there.stat().st_mode & 0o222:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(there))


def _load(files: Files, data_dir: pathlib.Path, decoded: pathlib.Path) -> dict[str, np.ndarray] | None:
    """The arrays in `decoded`; None if they are not whole, or were made from files other than those in `data_dir` now. If no
    file is there any more, the arrays stand for them."""
    try:
        made = json.loads(read_regular(decoded / MADE, _MAX_BYTES))
        arrays = {name: np.load(decoded / f"{name}.npy", mmap_mode="c") for name in files.array_names()}
        here = {f"{name}.npy": decoded / f"{name}.npy" for name in arrays}
        before = json.dumps(made)
        if not _are_as_noted(here, made["arrays"]):
            return None
        present = files.present(data_dir)
        if present and not _are_as_noted(present, made["from"]):
            return None
    except (OSError, ValueError, EOFError, KeyError, TypeError, RecursionError):
        return None
    if json.dumps(made) != before:
        with contextlib.suppress(OSError):
            _check_permissions(decoded)
            write_atomically(decoded / MADE, json.dumps(made, indent=1) + "\n")
    return arrays


def _are_as_noted(paths: dict[str, pathlib.Path], noted: dict[str, dict]) -> bool:
    """True if the files have the names and the content that were noted. A file whose stamp has changed is read, and if its
    content has not, its new stamp is noted."""
    if paths.keys() != noted.keys():
        return False
    for name, path in paths.items():
        stamp = stamp_of(path)
        if stamp != noted[name]["stamp"]:
            if stamp[0] != noted[name]["stamp"][0] or _digest(path) != noted[name]["sha256"]:
                return False
            noted[name]["stamp"] = stamp
    return True


def note(path: pathlib.Path) -> dict:
    """What is noted of a file before it is read."""
    return {"stamp": stamp_of(path), "sha256": _digest(path)}


def stamp_of(path: pathlib.Path) -> list[int]:
    """Size and times of a file, which differ after any change: nobody can set the time of the last change of its inode."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _digest(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _decode(files: Files, data_dir: pathlib.Path, place: pathlib.Path) -> None:
    """Decode the files and write the arrays. Whatever happens, the arrays are whole or absent. Raises UsageError or
    OSError."""
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{files.name}-", dir=place))
    try:
        root, decoded = temporary / "files", temporary / "arrays"
        root.mkdir()
        decoded.mkdir()
        noted, made = files.decode(data_dir, root)
        write(made, decoded, noted)
        decoded.chmod(0o755)
        shutil.rmtree(place / files.name, ignore_errors=True)
        os.rename(decoded, place / files.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _copy(files: Torchvision, data_dir: pathlib.Path, root: pathlib.Path) -> dict[str, dict]:
    """Copy the files to `root`, and return what is noted of each. Where the archives are whole what was unpacked from them is
    not copied: it may be cut, or of other files."""
    from torchvision.datasets.utils import check_integrity

    archives, noted = files.archives(), {}
    are_whole = all(check_integrity(data_dir / name, md5) for name, md5 in archives.items())
    for name, path in files.present(data_dir).items():
        stamp, copy = stamp_of(path), root / name
        if are_whole and name not in archives:
            noted[name] = {"stamp": stamp, "sha256": _digest(path)}
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
        noted[name] = {"stamp": stamp, "sha256": _digest(copy)}
    return noted


def _keep_downloads(files: Torchvision, root: pathlib.Path, data_dir: pathlib.Path) -> dict[str, dict]:
    """Move what torchvision downloaded to `data_dir` if that may be written to, and return what is noted of each."""
    from torchvision.datasets.utils import check_integrity

    noted = {}
    for name, md5 in files.archives().items():
        if check_integrity(root / name, md5) and not check_integrity(data_dir / name, md5):
            digest = _digest(root / name)
            with contextlib.suppress(OSError):
                _check_permissions(data_dir / files.folder)
                (data_dir / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.move(root / name, data_dir / name)
                noted[name] = {"stamp": stamp_of(data_dir / name), "sha256": digest}
    return noted


def write(arrays: dict[str, np.ndarray], decoded: pathlib.Path, made_from: dict[str, dict]) -> None:
    """Write `arrays` into the empty directory `decoded`, with what was noted of the files that they were made from."""
    for name, array in arrays.items():
        np.save(decoded / f"{name}.npy", array)
    noted = {path.name: note(path) for path in sorted(decoded.iterdir())}
    (decoded / MADE).write_text(json.dumps({"from": made_from, "arrays": noted}, indent=1) + "\n")
