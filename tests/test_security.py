"""What strangers can do to a trial, and what a client process that has the key but does not keep to the protocol can."""

import contextlib
import json
import os
import pathlib
import pickle
import re
import signal
import socket
import struct
import threading
import time

import numpy as np
import pytest
from helpers import ENDLESS, HUNG, PROJECT, SMALL, Sweep, descendants, terminal, wait_until

from federated.running import listener as listeners
from federated.running.channel import PeerLostError
from federated.running.listener import Listener, connect
from federated.running.rounds import serve
from federated.settings import ServerOptions, Settings
from federated.trial import DivergedError, Trial
from hparams_registry import default_hparams


def listening_sockets(pid):
    """The local addresses of the TCP sockets of process `pid`, as /proc has them."""
    inodes = set()
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            inodes.update(re.findall(r"socket:\[(\d+)\]", os.readlink(f"/proc/{pid}/fd/{fd}")))
    tables = [pathlib.Path(f"/proc/{pid}/net/{name}") for name in ("tcp", "tcp6")]
    lines = [line.split() for table in tables if table.exists() for line in table.read_text().splitlines()[1:]]
    return [line[1] for line in lines if line[9] in inodes]


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.usefixtures("leaves_nothing")
def test_no_port_is_open_by_default(tmp_path):
    sweep = Sweep(tmp_path / "out", *ENDLESS)
    try:
        roles = sweep.pids()
        family = [sweep.process.pid, *descendants(sweep.process.pid)]
        assert set(roles.values()) < set(family)
        assert [listening_sockets(pid) for pid in family] == [[]] * len(family)
    finally:
        sweep.process.send_signal(signal.SIGINT)
        sweep.wait()


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("over_tcp", [True, False])
def test_the_key_is_in_no_argument_and_no_file(tmp_path, free_port, over_tcp):
    host = ("--host", f"127.0.0.1:{free_port}") if over_tcp else ()
    environment = {"FEDERATED_KEY": "correct horse"} if over_tcp else {}
    tree = tmp_path / "trial"
    server = terminal("server_benchmark.py", "--output_dir", tree, "--client_processes", 1, *SMALL, *host, **environment)
    printed = server.stdout.readline()
    address = printed.split(" at ")[1].strip()
    key = b"correct horse"
    if host:
        assert listening_sockets(server.pid) != []  # so that the test above could fail
    else:
        directory = pathlib.Path(address).parent
        assert os.stat(directory).st_mode & 0o777 == 0o700
        key = (directory / "key").read_bytes()
        assert len(key) == 64
    client = terminal("client_benchmark.py", "--host", address, **environment)
    for process in (server, client):
        assert key not in pathlib.Path(f"/proc/{process.pid}/cmdline").read_bytes()
    printed += client.communicate(timeout=HUNG)[0] + server.communicate(timeout=HUNG)[0]
    assert (client.returncode, server.returncode) == (0, 0), printed
    assert key not in printed.encode()
    written = {path.name: path.read_bytes() for path in tree.rglob("*") if path.is_file()}
    assert written.keys() >= {"results.json", "clients.npz", "done"}
    assert not any(key in content for content in written.values())


def resident_bytes(pid):
    return int(re.search(r"VmRSS:\s+(\d+) kB", pathlib.Path(f"/proc/{pid}/status").read_text())[1]) * 1024


GIANT = struct.pack("!iQ", -1, 1 << 62)


def bother(port, idle):
    """Random bytes, a giant message, negative and truncated ones, and `idle` connections, which are returned."""
    for junk in (os.urandom(1 << 20), GIANT + bytes(1000), struct.pack("!i", -7) * 10, struct.pack("!i", 200) + b"half", b""):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(junk)
    return [socket.create_connection(("127.0.0.1", port)) for _ in range(idle)]


@pytest.mark.slow
@pytest.mark.process
def test_strangers_neither_stop_nor_delay_nor_bloat_a_server(tmp_path, free_port):
    """Before the server looks for clients, while it waits for them, and after the first has joined."""
    host = ("--host", f"127.0.0.1:{free_port}")
    server = terminal(
        "server_benchmark.py", "--output_dir", tmp_path, "--client_processes", 2, *SMALL, *host, FEDERATED_KEY="key"
    )
    while True:
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", free_port)):
            break
        assert server.poll() is None
        time.sleep(0.01)
    idlers = bother(free_port, 100)
    printed = server.stdout.readline()
    assert "waiting for" in printed
    before = resident_bytes(server.pid)
    idlers += bother(free_port, 500)
    clients = [terminal("client_benchmark.py", *host, FEDERATED_KEY="key")]
    time.sleep(2)
    idlers += bother(free_port, 100)
    grown = resident_bytes(server.pid) - before
    told = idlers[-1].recv(1 << 20)  # a stranger is sent a challenge, and nothing else
    assert len(told) < 64 and b"#CHALLENGE#" in told
    clients.append(terminal("client_benchmark.py", *host, FEDERATED_KEY="key"))
    outputs = [process.communicate(timeout=HUNG)[0] for process in (*clients, server)]
    assert [process.returncode for process in (*clients, server)] == [0, 0, 0], outputs
    assert "Traceback" not in "".join(outputs) and outputs[2].count("refused a connection") <= listeners.MAX_LOGGED_REFUSALS
    assert grown < 16 << 20
    for idler in idlers:
        idler.close()


