"""How client processes join a trial.

Those that a launcher starts on one machine join through a socket that they and the server inherit. It has no file and no name,
so no other trial can have the same. Others connect to an address: a Unix socket in a private directory, or HOST:PORT with a
key from the environment. A handshake proves that both sides have the key.
"""

import contextlib
import os
import pathlib
import re
import secrets
import select
import selectors
import socket
import stat
import sys
import threading
import time
import typing
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge

from federated.lock import is_at, try_lock
from federated.options import UsageError, shown
from federated.running import protocol
from federated.running.channel import Channel, PeerLostError, RunningTime, socket_of
from federated.running.processes import inherited
from federated.running.temporary import socket_directory

KEY_VARIABLE = "FEDERATED_KEY"
TRIAL_VARIABLE = "FEDERATED_TRIAL"  # the id of the trial that a launcher started this process for
JOIN_VARIABLE = "FEDERATED_JOIN_FD"  # the socket that a trial's processes inherit, the server's or the clients' end
MAX_PENDING = 100  # unauthenticated connections
MAX_LOGGED_REFUSALS = 20  # so that no peer can fill the log
BACKLOG = 1024  # so that a crowd of peers without the key keeps nobody from connecting
SOCKET, KEY = "socket", "key"  # the files in the directory of a Unix socket


class InheritedListener:
    """The server's end of the socket that it and its client processes inherit from their launcher."""

    address = "the launcher's socket"

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)
        self._trial = os.environ.get(TRIAL_VARIABLE)

    def accept(self, count: int, timeout: float) -> list[Channel]:
        """As Listener.accept. Each client process sends one end of its own connection through the socket."""
        joined: dict[int, Channel] = {}
        clock = RunningTime()
        heard = clock()
        try:
            while len(joined) < count:
                if select.select([self._socket], [], [], RunningTime.STEP)[0]:
                    _, descriptors, _, _ = socket.recv_fds(self._socket, 1, 1)
                    if not descriptors:
                        raise PeerLostError(f"client process {_names_of_missing(joined, count)} ended before it joined")
                    channel = Channel(Connection(descriptors[0]))
                    channel.set_timeout(timeout)
                    if (error := _join(channel, channel.receive(), self._trial, joined, count)) is not None:
                        channel.close()
                        print(f"refused a connection: {error}", file=sys.stderr, flush=True)
                    heard = clock()
                elif clock() > heard + timeout:
                    raise PeerLostError(f"client process {_names_of_missing(joined, count)} did not join within {timeout:g} s")
        except BaseException:
            for channel in joined.values():
                channel.close()
            raise
        return [joined[process] for process in range(count)]

    def close(self) -> None:
        self._socket.close()


class Listener:
    """The server's end of the address at which client processes connect."""

    def __init__(self, address: str | None) -> None:
        """Listen at `address`, or at a private Unix socket. Raises UsageError if the address cannot be used or the key is
        missing."""
        self._directory, self._trial = None, os.environ.get(TRIAL_VARIABLE)
        if address is not None and is_remote(address):
            self.address, self._key, endpoint = address, key_from_environment(), _host_and_port(address)
        else:
            self.address = endpoint = address or unix_address()
            self._key = secrets.token_hex(32).encode()
            self._directory = pathlib.Path(endpoint).parent
        try:
            if self._directory is not None:
                _make_private(self._directory)
                self._key_file = _claim(self._directory / KEY)
                _remove_dead_socket(self.address)
                self._key_file.truncate(0)
                self._key_file.write(self._key)
                self._key_file.flush()
            self._socket = _listen(endpoint)
            self._socket.setblocking(False)
        except OSError as error:
            raise UsageError(f"cannot listen at {self.address}: {error.strerror or error}") from error

    def accept(self, count: int, timeout: float) -> list[Channel]:
        """Wait for `count` client processes and return their channels, in the order of their numbers.

        A process that names no number gets the lowest free one. Raises PeerLostError, which names the missing processes, if
        none joins for `timeout` seconds. Each connection authenticates in its own thread, so peers without the key block
        nobody. At most MAX_PENDING do so at once; one more evicts the oldest that has not proved that it has the key.
        """
        joined: dict[int, Channel] = {}
        pending: dict[int, PendingConnection] = {}  # by file descriptor, the oldest first
        clock = RunningTime()
        heard = clock()
        refusals = 0
        with selectors.DefaultSelector() as selector, contextlib.ExitStack() as sockets:
            finished, finish = (sockets.enter_context(end) for end in socket.socketpair())
            selector.register(self._socket, selectors.EVENT_READ)
            selector.register(finished, selectors.EVENT_READ)
            try:
                while len(joined) < count:
                    remaining = heard + timeout - clock()
                    ready = [key.fileobj for key, _ in selector.select(max(0, min(remaining, RunningTime.STEP)))]
                    if not ready and remaining <= 0:
                        raise PeerLostError(
                            f"client process {_names_of_missing(joined, count)} did not join within {timeout:g} s"
                        )
                    if self._socket in ready:
                        self._accept_one(pending, finish)
                    if finished in ready:
                        connection = pending.pop(int.from_bytes(finished.recv(4)))
                        error = connection.error or _join(connection.channel, connection.hello, self._trial, joined, count)
                        if error is None:
                            connection.channel.set_timeout(timeout)
                            heard = clock()
                            continue
                        connection.channel.close()
                        refusals += 1
                        if refusals <= MAX_LOGGED_REFUSALS:
                            print(f"refused a connection: {error}", file=sys.stderr, flush=True)
            except BaseException:
                for channel in joined.values():
                    channel.close()
                raise
            finally:
                for connection in pending.values():
                    connection.drop()
                for connection in pending.values():
                    connection.join()
                    connection.channel.close()
        return [joined[process] for process in range(count)]

    def _accept_one(self, pending, finish) -> None:
        """Start to authenticate the next connection. If too many are pending, only evict one: the next call accepts the
        connection."""
        if len(pending) == MAX_PENDING:
            min(pending.values(), key=lambda connection: connection.has_key).drop()  # its thread ends and wakes the selector
            return
        with contextlib.suppress(BlockingIOError, ConnectionError):  # the peer is gone again
            connection = PendingConnection(self._socket.accept()[0], self._key, finish)
            pending[connection.channel.fileno()] = connection
            connection.start()

    def close(self) -> None:
        """Stop listening and remove the socket and the key from disk."""
        self._socket.close()
        if self._directory is not None and not self._key_file.closed:
            _remove_socket(self.address)
            self._key_file.close()  # from now on the address may be another server's


