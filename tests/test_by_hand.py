"""A trial started by hand, a process in each terminal."""

import os

import pytest
from helpers import HUNG, SMALL, results, terminal

pytestmark = pytest.mark.process


def by_hand(directory, *options, clients=2, call=None, **environment):
    """Start a server, read its address off its screen, and start clients there, one of them by `call`. Returns the address."""
    server = terminal(
        "server_benchmark.py", "--output_dir", directory, "--client_processes", clients, *SMALL, *options, **environment
    )
    address = server.stdout.readline().split(" at ")[1].strip()
    started = clients - (call is not None)
    processes = [server, *(terminal("client_benchmark.py", "--host", address, **environment) for _ in range(started))]
    if call is not None:
        joined = call("client_benchmark.py", "--host", address)
        assert joined.returncode == 0, joined.stderr
    outputs = [process.communicate(timeout=HUNG)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * (started + 1), outputs
    return address


def test_three_terminals(tmp_path):
    address = by_hand(tmp_path / "trial")
    assert not os.path.exists(os.path.dirname(address))
    assert len(results(tmp_path)) == 1


@pytest.mark.slow
def test_tcp_with_a_key_gives_the_same_bits(call, tmp_path, free_port, monkeypatch):
    by_hand(tmp_path / "unix" / "trial", clients=1, call=call)
    monkeypatch.setenv("FEDERATED_KEY", "a secret")
    by_hand(tmp_path / "tcp" / "trial", "--host", f"127.0.0.1:{free_port}", call=call)
    assert results(tmp_path / "tcp") == results(tmp_path / "unix") != {}


@pytest.mark.slow
def test_a_sweep_over_tcp(launch, launch_here, tmp_path, free_port):
    host = ("--host", f"127.0.0.1:{free_port}")
    assert launch(tmp_path / "tcp", *host, env={**os.environ, "FEDERATED_KEY": "a secret"}).returncode == 0
    assert launch_here(tmp_path / "unix").returncode == 0
    assert results(tmp_path / "tcp") == results(tmp_path / "unix")


def test_tcp_needs_a_key(call, tmp_path, free_port, monkeypatch):
    monkeypatch.delenv("FEDERATED_KEY", raising=False)
    for script, *options in (
        ("server_benchmark.py", "--output_dir", tmp_path / "trial"),
        ("client_benchmark.py",),
        ("sweep.py", "launch", "--skip_confirmation"),
    ):
        result = call(script, *options, "--host", f"127.0.0.1:{free_port}", "--timeout", 5)
        assert result.returncode == 2 and "set FEDERATED_KEY" in result.stderr.splitlines()[-1]


@pytest.mark.slow
def test_a_wrong_key_is_refused_and_the_trial_goes_on(tmp_path, free_port):
    host = ("--host", f"127.0.0.1:{free_port}")
    server = terminal(
        "server_benchmark.py", "--output_dir", tmp_path, "--client_processes", 1, *SMALL, *host, FEDERATED_KEY="right"
    )
    stranger = terminal("client_benchmark.py", *host, FEDERATED_KEY="wrong")
    output = stranger.communicate(timeout=HUNG)[0]
    assert stranger.returncode == 2 and "another key" in output
    friend = terminal("client_benchmark.py", *host, FEDERATED_KEY="right")
    assert friend.wait(HUNG) == 0
    assert server.wait(HUNG) == 0


def test_garbage_does_not_end_the_trial(call, tmp_path, free_port, monkeypatch):
    import socket

    monkeypatch.setenv("FEDERATED_KEY", "key")
    host = ("--host", f"127.0.0.1:{free_port}")
    server = terminal("server_benchmark.py", "--output_dir", tmp_path, "--client_processes", 1, *SMALL, *host)
    server.stdout.readline()
    with socket.create_connection(("127.0.0.1", free_port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + bytes(1000))
    assert call("client_benchmark.py", *host).returncode == 0
    assert server.wait(HUNG) == 0


@pytest.mark.parametrize("script", ["server_benchmark.py", "client_benchmark.py"])
def test_the_help_tells_how(call, script):
    help = call(script, "--help").stdout
    assert "python client_benchmark.py --host ADDRESS" in help and "FEDERATED_KEY" in help
