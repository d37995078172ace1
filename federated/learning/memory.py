"""The tensors that a trial's server and its client processes exchange."""

import math
import mmap
import os
import tempfile

import numpy as np


class SharedMatrices:
    """Named float32 matrices in one mapping. Each is a numpy array and an attribute; a trial has

    broadcast   [broadcasts, size]: the vectors that the server sends to every participant
    updates     [client processes, uploads * size]: the update of the participant that a process trains
    clients     [clients, RowLayout.length]: each client's state between rounds
    evaluation  [blocks, 2 * BLOCK]: losses of a block's samples, then whether each was classified correctly

    On one machine all processes of a trial map the same file. On another machine a process has a copy, and the channel
    carries the rows that change. Untouched rows take no memory.
    """

    broadcast: np.ndarray
    updates: np.ndarray
    clients: np.ndarray
    evaluation: np.ndarray

    def __init__(self, shapes: dict[str, tuple[int, int]], shared: bool = False, fd: int | None = None) -> None:
        """Lay out matrices of these `shapes`, {name: (rows, columns)}. If `shared`, they lie in a new nameless file, whose `fd`
        other processes map; if `fd` is given, in that file; else in this process's memory."""
        self.shapes = shapes
        starts, size = {}, 0
        for name, shape in shapes.items():
            starts[name] = size
            size += -(-4 * math.prod(shape) // mmap.PAGESIZE) * mmap.PAGESIZE
        if shared:
            fd = _nameless_file()
            os.ftruncate(fd, size)
        self.fd = fd
        self._mapping = mmap.mmap(-1 if fd is None else fd, max(size, mmap.PAGESIZE))
        for name, shape in shapes.items():
            setattr(self, name, np.ndarray(shape, np.float32, self._mapping, starts[name]))

    def row_bytes(self, name: str, row: int) -> memoryview:
        """Return one row as bytes. Raises ValueError if there is none: a peer may have sent any name."""
        if name not in self.shapes or not isinstance(row, int) or not 0 <= row < self.shapes[name][0]:
            raise ValueError(f"this trial has no row {row!r} of {name!r}")
        return memoryview(getattr(self, name)[row]).cast("B")


def _nameless_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("federated")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