AnyListener = Listener | InheritedListener


def make_listener(address: str | None) -> AnyListener:
    """The listener of this process: on the socket that it inherited from its launcher if there is one, else at `address`, see
    Listener."""
    descriptor = inherited(JOIN_VARIABLE)
    return Listener(address) if descriptor is None else InheritedListener(descriptor)


def _missing(joined, count):
    return [process for process in range(count) if process not in joined]


def _names_of_missing(joined, count):
    return ", ".join(map(str, _missing(joined, count)))


def _join(channel, hello, trial, joined, count):
    """Add the channel of an authenticated peer, which has sent `hello`, to `joined`. Returns why it may not join the trial with
    the id `trial`, None if it may."""
    missing = _missing(joined, count)
    process = hello.get("process", missing[0])
    if hello.get("trial") != trial:
        reason = f"client process {shown(process)} was started for another trial"
    elif type(process) is not int or process not in missing:
        reason = f"client process {shown(process)} is not one of the missing {missing}"
    else:
        joined[process] = channel
        return None
    with contextlib.suppress(PeerLostError):
        channel.send(protocol.refusal(reason))
    return reason


class PendingConnection(threading.Thread):
    """A peer that has connected and has yet to prove that it has the key and to say which process it is.

    Once it has, or has failed, the thread sends the connection's file descriptor to the socket `finish` and ends.
    """

    def __init__(self, connected: socket.socket, key: bytes, finish: socket.socket) -> None:
        super().__init__(daemon=True)
        self._connection = Connection(connected.detach())
        self.channel = Channel(self._connection)
        self._key, self._finish = key, finish
        self.has_key = False
        self.hello: dict = {}
        self.error: str | None = None

    def run(self) -> None:
        try:
            deliver_challenge(self._connection, self._key)
            self.has_key = True
            answer_challenge(self._connection, self._key)
            self.hello = self.channel.receive()
        except Exception as error:  # a peer may send anything, on which the library's handshake may fail in any way
            self.error = " ".join(str(error).split())[:200] or type(error).__name__
        self._finish.sendall(self.channel.fileno().to_bytes(4))

    def drop(self) -> None:
        """Make the thread end at once."""
        with contextlib.suppress(OSError), socket_of(self._connection) as connected:
            connected.shutdown(socket.SHUT_RDWR)


def _listen(endpoint):
    if not isinstance(endpoint, str):
        return socket.create_server(endpoint, backlog=BACKLOG)
    listening = socket.socket(socket.AF_UNIX)
    try:
        listening.bind(endpoint)
        listening.listen(BACKLOG)
    except OSError:
        listening.close()
        raise
    return listening


