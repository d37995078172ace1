"""Messages and tensors between a trial's server and its client processes.

A message is a small JSON object, sent as bytes over a `multiprocessing.connection`. Tensors lie in Memory: on one machine
that is a file without a name which both sides map, so a message only says that a row is ready; between machines each
side has a Memory of its own and the rows a message names follow it. Nothing that comes from a socket is unpickled.

A dead peer is an end of file at once, a silent one is told by the time it was last heard.
"""

import contextlib
import hashlib
import json
import math
import mmap
import os
import pathlib
import secrets
import selectors
import socket
import stat
import sys
import tempfile
import threading
import time
from multiprocessing import AuthenticationError, BufferTooShort, reduction
from multiprocessing.connection import Client as connect_to
from multiprocessing.connection import Listener

import numpy as np

from federated.options import UsageError

KEY_VARIABLE = "FEDERATED_KEY"
MAX_MESSAGE_BYTES = 1 << 20


class PeerLost(Exception):
    """The other side of a channel is gone, silent, or does not speak the protocol."""


class Memory:
    """Named float32 matrices in one mapping, each a numpy array and an attribute: memory.broadcast, memory.updates, …

    shapes: {name: (rows, columns)}. The server of a trial makes the mapping with `shared=True` and hands its `fd` on;
    untouched rows take no memory.
    """

    def __init__(self, shapes: dict[str, tuple[int, int]], shared: bool = False, fd: int | None = None):
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
        """One row as bytes. Raises PeerLost where there is none: the name came from a message."""
        if name not in self.shapes or not isinstance(row, int) or not 0 <= row < self.shapes[name][0]:
            raise PeerLost(f"a message names row {row!r} of {name!r}, which this trial does not have")
        return memoryview(getattr(self, name)[row]).cast("B")


def _nameless_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("federated")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


class Channel:
    """One end of a connection. Sending is safe from several threads."""

    def __init__(self, connection):
        self._connection = connection
        self._lock = threading.Lock()
        self.local = _is_local(connection)
        self.memory = None

    def fileno(self):
        return self._connection.fileno()

    def send(self, message: dict, rows=()):
        """Send `message`, and with it each (name, row) of `rows`. Raises PeerLost."""
        try:
            with self._lock:
                if self.local or not rows:
                    self._connection.send_bytes(json.dumps(message).encode())
                    return
                self._connection.send_bytes(json.dumps({**message, "rows": rows}).encode())
                for name, row in rows:
                    self._connection.send_bytes(self.memory.row_bytes(name, row))
        except OSError as error:
            raise PeerLost(f"the connection broke ({error.strerror or error})") from error

    def receive(self) -> dict:
        """The next message; the rows that came with it are in memory by then. Raises PeerLost."""
        try:
            message = json.loads(self._connection.recv_bytes(MAX_MESSAGE_BYTES))
            if not isinstance(message, dict):
                raise PeerLost("it sent something that is no message")
            for name, row in message.pop("rows", ()):
                expected = self.memory.row_bytes(name, row)
                if self._connection.recv_bytes_into(expected) != len(expected):
                    raise PeerLost(f"it sent a row of {name!r} that is too short")
            return message
        except (EOFError, ConnectionError) as error:
            raise PeerLost("it closed the connection") from error
        except (OSError, ValueError, TypeError, RecursionError, BufferTooShort) as error:
            raise PeerLost(f"it sent something that is no message ({str(error)[:200]})") from error

    def send_memory(self, memory: Memory, peer_pid: int):
        """Hand over the mapping that both sides then share; the other side calls receive_memory."""
        self.memory = memory
        if self.local:
            reduction.send_handle(self._connection, memory.fd, peer_pid)

    def receive_memory(self, shapes: dict) -> Memory:
        fd = reduction.recv_handle(self._connection) if self.local else None
        self.memory = Memory({name: tuple(shape) for name, shape in shapes.items()}, fd=fd)
        if fd is not None:
            os.close(fd)  # the mapping keeps the file
        return self.memory

    def close(self):
        self._connection.close()


def _is_local(connection):
    with socket.socket(fileno=os.dup(connection.fileno())) as duplicate:
        if duplicate.family == socket.AF_UNIX:
            return True
        duplicate.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        duplicate.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return False


class Hub:
    """The server's end of all channels."""

    def __init__(self, channels: list[Channel], timeout: float, sign_of_life):
        """sign_of_life() is called for every message, so that who watches the server knows of long rounds."""
        self.channels = channels
        self.timeout = timeout
        self._sign_of_life = sign_of_life
        self._heard = [time.monotonic()] * len(channels)
        self._selector = selectors.DefaultSelector()
        for process, channel in enumerate(channels):
            self._selector.register(channel, selectors.EVENT_READ, process)

    def expect(self, processes):
        """Count the silence of `processes` from now on: they have just been given something to do."""
        for process in processes:
            self._heard[process] = time.monotonic()

    def receive(self, waited_for) -> tuple[int, dict]:
        """The next message of any process, with its number.

        Raises PeerLost, which names the process, when one is gone or one of `waited_for` is silent for `timeout` seconds.
        """
        while True:
            now = time.monotonic()
            silent = min(waited_for, key=self._heard.__getitem__)
            remaining = self._heard[silent] + self.timeout - now
            ready = self._selector.select(max(0, remaining))
            if not ready and remaining <= 0:
                raise PeerLost(f"client process {silent} was silent for {self.timeout:g} s")
            for key, _ in ready:
                process = key.data
                try:
                    message = self.channels[process].receive()
                except PeerLost as error:
                    raise PeerLost(f"client process {process} is lost: {error}") from error
                self._heard[process] = time.monotonic()
                self._sign_of_life()
                if message.keys() != {"alive"}:
                    return process, message

    def close(self):
        self._selector.close()
        for channel in self.channels:
            channel.close()