@pytest.fixture
def listener(monkeypatch, free_port):
    monkeypatch.setenv("FEDERATED_KEY", "key")
    listener = Listener(f"127.0.0.1:{free_port}")
    yield listener
    listener.close()


class Accepting(threading.Thread):
    """Accepts processes in the background."""

    def __init__(self, listener, count, timeout=HUNG):
        super().__init__(daemon=True)
        self._arguments = listener, count, timeout
        self.result = None
        self.start()

    def run(self):
        listener, *arguments = self._arguments
        try:
            self.result = listener.accept(*arguments)
        except PeerLostError as error:
            self.result = error

    def end(self):
        self.join(2 * HUNG)
        assert not self.is_alive()
        return self.result


@pytest.mark.parametrize("have_key", [False, True])
def test_who_has_the_key_is_accepted_while_others_idle(listener, have_key):
    accepting = Accepting(listener, 2)
    port = int(listener.address.rpartition(":")[2])
    idlers = bother(port, 500)
    if have_key:
        idlers += [listeners._connect_once(("127.0.0.1", port), b"key", HUNG) for _ in range(2 * listeners.MAX_PENDING)]
    friends = [connect(listener.address, process, HUNG) for process in (1, 0)]
    accepted = accepting.end()
    assert len(accepted) == 2  # else a PeerLostError; the idle ones are still there
    names = {id(thread) for thread in threading.enumerate() if isinstance(thread, listeners.PendingConnection)}
    assert names == set()  # nobody is left at the listener
    for each in [*idlers, *friends, *accepted]:
        each.close()


def test_strangers_do_not_put_off_the_end_of_waiting(listener):
    accepting = Accepting(listener, 1, timeout=1)
    start = time.monotonic()
    while time.monotonic() - start < HUNG and accepting.is_alive():
        for stranger in bother(int(listener.address.rpartition(":")[2]), 1):
            stranger.close()
        time.sleep(0.1)
    assert str(accepting.end()) == "client process 0 did not join within 1 s"
    assert time.monotonic() - start < HUNG


def test_nobody_takes_the_number_of_another(listener):
    def refusal(claim):
        liar = connect(listener.address, claim, HUNG)
        try:
            return liar.receive()["refused"]
        except PeerLostError:  # it was closed before this was read
            return ""
        finally:
            liar.close()

    accepting = Accepting(listener, 2)
    honest = connect(listener.address, 0, HUNG)
    wait_until(lambda: refusal(2).endswith("is not one of the missing [1]"))  # the honest one has joined
    for claim in (0, -1, 2, True, "1", 1.0, [1], {"process": 1}, 10**30):
        assert (told := refusal(claim)) == "" or "is not one of the missing" in told
    other = connect(listener.address, 1, HUNG)
    accepted = accepting.end()
    for process, (theirs, ours) in enumerate(zip((honest, other), accepted)):
        ours.send({"you are": process})
        assert theirs.receive() == {"you are": process}
        theirs.close()
        ours.close()


class Liar(threading.Thread):
    """A client process with the key that keeps to the protocol, but for what `lie` makes of one message.

    lie(channel, message, rows) sends something instead of the first message that has the key `kind`.
    """

    def __init__(self, address, kind, lie):
        super().__init__(daemon=True)
        self._address, self._kind, self._lie = address, kind, lie

    def run(self):
        with contextlib.suppress(PeerLostError, OSError):
            self._play()

    def _play(self):
        self._channel = connect(self._address, 0, HUNG)
        welcome = self._channel.receive()
        self.memory = self._channel.receive_memory(welcome["memory"])
        self._say({"ready": "cpu"})
        while "stop" not in (message := self._channel.receive()):
            if message["evaluate"]:
                blocks = range(len(self.memory.evaluation))
                done = {"evaluated": message["round"], "seconds": {"evaluation": 0.5}}
                self._say(done, [("evaluation", block) for block in blocks])
            for number, (client, _) in enumerate(message["train"]):
                if number:
                    self._channel.receive()
                rows = [("updates", 0), ("clients", client)]
                self._say({"trained": client, "loss": 1.0, "accuracy": 0.5, "seconds": {"training": 0.5}}, rows)

    def _say(self, message, rows=()):
        if self._kind in message:
            self._kind = None
            self._lie(self._channel, message, list(rows))
        else:
            self._channel.send(message, rows)