def join(process: int | None, descriptor: int) -> Channel:
    """Join the trial as client process `process` through the inherited socket `descriptor`. Raises PeerLostError."""
    ours, theirs = socket.socketpair()
    channel = Channel(Connection(ours.detach()))
    channel.send(protocol.hello(process, os.environ.get(TRIAL_VARIABLE)))
    try:
        with theirs, socket.socket(fileno=descriptor) as inherited_socket:
            socket.send_fds(inherited_socket, [b"\0"], [theirs.fileno()])
    except OSError as error:
        raise PeerLostError(f"the connection broke ({error.strerror or error})") from error
    return channel


def connect(address: str, process: int | None, timeout: float) -> Channel:
    """Connect to the server at `address` as client process `process`. Try for up to `timeout` seconds, as the server may not
    listen yet. Raises PeerLostError or UsageError."""
    remote = is_remote(address)
    endpoint = _host_and_port(address) if remote else address
    deadline = time.monotonic() + timeout
    while True:
        try:
            key = key_from_environment() if remote else (pathlib.Path(address).parent / KEY).read_bytes()
            channel = _connect_once(endpoint, key, max(1.0, deadline - time.monotonic()))
            break
        except AuthenticationError as error:
            raise UsageError(
                f"the server at {address} has another key: set {KEY_VARIABLE} to the same on both sides"
            ) from error
        except (AssertionError, ValueError) as error:
            raise UsageError(f"no trial's server answers at {address}, but something else") from error
        except (OSError, EOFError) as error:
            if time.monotonic() > deadline:
                raise PeerLostError(f"no server answered at {address} within {timeout:g} s ({error})") from error
            time.sleep(0.01)
    channel.send(protocol.hello(process, os.environ.get(TRIAL_VARIABLE)))
    return channel


def _connect_once(endpoint, key, timeout):
    """Return a channel to a server that has proved that it has the key. Raises OSError, EOFError, or what the handshake
    raises."""
    if isinstance(endpoint, str):
        with socket.socket(socket.AF_UNIX) as connecting:
            connecting.connect(endpoint)
            connection = Connection(connecting.detach())
    else:
        connecting = socket.create_connection(endpoint, timeout)
        connecting.settimeout(None)
        connection = Connection(connecting.detach())
    channel = Channel(connection)
    try:
        channel.set_timeout(timeout)
        answer_challenge(connection, key)
        deliver_challenge(connection, key)
        channel.set_timeout(None)
    except BaseException:
        channel.close()
        raise
    return channel


# Addresses and keys


def is_remote(address: str) -> bool:
    """Whether an address is HOST:PORT rather than the path of a Unix socket."""
    return "/" not in address


def _host_and_port(address):
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def key_from_environment() -> bytes:
    """Return the key of HOST:PORT addresses. Raises UsageError if there is none."""
    key = os.environ.get(KEY_VARIABLE, "")
    if not key:
        raise UsageError(f"a HOST:PORT address needs a key: set {KEY_VARIABLE} to the same secret on both sides")
    return key.encode()


def unix_address() -> str:
    """Return a new path for a socket in a directory of its own. It is random, as other containers may share the directory for
    temporary files. Raises UsageError if all such directories have too long paths."""
    return os.path.join(socket_directory(), f"federated-{secrets.token_hex(8)}", SOCKET)


def _make_private(directory) -> None:
    """Make `directory`. Raises UsageError if other users can access its files."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = directory.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise UsageError(f"the socket's directory {str(directory)!r} is open to other users: remove it or name another")


def _claim(path: pathlib.Path) -> typing.BinaryIO:
    """Open a key's file, or make it, and lock it while this server listens. Raises UsageError if another server listens, or if
    the file is no key's."""
    while True:
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(open(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b"))
            if not try_lock(file):
                raise UsageError(f"another server listens in {str(path.parent)!r}: name another address")
            if is_at(file, path):  # else its server has just ended
                if not re.fullmatch(rb"([0-9a-f]{64})?", file.read(65)):
                    raise UsageError(f"{str(path)!r} is no server's key: name an address in another directory")
                file.seek(0)
                stack.pop_all()
                return file


def _remove_dead_socket(address: str) -> None:
    """Remove the socket of a server that was killed. Raises UsageError if something else has the address."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            if not stat.S_ISSOCK(os.lstat(address).st_mode):
                raise UsageError(f"{address!r} is no socket: name another address")
            probe.connect(address)
        except FileNotFoundError:
            return
        except ConnectionRefusedError:
            os.unlink(address)
            return
    raise UsageError(f"something else listens at {address!r}: name another address")


def _remove_socket(address: str) -> None:
    """Remove the socket and the key of a listener, and their directory only if nothing else is in it: it may be the user's."""
    directory = pathlib.Path(address).parent
    for path in (pathlib.Path(address), directory / KEY):
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        directory.rmdir()
