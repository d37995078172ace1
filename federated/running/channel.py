"""Messages and tensors between a trial's server and its client processes.

A message is a small JSON object, sent as bytes over a `multiprocessing.connection`. Tensors lie in SharedMatrices: on one
machine both sides map the same file, so a message only says that a row is ready; between machines each side has a copy, and
the rows that a message names follow it. Nothing that comes from a socket is unpickled.

A dead peer is noticed at once, by the end of file; a silent one by the time since its last message.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import secrets
import selectors
import socket
import stat
import struct
import sys
import tempfile
import threading
import time
from collections import deque
from multiprocessing import AuthenticationError, reduction
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge

from federated.learning.memory import SharedMatrices
from federated.options import UsageError, shown
from federated.running import protocol

KEY_VARIABLE = "FEDERATED_KEY"
MAX_MESSAGE_BYTES = 1 << 20


class PeerLost(Exception):
    """The other side of a channel is gone, silent, or does not speak the protocol."""


class Channel:
    """One end of a connection. Sending is safe from several threads."""

    def __init__(self, connection):
        self._connection = connection
        self._lock = threading.Lock()
        self.local = _is_local(connection)
        self.memory = None
        self._expected = None

    def fileno(self):
        return self._connection.fileno()

    def limit(self, seconds: float | None):
        """Take the peer for lost where it stops in the middle of a message, or takes none, for so long; None: never."""
        microseconds = 0 if seconds is None else max(1, round(seconds * 1e6))
        with _socket_of(self._connection) as connected:
            for direction in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                connected.setsockopt(socket.SOL_SOCKET, direction, struct.pack("ll", *divmod(microseconds, 1_000_000)))

    def expect(self, form: dict, rows=()):
        """Allow the peer one more message, after those allowed before: one of this `form`, as `fits` has it, with just these
        `rows`. Who never calls this takes any message."""
        if self._expected is None:
            self._expected = deque()
        self._expected.append((form, rows))

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
            rows = [(name, row) for name, row in message.pop("rows", ())]
            if self._expected is not None and message != protocol.ALIVE:
                self._check(message, rows)
            for name, row in rows:
                expected = self.memory.row_bytes(name, row)
                received = self._connection.recv_bytes(len(expected))
                if len(received) != len(expected):
                    raise PeerLost(f"it sent a row of {name!r} that is too short")
                expected[:] = received
            return message
        except (EOFError, ConnectionError) as error:
            raise PeerLost("it closed the connection") from error
        except BlockingIOError as error:
            raise PeerLost("it stopped in the middle of a message") from error
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise PeerLost(f"it sent something that is no message ({str(error)[:200]})") from error

    def _check(self, message, rows):
        if not self._expected:
            raise PeerLost(f"it sent a message that it was not asked for: {shown(message)}")
        form, its_rows = self._expected.popleft()
        if not fits(message, form):
            raise PeerLost(f"it sent {shown(message)} where {{{', '.join(form)}}} was due")
        if rows != ([] if self.local else list(its_rows)):
            raise PeerLost(f"it sent rows {shown(rows)} with {shown(message)}, which are not those it was asked for")

    def send_memory(self, memory: SharedMatrices):
        """Hand over the mapping that both sides then share; the other side calls receive_memory. Raises PeerLost."""
        self.memory = memory
        if self.local:
            try:
                reduction.send_handle(self._connection, memory.fd, None)  # the pid is for Windows
            except OSError as error:
                raise PeerLost(f"the connection broke ({error.strerror or error})") from error

    def receive_memory(self, shapes: dict) -> SharedMatrices:
        fd = reduction.recv_handle(self._connection) if self.local else None
        self.memory = SharedMatrices({name: tuple(shape) for name, shape in shapes.items()}, fd=fd)
        if fd is not None:
            os.close(fd)  # the mapping keeps the file
        return self.memory

    def close(self):
        self._connection.close()


def fits(value, form) -> bool:
    """Whether what came from a socket has this form: a dict of forms has the same keys, a type is that of the value, a
    function is true of it, and all else is equal to it."""
    if isinstance(form, dict):
        return isinstance(value, dict) and value.keys() == form.keys() and all(fits(value[key], form[key]) for key in form)
    if isinstance(form, type):
        return type(value) is form
    if callable(form):
        return form(value)
    return type(value) is type(form) and value == form


@contextlib.contextmanager
def _socket_of(connection):
    """The socket below a connection, which stays open."""
    connected = socket.socket(fileno=connection.fileno())
    try:
        yield connected
    finally:
        connected.detach()


def _is_local(connection):
    with _socket_of(connection) as connected:
        if connected.family == socket.AF_UNIX:
            return True
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return False


@contextlib.contextmanager
def naming(process: int):
    """Have a PeerLost raised within name the client process whose channel it is of."""
    try:
        yield
    except PeerLost as error:
        raise PeerLost(f"client process {process} is lost: {error}") from error


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
                with naming(process):
                    message = self.channels[process].receive()
                self._heard[process] = time.monotonic()
                self._sign_of_life()
                if message != protocol.ALIVE:
                    return process, message

    def send(self, process: int, message: dict, rows=()):
        """Channel.send to a process. Raises PeerLost, which names it."""
        with naming(process):
            self.channels[process].send(message, rows)

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
            self.address, self._key, place = address, key_from_environment(), _host_and_port(address)
        else:
            self.address = place = address or unix_address(str(os.getpid()))
            self._key = secrets.token_hex(32).encode()
            self._directory = pathlib.Path(place).parent
        try:
            if self._directory is not None:
                _make_private(self._directory)
                pathlib.Path(place).unlink(missing_ok=True)  # of a server that was killed
                with open(os.open(self._directory / KEY, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                    file.write(self._key)
            self._socket = _listen(place)
            self._socket.setblocking(False)
        except OSError as error:
            raise UsageError(f"cannot listen at {self.address}: {error.strerror or error}") from error

    def admit(self, count: int, timeout: float) -> list[Channel]:
        """Wait for `count` processes; their channels, in the order of their numbers.

        A process that names no number gets the next free one. Raises PeerLost, naming who is missing, after `timeout`
        seconds in which none joined. Strangers are no hindrance: each newcomer shows in a thread of its own that it has
        the key, and where NEWCOMERS are at it, the next one takes the place of the one that has been at it for longest.
        """
        joined: dict[int, Channel] = {}
        newcomers: dict[int, _Newcomer] = {}  # by file descriptor, the oldest first
        deadline = time.monotonic() + timeout
        refused = 0
        with selectors.DefaultSelector() as waiting, contextlib.ExitStack() as ends:
            told, tells = (ends.enter_context(end) for end in socket.socketpair())
            waiting.register(self._socket, selectors.EVENT_READ)
            waiting.register(told, selectors.EVENT_READ)
            try:
                while len(joined) < count:
                    missing = [process for process in range(count) if process not in joined]
                    ready = [key.fileobj for key, _ in waiting.select(max(0, deadline - time.monotonic()))]
                    if not ready and time.monotonic() >= deadline:
                        names = ", ".join(map(str, missing))
                        raise PeerLost(f"client process {names} did not join within {timeout:g} s")
                    if self._socket in ready and len(newcomers) == NEWCOMERS:
                        min(newcomers.values(), key=lambda newcomer: newcomer.has_key).turn_away()  # soon `told` tells
                    elif self._socket in ready:
                        with contextlib.suppress(BlockingIOError, ConnectionError):  # it is gone again
                            newcomer = _Newcomer(self._socket.accept()[0], self._key, tells)
                            newcomers[newcomer.channel.fileno()] = newcomer
                            newcomer.start()
                    if told not in ready:
                        continue
                    newcomer = newcomers.pop(int.from_bytes(told.recv(4)))
                    process = newcomer.hello.get("process", missing[0])
                    if newcomer.error is not None:
                        error = newcomer.error
                    elif type(process) is not int or process not in missing:
                        error = f"client process {shown(process)} is not one of the missing {missing}"
                        newcomer.say(protocol.refusal(error))
                    else:
                        newcomer.channel.limit(timeout)
                        joined[process] = newcomer.channel
                        deadline = time.monotonic() + timeout
                        continue
                    newcomer.channel.close()
                    refused += 1
                    if refused <= TOLD_OF:
                        print(f"refused a connection: {error}", file=sys.stderr, flush=True)
            except BaseException:
                for channel in joined.values():
                    channel.close()
                raise
            finally:
                for newcomer in newcomers.values():
                    newcomer.turn_away()
                for newcomer in newcomers.values():
                    newcomer.join()
                    newcomer.channel.close()
        return [joined[process] for process in range(count)]

    def close(self):
        """Close the door and leave nothing of it on disk."""
        self._socket.close()
        if self._directory is not None:
            remove_socket(self.address)


NEWCOMERS = 100  # at most, who have not shown yet that they have the key
TOLD_OF = 20  # refused connections are told of, so that nobody can fill the log


class _Newcomer(threading.Thread):
    """Who has connected and has yet to show that it has the key and to say which process it is. As soon as either is done or
    has failed, its file descriptor is sent to `tells`."""

    def __init__(self, connected: socket.socket, key: bytes, tells: socket.socket):
        super().__init__(daemon=True)
        self._connection = Connection(connected.detach())
        self.channel = Channel(self._connection)
        self._key, self._tells = key, tells
        self.has_key, self.hello, self.error = False, {}, None

    def run(self):
        try:
            deliver_challenge(self._connection, self._key)
            self.has_key = True
            answer_challenge(self._connection, self._key)
            self.hello = self.channel.receive()
        except Exception as error:  # the library's handshake may fail in any way on what a stranger sends
            self.error = " ".join(str(error).split())[:200] or type(error).__name__
        self._tells.sendall(self.channel.fileno().to_bytes(4))

    def turn_away(self):
        """Have the thread end at once."""
        with contextlib.suppress(OSError), _socket_of(self._connection) as connected:
            connected.shutdown(socket.SHUT_RDWR)

    def say(self, message):
        with contextlib.suppress(PeerLost):
            self.channel.send(message)


def _listen(place):
    backlog = 1024  # so that a crowd of strangers keeps nobody from connecting
    if not isinstance(place, str):
        return socket.create_server(place, backlog=backlog)
    listening = socket.socket(socket.AF_UNIX)
    try:
        listening.bind(place)
        listening.listen(backlog)
    except OSError:
        listening.close()
        raise
    return listening


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
            channel = _connect(place, key, max(1.0, deadline - time.monotonic()))
            break
        except AuthenticationError as error:
            raise UsageError(
                f"the server at {address} has another key: set {KEY_VARIABLE} to the same on both sides"
            ) from error
        except (AssertionError, ValueError) as error:
            raise UsageError(f"what answers at {address} is no server of a trial") from error
        except (OSError, EOFError) as error:
            if time.monotonic() > deadline:
                raise PeerLost(f"no server answered at {address} within {timeout:g} s ({error})") from error
            time.sleep(0.01)
    channel.send(protocol.hello(process))
    return channel


def _connect(place, key, timeout):
    """A channel to a server that has shown that it has the key. Raises OSError, EOFError, or what the handshake does."""
    if isinstance(place, str):
        with socket.socket(socket.AF_UNIX) as connecting:
            connecting.connect(place)
            connection = Connection(connecting.detach())
    else:
        connecting = socket.create_connection(place, timeout)
        connecting.settimeout(None)
        connection = Connection(connecting.detach())
    channel = Channel(connection)
    try:
        channel.limit(timeout)
        answer_challenge(connection, key)
        deliver_challenge(connection, key)
        channel.limit(None)
    except BaseException:
        channel.close()
        raise
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
