"""Messages and tensors between a trial's server and its client processes.

A message is a small JSON object, sent as bytes over a `multiprocessing.connection`. Tensors lie in SharedMatrices: on one
machine both sides map the same file, so a message only says that a row is ready; between machines each side has a copy, and
the rows that a message names follow it. Nothing that comes from a socket is unpickled.

A dead peer is noticed at once, by the end of file; a silent one by the time since its last message.
"""

import contextlib
import json
import os
import selectors
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from multiprocessing import reduction
from multiprocessing.connection import Connection

from federated.learning.memory import SharedMatrices
from federated.options import shown
from federated.running import protocol

MAX_MESSAGE_BYTES = 1 << 20

Row = tuple[str, int]  # the name of a matrix in memory, and a row of it


class PeerLostError(Exception):
    """The other side of a channel is gone, silent, or does not speak the protocol."""


class Channel:
    """One end of a connection. Several threads may send at once.

    local   whether both ends are on one machine and share their memory
    memory  the matrices whose rows messages bring
    """

    memory: SharedMatrices

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self.local = _is_local(connection)
        self._expected: deque[tuple[dict, Sequence[Row]]] | None = None

    def fileno(self) -> int:
        return self._connection.fileno()

    def set_timeout(self, seconds: float | None) -> None:
        """Set the socket's timeout: a peer that stalls for `seconds` in the middle of a message, or does not take one, counts
        as lost; None waits forever."""
        microseconds = 0 if seconds is None else max(1, round(seconds * 1e6))
        with socket_of(self._connection) as connected:
            for direction in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                connected.setsockopt(socket.SOL_SOCKET, direction, struct.pack("ll", *divmod(microseconds, 1_000_000)))

    def expect(self, schema: dict, rows: Sequence[Row] = ()) -> None:
        """Queue the schema of the next message that the peer may send, see `matches`, and the rows that it must bring. If this
        is never called, any message is accepted."""
        if self._expected is None:
            self._expected = deque()
        self._expected.append((schema, rows))

    def send(self, message: dict, rows: Sequence[Row] = ()) -> None:
        """Send `message`, and the `rows` that it brings. Raises PeerLostError."""
        try:
            with self._lock:
                if self.local or not rows:
                    self._connection.send_bytes(json.dumps(message).encode())
                    return
                self._connection.send_bytes(json.dumps({**message, "rows": rows}).encode())
                for name, row in rows:
                    self._connection.send_bytes(self.memory.row_bytes(name, row))
        except OSError as error:
            raise PeerLostError(f"the connection broke ({error.strerror or error})") from error

    def receive(self) -> dict:
        """Return the next message, once the rows that it brings are in memory. Raises PeerLostError."""
        try:
            message = json.loads(self._connection.recv_bytes(MAX_MESSAGE_BYTES))
            if not isinstance(message, dict):
                raise PeerLostError("it sent something that is no message")
            rows = [(name, row) for name, row in message.pop("rows", ())]
            if self._expected is not None and message != protocol.ALIVE:
                self._check(message, rows)
            for name, row in rows:
                expected = self.memory.row_bytes(name, row)
                received = self._connection.recv_bytes(len(expected))
                if len(received) != len(expected):
                    raise PeerLostError(f"it sent a row of {name!r} that is too short")
                expected[:] = received
            return message
        except (EOFError, ConnectionError) as error:
            raise PeerLostError("it closed the connection") from error
        except BlockingIOError as error:
            raise PeerLostError("it stopped in the middle of a message") from error
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise PeerLostError(f"it sent something that is no message ({str(error)[:200]})") from error

    def _check(self, message, rows) -> None:
        if not self._expected:
            raise PeerLostError(f"it sent a message that it was not asked for: {shown(message)}")
        schema, due_rows = self._expected.popleft()
        if not matches(message, schema):
            raise PeerLostError(f"it sent {shown(message)} although {{{', '.join(schema)}}} was due")
        if rows != ([] if self.local else list(due_rows)):
            raise PeerLostError(f"it sent rows {shown(rows)} with {shown(message)}, but was asked for others")

    def send_memory(self, memory: SharedMatrices) -> None:
        """Use `memory` for rows, and hand its file over to a local peer, which calls receive_memory. Raises PeerLostError."""
        self.memory = memory
        if self.local:
            assert memory.fd is not None, "only shared memory can be handed over"
            try:
                reduction.send_handle(self._connection, memory.fd, None)  # the pid is for Windows
            except OSError as error:
                raise PeerLostError(f"the connection broke ({error.strerror or error})") from error

    def receive_memory(self, shapes: dict) -> SharedMatrices:
        """Return the memory that the server has sent, or a copy of its own if the server is on another machine."""
        fd = reduction.recv_handle(self._connection) if self.local else None
        self.memory = SharedMatrices({name: tuple(shape) for name, shape in shapes.items()}, fd=fd)
        if fd is not None:
            os.close(fd)  # the mapping keeps the file
        return self.memory

    def close(self) -> None:
        self._connection.close()


