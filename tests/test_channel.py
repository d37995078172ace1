"""The channel between real processes, and what it does with messages no client of ours would send."""

import contextlib
import multiprocessing
import os
import socket
import tempfile
import threading
import time
from multiprocessing.connection import Connection

import numpy as np
import pytest
from helpers import HUNG

from federated.learning.memory import SharedMatrices
from federated.options import UsageError
from federated.running.channel import Channel, Hub, PeerLostError, RunningTime
from federated.running.listener import Listener, connect, unix_address

SHAPES = {"broadcast": (1, 1000), "updates": (2, 1000), "moments": (3, 0)}


def echo(address, process):
    """A client that adds its number to what is broadcast."""
    channel = connect(address, process, HUNG)
    memory = channel.receive_memory(SHAPES)
    while "stop" not in channel.receive():
        memory.updates[process] = memory.broadcast[0] + process
        channel.send({"from": process}, [("updates", process)])


@pytest.mark.process
@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_rows_arrive(kind, monkeypatch):
    monkeypatch.setenv("FEDERATED_KEY", "key")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    listener = Listener(f"127.0.0.1:{port}" if kind == "tcp" else None)
    context = multiprocessing.get_context("spawn")
    clients = [context.Process(target=echo, args=(listener.address, number)) for number in (1, 0)]
    for client in clients:
        client.start()
    memory = SharedMatrices(SHAPES, shared=True)
    channels = []
    for channel in listener.accept(2, HUNG):
        channel.send_memory(memory)
        channels.append(channel)
    listener.close()
    assert [channel.local for channel in channels] == [kind == "unix"] * 2
    hub = Hub(channels, HUNG, lambda: None)
    for round in range(3):
        memory.broadcast[0] = np.arange(1000) + round
        for channel in channels:
            channel.send({"round": round}, [("broadcast", 0)])
        assert sorted(hub.receive([0, 1]) for _ in channels) == [(0, {"from": 0}), (1, {"from": 1})]
        for number in (0, 1):
            np.testing.assert_array_equal(memory.updates[number], np.arange(1000) + round + number)
    for channel in channels:
        channel.send({"stop": True})
    for client in clients:
        client.join(HUNG)
        assert client.exitcode == 0
    with pytest.raises(PeerLostError, match=r"client process [01] is lost: it closed the connection"):
        hub.receive([0, 1])


def pair():
    """A channel and a raw connection to it that may send anything. Not local: rows travel in messages."""
    ours, theirs = socket.socketpair()
    channel = Channel(Connection(ours.detach()))
    channel.local = False
    channel.memory = SharedMatrices(SHAPES)
    return channel, Connection(theirs.detach())


@pytest.mark.parametrize(
    "payloads",
    [
        [b"not json"],
        [b"[1, 2]"],
        [b"\xff\xfe"],
        [b"[" * 100_000],
        [b'{"rows": [["broadcast", 7]]}', bytes(4000)],
        [b'{"rows": [["broadcast", -1]]}', bytes(4000)],
        [b'{"rows": [["broadcast", true]]}', bytes(4000)],
        [b'{"rows": [["__class__", 0]]}', bytes(4000)],
        [b'{"rows": 5}'],
        [b'{"rows": [["broadcast", 0]]}', bytes(4001)],
        [b'{"rows": [["broadcast", 0]]}', bytes(3999)],
        [bytes((1 << 20) + 1)],
    ],
)
def test_hostile_messages_end_the_channel_and_nothing_else(payloads):
    channel, peer = pair()

    def send():
        with contextlib.suppress(OSError):  # it is hung up on
            for payload in payloads:
                peer.send_bytes(payload)

    threading.Thread(target=send, daemon=True).start()
    with pytest.raises(PeerLostError):
        channel.receive()
    channel.close()


def test_a_silent_process_is_told_from_one_that_is_alive():
    silent, _kept = pair()
    lively, peer = pair()
    hub = Hub([lively, silent], 1, lambda: None)
    stop = threading.Event()

    def tell():
        while not stop.wait(0.05):
            peer.send_bytes(b'{"alive": true}')

    threading.Thread(target=tell, daemon=True).start()
    with pytest.raises(PeerLostError, match=r"client process 1 was silent for 1 s"):
        hub.receive([0, 1])
    stop.set()