class Door:
    """Where client processes knock: a Unix socket in a private directory, or HOST:PORT with a key from the environment."""

    def __init__(self, address: str | None):
        """Raises UsageError where the address cannot be had or the key is missing."""
        self._directory = None
        if address is not None and is_remote(address):
            self.address, key, place = address, key_from_environment(), _host_and_port(address)
        else:
            self.address = place = address or unix_address(str(os.getpid()))
            self._directory = pathlib.Path(place).parent
            _make_private(self._directory)
            pathlib.Path(place).unlink(missing_ok=True)  # of a server that was killed
            key = secrets.token_hex(32).encode()
            with open(os.open(self._directory / KEY, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(key)
        try:
            self._listener = Listener(place, backlog=128, authkey=key)
        except OSError as error:
            raise UsageError(f"cannot listen at {self.address}: {error.strerror or error}") from error

    def admit(self, count: int, timeout: float) -> list[tuple[Channel, dict]]:
        """Wait for `count` processes; each channel comes with the first message it sent, in the order of their number.

        A process that names no number gets the next free one. Raises PeerLost, naming who is missing, after `timeout`
        seconds without a newcomer.
        """
        joined: dict[int, tuple[Channel, dict]] = {}
        waiting = selectors.DefaultSelector()
        waiting.register(self._listener._listener._socket, selectors.EVENT_READ)
        with waiting:
            while len(joined) < count:
                missing = [process for process in range(count) if process not in joined]
                if not waiting.select(timeout):
                    names = ", ".join(map(str, missing))
                    raise PeerLost(f"client process {names} did not join within {timeout:g} s")
                try:
                    channel = Channel(self._listener.accept())
                    hello = channel.receive()
                except (AuthenticationError, PeerLost, OSError, EOFError) as error:
                    print(f"refused a connection: {error}", file=sys.stderr, flush=True)
                    continue
                process = hello.get("process")
                process = missing[0] if process is None else process
                if process not in missing:
                    channel.send({"refused": f"client process {process} is not one of the missing {missing}"})
                    channel.close()
                    continue
                joined[process] = channel, hello
        return [joined[process] for process in range(count)]

    def close(self):
        """Close the door and leave nothing of it on disk."""
        with contextlib.suppress(OSError):
            self._listener.close()
        if self._directory is not None:
            remove_socket(self.address)


SOCKET, KEY = "socket", "key"


def unix_address(name: str) -> str:
    """The address of a socket in a directory of this user's own. `name` tells it from others; the path is short, as a
    socket's has to be, and always the same, so that what a killed server leaves is found by the next."""
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
    return os.path.join(tempfile.gettempdir(), f"federated-{os.getuid()}-{digest}", SOCKET)


def _make_private(directory):
    """Raises UsageError where others could get at what lies in `directory`."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = directory.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise UsageError(f"the socket's directory {str(directory)!r} is open to other users: remove it or name another")


def remove_socket(address: str):
    """Remove what a door leaves behind, and nothing else: the directory may be the user's."""
    directory = pathlib.Path(address).parent
    for path in (pathlib.Path(address), directory / KEY):
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        directory.rmdir()


def knock(address: str, process: int | None, timeout: float) -> Channel:
    """Connect to a server's door, waiting up to `timeout` seconds for it to open. Raises PeerLost or UsageError."""
    remote = is_remote(address)
    place = _host_and_port(address) if remote else address
    deadline = time.monotonic() + timeout
    while True:
        try:
            key = key_from_environment() if remote else (pathlib.Path(address).parent / KEY).read_bytes()
            channel = Channel(connect_to(place, authkey=key))
            break
        except AuthenticationError as error:
            raise UsageError(
                f"the server at {address} has another key: set {KEY_VARIABLE} to the same on both sides"
            ) from error
        except (OSError, EOFError) as error:
            if time.monotonic() > deadline:
                raise PeerLost(f"no server answered at {address} within {timeout:g} s ({error})") from error
            time.sleep(0.01)
    channel.send({"process": process, "pid": os.getpid(), "host": socket.gethostname()})
    return channel


def is_remote(address: str) -> bool:
    return "/" not in address


def _host_and_port(address):
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def key_from_environment() -> bytes:
    """The key of a HOST:PORT address. Raises UsageError where there is none."""
    key = os.environ.get(KEY_VARIABLE, "")
    if not key:
        raise UsageError(f"a HOST:PORT address needs a key: set {KEY_VARIABLE} to the same secret on both sides")
    return key.encode()