def changed(**changes):
    """A lie that changes fields; None leaves one out."""

    def lie(channel, message, rows):
        message = {name: value for name, value in {**message, **changes}.items() if value is not None}
        channel.send(message, rows)

    return lie


def other_rows(change):
    return lambda channel, message, rows: channel.send(message, change(rows))


def raw(*payloads):
    """A lie that sends bytes as they are, then stays silent."""

    def lie(channel, message, rows):
        for payload in payloads:
            os.write(channel.fileno(), payload)
        time.sleep(10)

    return lie


def row_of(payload):
    """A lie that sends `payload` as it is where the bytes of a row are due."""

    def lie(channel, message, rows):
        channel._connection.send_bytes(json.dumps({**message, "rows": rows}).encode())
        os.write(channel.fileno(), payload)
        time.sleep(10)

    return lie


def filled(name, value):
    """A lie that puts `value` into one element of a row."""

    def lie(channel, message, rows):
        getattr(channel.memory, name)[0, 3] = value
        channel.send(message, rows)

    return lie


def twice(channel, message, rows):
    channel.send(message, rows)
    channel.send(message, rows)


class Trap:
    """What would make a file if it were unpickled."""

    path = ""

    def __reduce__(self):
        return (pathlib.Path.touch, (pathlib.Path(self.path),))


def a_pickle(channel, message, rows):
    channel._connection.send(Trap())


def a_pickled_row(channel, message, rows):
    channel._connection.send_bytes(json.dumps({**message, "rows": rows}).encode())
    channel._connection.send(Trap())


NAN, INF = float("nan"), float("inf")
LIES = {
    "ready: number": ("ready", changed(ready=5), "was due"),
    "ready: twice": ("ready", twice, "not asked for|was due"),
    "evaluated: another round": ("evaluated", changed(evaluated=1), "was due"),
    "evaluated: true for 0": ("evaluated", changed(evaluated=False), "was due"),
    "evaluated: duration": ("evaluated", changed(seconds={"evaluation": NAN}), "was due"),
    "evaluated: durations": ("evaluated", changed(seconds={"evaluation": 1.0, "x": 1.0}), "was due"),
    "evaluated: no rows": ("evaluated", other_rows(lambda rows: []), "asked for others"),
    "evaluated: other rows": ("evaluated", other_rows(lambda rows: [*rows[:-1], ("broadcast", 0)]), "asked for others"),
    "evaluated: not finite": ("evaluated", filled("evaluation", NAN), "diverged: the loss after round 0 of 2 is not finite"),
    "trained: another client": ("trained", changed(trained=1), "was due"),
    "trained: text": ("trained", changed(trained="0"), "was due"),
    "trained: no loss": ("trained", changed(loss=None), "was due"),
    "trained: more": ("trained", changed(more=1), "was due"),
    "trained: loss text": ("trained", changed(loss="1.0"), "was due"),
    "trained: loss list": ("trained", changed(loss=[1.0]), "was due"),
    "trained: accuracy true": ("trained", changed(accuracy=True), "was due"),
    "trained: loss not finite": ("trained", changed(loss=NAN), "diverged: a training loss of round 1 of 2"),
    "trained: accuracy not finite": ("trained", changed(accuracy=INF), "diverged: a training"),
    "trained: update NaN": ("trained", filled("updates", NAN), "diverged: an update of round 1 of 2 is not finite"),
    "trained: update -inf": ("trained", filled("updates", -INF), "diverged: an update of round 1 of 2 is not finite"),
    "trained: row of another client": ("trained", other_rows(lambda rows: [rows[0], ("clients", 1)]), "asked for others"),
    "trained: global weights": ("trained", other_rows(lambda rows: [("broadcast", 0), rows[1]]), "asked for others"),
    "trained: no such row": (
        "trained",
        lambda channel, message, rows: raw_rows(channel, message, [["updates", 7]]),
        "asked for others",
    ),
    "trained: rows of numbers": ("trained", lambda channel, message, rows: raw_rows(channel, message, [5]), "no message"),
    "trained: short row": ("trained", row_of(struct.pack("!i", 4) + bytes(4)), "too short"),
    "trained: long row": ("trained", row_of(struct.pack("!i", 1 << 30)), "no message"),
    "trained: giant row": ("trained", row_of(GIANT), "no message"),
    "trained: half a row": ("trained", row_of(struct.pack("!i", 400) + bytes(4)), "stopped in the middle"),
    "half a header": ("trained", raw(b"\0\0"), "stopped in the middle"),
    "half a message": ("ready", raw(struct.pack("!i", 100) + b"{"), "stopped in the middle"),
    "a giant message": ("evaluated", raw(GIANT), "no message"),
    "a pickle for a device": ("ready", a_pickle, "no message"),
    "a pickle for a message": ("trained", a_pickle, "no message"),
    "a pickle for a row": ("trained", a_pickled_row, "too short"),
    "silence": ("trained", raw(), "was silent for 2 s"),
}