def matches(value: object, schema: object) -> bool:
    """Check what came from a socket. A dict of schemas asks for the same keys, a type for a value of just that type, a
    function has to return True for the value, and anything else has to equal it."""
    if isinstance(schema, dict):
        if not isinstance(value, dict) or value.keys() != schema.keys():
            return False
        return all(matches(value[key], schema[key]) for key in schema)
    if isinstance(schema, type):
        return type(value) is schema
    if callable(schema):
        return schema(value)
    return type(value) is type(schema) and value == schema


@contextlib.contextmanager
def socket_of(connection: Connection) -> Iterator[socket.socket]:
    """Lend the socket of a connection, which stays open."""
    connected = socket.socket(fileno=connection.fileno())
    try:
        yield connected
    finally:
        connected.detach()


def _is_local(connection) -> bool:
    with socket_of(connection) as connected:
        if connected.family == socket.AF_UNIX:
            return True
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return False


class RunningTime:
    """A clock of the seconds in which this process could run, and others could answer. It does not count time in which the
    container was paused, the machine slept, or all processes were stopped."""

    STEP = 1.0  # seconds: a waiting process calls it at least as often; a longer pause counts as twice this

    def __init__(self) -> None:
        self._last, self._seconds = time.monotonic(), 0.0

    def __call__(self) -> float:
        now = time.monotonic()
        self._seconds += min(now - self._last, 2 * self.STEP)
        self._last = now
        return self._seconds


@contextlib.contextmanager
def naming(process: int) -> Iterator[None]:
    """Add the number of the client process to the text of a PeerLostError."""
    try:
        yield
    except PeerLostError as error:
        raise PeerLostError(f"client process {process} is lost: {error}") from error


class Hub:
    """The server's ends of all channels. Each channel has a silence timer."""

    def __init__(self, channels: list[Channel], timeout: float, heartbeat: Callable[[], None]) -> None:
        """`heartbeat` is called on every message, so that the launcher does not take a long round for a hang."""
        self.channels = channels
        self.timeout = timeout
        self._heartbeat = heartbeat
        self._time = RunningTime()
        self._heard = [self._time()] * len(channels)
        self._selector = selectors.DefaultSelector()
        for process, channel in enumerate(channels):
            self._selector.register(channel, selectors.EVENT_READ, process)

    def restart_timers(self, processes: Iterable[int]) -> None:
        """Restart the silence timers of `processes`, which were just given work."""
        for process in processes:
            self._heard[process] = self._time()

    def receive(self, waited_for: Collection[int]) -> tuple[int, dict]:
        """Return the next message of any process, and the number of the process.

        Raises PeerLostError, which names the process, if one is gone or one of `waited_for` is silent for `timeout` seconds.
        """
        while True:
            silent = min(waited_for, key=self._heard.__getitem__)
            remaining = self._heard[silent] + self.timeout - self._time()
            ready = self._selector.select(max(0, min(remaining, RunningTime.STEP)))
            if not ready and remaining <= 0:
                raise PeerLostError(f"client process {silent} was silent for {self.timeout:g} s")
            for key, _ in ready:
                process = key.data
                with naming(process):
                    message = self.channels[process].receive()
                self._heard[process] = self._time()
                self._heartbeat()
                if message != protocol.ALIVE:
                    return process, message

    def send(self, process: int, message: dict, rows: Sequence[Row] = ()) -> None:
        """Send to a process, see Channel.send. Raises PeerLostError, which names it."""
        with naming(process):
            self.channels[process].send(message, rows)

    def close(self) -> None:
        self._selector.close()
        for channel in self.channels:
            channel.close()