def test_untouched_rows_take_no_memory():
    memory = SharedMatrices({"moments": (1000, 10_000_000)}, shared=True)  # 40 GB of addresses
    memory.moments[500, 3] = 1
    assert os.fstat(memory.fd).st_blocks * 512 < 1 << 20


def test_a_socket_is_only_for_this_user(tmp_path):
    listener = Listener(unix_address())
    directory = os.path.dirname(listener.address)
    assert os.stat(directory).st_mode & 0o777 == 0o700
    assert os.stat(os.path.join(directory, "key")).st_mode & 0o777 == 0o600
    listener.close()
    assert not os.path.exists(directory)
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o755)
    with pytest.raises(UsageError, match="open to other users"):
        Listener(str(shared / "socket"))


def test_closing_a_listener_removes_nothing_of_the_users(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir(mode=0o700)
    (mine / "notes.txt").write_text("mine")
    Listener(str(mine / "socket")).close()
    assert [path.name for path in mine.iterdir()] == ["notes.txt"]


def test_no_two_sockets_have_the_same_name():
    assert unix_address() != unix_address()


@pytest.mark.parametrize("length", [20, 92])
def test_a_sockets_directory_has_a_short_path(tmp_path, monkeypatch, length):
    long = tmp_path / ("x" * length)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    listener = Listener(None)
    assert len(listener.address) <= 107
    assert os.stat(os.path.dirname(listener.address)).st_mode & 0o777 == 0o700
    listener.close()


def test_a_live_socket_is_not_taken_and_a_dead_one_is(tmp_path):
    tmp_path.chmod(0o700)
    address = str(tmp_path / "socket")
    listener = Listener(address)
    key = (tmp_path / "key").read_bytes()
    with pytest.raises(UsageError, match="another server listens in"):
        Listener(address)
    assert (tmp_path / "key").read_bytes() == key and os.path.exists(address)
    listener.close()
    tmp_path.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(address)
    (tmp_path / "key").write_bytes(key)
    second = Listener(address)
    listener.close()  # again, as a server does that ends: the address is another's by now
    assert (tmp_path / "key").read_bytes() != key and os.path.exists(address)
    second.close()


def test_nothing_of_the_users_is_taken_for_a_socket_or_a_key(tmp_path):
    tmp_path.chmod(0o700)
    for name, cause in (("socket", "is no socket"), ("key", "is no server's key")):
        (tmp_path / name).write_text("mine")
        with pytest.raises(UsageError, match=cause):
            Listener(str(tmp_path / "socket"))
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()
    with socket.socket(socket.AF_UNIX) as foreign:
        foreign.bind(str(tmp_path / "socket"))
        foreign.listen()
        with pytest.raises(UsageError, match="something else listens"):
            Listener(str(tmp_path / "socket"))
        assert (tmp_path / "socket").exists()


def test_a_client_process_of_another_trial_is_refused(monkeypatch):
    listener = Listener(None)
    accepted = []
    accepting = threading.Thread(target=lambda: accepted.extend(listener.accept(1, HUNG)), daemon=True)
    accepting.start()
    monkeypatch.setenv("FEDERATED_TRIAL", "another")
    stranger = connect(listener.address, 0, HUNG)
    monkeypatch.delenv("FEDERATED_TRIAL")
    assert stranger.receive() == {"refused": "client process 0 was started for another trial"}
    friend = connect(listener.address, 0, HUNG)
    accepting.join(HUNG)
    assert len(accepted) == 1
    for channel in (stranger, friend, *accepted):
        channel.close()
    listener.close()


def test_a_pause_of_all_processes_is_nobodys_silence(monkeypatch):
    """As of a container that is paused, or a machine that sleeps on a system that counts it."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    clock = RunningTime()
    for now[0] in (0.5, 1.0, 3600.0, 3600.5):
        passed = clock()
    assert passed == 0.5 + 0.5 + 2 * RunningTime.STEP + 0.5