def raw_rows(channel, message, rows):
    channel._connection.send_bytes(json.dumps({**message, "rows": rows}).encode())


@pytest.mark.parametrize("name", LIES)
def test_a_lie_ends_the_trial_with_a_named_cause(listener, tmp_path, monkeypatch, name):
    kind, lie, cause = LIES[name]
    monkeypatch.setattr(Trap, "path", str(tmp_path / "sprung"))
    settings = Settings(rounds=2, samples_per_client=40, threads=2)
    this = Trial(settings, default_hparams("Fedavg", "digits"), 0, 0, tmp_path / "trial")
    this.directory.mkdir()
    Liar(listener.address, kind, lie).start()
    with pytest.raises((PeerLostError, DivergedError), match=cause) as raised:
        serve(this, listener, 1, ServerOptions(timeout=2.0, checkpoint_seconds=0.0))
    assert (raised.type is DivergedError) == ("diverged" in cause)
    assert not (tmp_path / "sprung").exists()
    assert list(tmp_path.rglob("results.json")) == [] and list(tmp_path.rglob("*.npz")) == []


def test_who_does_not_lie_gets_results(listener, tmp_path):
    """So that the test above shows something."""
    this = Trial(Settings(rounds=2, samples_per_client=40), default_hparams("Fedavg", "digits"), 0, 0, tmp_path)
    Liar(listener.address, None, None).start()
    serve(this, listener, 1, ServerOptions(timeout=HUNG, checkpoint_seconds=0.0))
    assert json.loads((tmp_path / "results.json").read_text())["curves"]["train_loss"] == [1.0, 1.0]


def test_a_pickle_would_spring_the_trap(tmp_path, monkeypatch):
    monkeypatch.setattr(Trap, "path", str(tmp_path / "sprung"))
    pickle.loads(pickle.dumps(Trap()))
    assert (tmp_path / "sprung").exists()


@pytest.mark.process
@pytest.mark.parametrize(("lie", "code"), [(changed(loss="1.0"), 4), (filled("updates", np.nan), 5)])
def test_a_real_server_ends_without_a_traceback_and_its_door_is_closed_by_then(tmp_path, free_port, monkeypatch, lie, code):
    monkeypatch.setenv("FEDERATED_KEY", "key")
    address = f"127.0.0.1:{free_port}"
    server = terminal(
        "server_benchmark.py", "--output_dir", tmp_path, "--client_processes", 1, *SMALL, "--host", address, "--timeout", HUNG
    )
    server.stdout.readline()
    refused = []

    def lie_once_it_no_longer_listens(channel, message, rows):
        with contextlib.suppress(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", free_port)).close()
            refused.append(False)
        lie(channel, message, rows)

    liar = Liar(address, "trained", lie_once_it_no_longer_listens)
    liar.start()
    output = server.communicate(timeout=HUNG)[0]
    assert server.returncode == code and "Traceback" not in output, output
    assert refused == []
    assert json.loads((tmp_path / "failed.json").read_text())["reason"] == output.splitlines()[-1]


def test_nothing_is_unpickled():
    """Neither from a socket nor from a file: no source calls what would. (Forks get their arguments from their parent.)"""
    suspicious = re.compile(
        r"import (c?pickle|marshal|shelve|dill|joblib)|pickle\.|allow_pickle=True|torch\.load\((?!.*weights_only=True)"
        r"|\.recv\(\)|onnection\.send\(|read_pickle|yaml\.load|[^.\w](eval|exec)\("
    )
    sources = [*PROJECT.glob("*.py"), *(PROJECT / "federated").rglob("*.py")]
    assert len(sources) > 15
    found = [
        f"{path.name}: {line.strip()}" for path in sources for line in path.read_text().splitlines() if suspicious.search(line)
    ]
    assert found == []
    for caught in (
        "import pickle",
        "torch.load(path)",
        "np.load(path, allow_pickle=True)",
        "connection.recv()",
        "self._connection.send(x)",
    ):
        assert suspicious.search(caught)
