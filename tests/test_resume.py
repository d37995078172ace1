"""A trial that was killed goes on from its checkpoint to the same results."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import PROJECT, is_alive
from test_faults import Sweep, failure, processes_of
from test_sweep import results

from federated.running import checkpoint
from federated.trial import CHECKPOINT, CHECKPOINTS, DAMAGED, PREVIOUS

# Sampled clients that keep their moments, so that a checkpoint has to hold every part of a trial's state
STATEFUL = (
    "--num_clients", "4", "--participation", "0.5", "--optimizer_state", "keep", "--samples_per_client", "300",
    "--num_hparams", "1", "--num_trials", "1", "--client_processes", "2", "--checkpoint_seconds", "0",
)  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """undisturbed(rounds) is what `results` gives of a trial that nothing happened to."""
    known = {}

    def run(rounds):
        if rounds not in known:
            out = tmp_path_factory.mktemp("undisturbed")
            code, output = Sweep(out, *STATEFUL, "--rounds", str(rounds)).wait()
            assert code == 0, output
            known[rounds] = results(out)
            assert len(known[rounds]) == 1
        return known[rounds]

    return run


def trial_of(out):
    (trial,) = out.glob("*/*/trial_0")
    return trial


def kill_after(sweep, round):
    """SIGKILL a sweep and all its processes at once, when its trial has begun and made the checkpoint of `round`."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for trial in sweep.output_dir.glob("*/*/trial_0"):
            with contextlib.suppress(OSError, ValueError, KeyError, EOFError):
                stored = checkpoint.load(trial) if (trial / CHECKPOINT).exists() else None
                if stored is not None and stored[0]["round"] >= round:
                    for pid in (*processes_of(trial).values(), sweep.process.pid):
                        os.kill(pid, signal.SIGKILL)
                    sweep.wait()
                    return trial
        time.sleep(0.01)
    raise AssertionError("the trial made no checkpoint")


def test_it_goes_on_where_it_was_to_the_same_bits(tmp_path, undisturbed):
    out, rounds = tmp_path / "out", ("--rounds", "300")
    trial = kill_after(Sweep(out, *STATEFUL, *rounds), 20)
    assert {CHECKPOINT, PREVIOUS} & {path.name for path in trial.iterdir()}  # a kill may fall between the two renames
    state, _ = checkpoint.load(trial)
    code, output = Sweep(out, *STATEFUL, *rounds).wait()
    assert code == 0, output
    assert f"resumes after round {state['round']}" in (trial / "server.log").read_text()
    assert results(out) == undisturbed(300)
    assert not {path.name for path in trial.iterdir()} & {*CHECKPOINTS, "lock"}  # a done trial keeps none
    runs = json.loads((trial / "results.json").read_text())["provenance"]["runs"]
    assert [run["round"] for run in runs] == [0, state["round"]]


@pytest.mark.parametrize("damage", ["truncated", "bit", "empty", "foreign"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(tmp_path, undisturbed, damage):
    out, rounds = tmp_path / "out", ("--rounds", "300")
    trial = kill_after(Sweep(out, *STATEFUL, *rounds), 5)
    latest = trial / CHECKPOINT
    if not latest.exists():  # killed between the two renames
        shutil.copy(trial / PREVIOUS, latest)
    content = bytearray(latest.read_bytes())
    content[len(content) // 2] ^= 1
    damaged = {"truncated": content[: len(content) // 2], "bit": content, "empty": b"", "foreign": b"hello"}[damage]
    latest.write_bytes(damaged)
    before, _ = checkpoint.load(shutil.copytree(trial, tmp_path / "copy"))
    assert (tmp_path / "copy" / DAMAGED).read_bytes() == damaged
    sweep = Sweep(out, *STATEFUL, *rounds)
    code, output = sweep.wait()
    assert code == 0, output
    log = (trial / "server.log").read_text()
    assert f"{CHECKPOINT} is damaged" in log and f"resumes after round {before['round']}" in log
    assert results(out) == undisturbed(300)


def test_with_both_damaged_it_starts_anew(tmp_path, undisturbed):
    out, rounds = tmp_path / "out", ("--rounds", "300")
    trial = kill_after(Sweep(out, *STATEFUL, *rounds), 5)
    for name in (CHECKPOINT, PREVIOUS):
        (trial / name).write_bytes(b"PK\3\4")
    code, output = Sweep(out, *STATEFUL, *rounds).wait()
    assert code == 0, output
    assert "goes on" not in (trial / "server.log").read_text()
    assert results(out) == undisturbed(300)


def test_kills_at_random_instants_do_not_change_a_bit(tmp_path, undisturbed, request):
    """`--kills 200` makes it long. Half of the kills hit single processes, which --retries outlives, half of them the sweep
    or all at once, also during start-up."""
    kills, seed = request.config.getoption("kills"), random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    out, rounds = tmp_path / "out", ("--rounds", "1500")
    command = (*STATEFUL, *rounds, "--retries", "1000")
    sweep, done = Sweep(out, *command), 0
    while done < kills and sweep.process.poll() is None:
        time.sleep(rng.uniform(0, 0.5))
        roles = next((processes_of(trial) for trial in out.glob("*/*/trial_0")), {}) | {"sweep": sweep.process.pid}
        victims = rng.choice([["sweep"], list(roles), *([role] for role in roles if role != "sweep")])
        for role in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(roles[role], signal.SIGKILL)
        done += 1
        if "sweep" in victims:
            sweep.wait()
            for role in roles:
                deadline = time.monotonic() + 5
                while is_alive(roles[role]):
                    assert time.monotonic() < deadline, f"{role} lives on"
                    time.sleep(0.01)
            sweep = Sweep(out, *command)
    code, output = sweep.wait(300)
    assert code == 0, output
    assert done == kills, f"only {done} kills"
    assert results(out) == undisturbed(1500)


def test_retries_go_on_and_their_history_stays(tmp_path, undisturbed):
    out = tmp_path / "out"
    sweep = Sweep(out, *STATEFUL, "--rounds", "1500", "--retries", "2")
    for _ in range(2):
        while "client_process_1" not in (pids := sweep.pids()):  # it may find the log of the attempt before
            time.sleep(0.01)
        os.kill(pids["client_process_1"], signal.SIGKILL)
        while any(map(is_alive, pids.values())):
            time.sleep(0.01)
    code, output = sweep.wait()
    assert code == 0, output
    provenance = json.loads((trial_of(out) / "results.json").read_text())["provenance"]
    assert [(each["role"], each["reason"]) for each in provenance["failures"]] == [
        ("client_process_1", "was killed by SIGKILL")
    ] * 2
    assert len(provenance["runs"]) <= 3
    assert not (trial_of(out) / "failed.json").exists()
    assert results(out) == undisturbed(1500)


def test_what_fails_by_logic_is_not_retried(launch, run, tmp_path):
    options = ("--local_optimizer", "sgd", "--hparams", '{"learning_rate": 1e30}', "--num_hparams", "1", "--retries", "3")
    failed = launch(tmp_path / "out", *options)
    assert failed.returncode == 1 and "server diverged: diverged: " in failed.stderr
    assert failure(tmp_path / "out")["earlier"] == []
    status = run("sweep.py", "status", "--output_dir", tmp_path / "out", *options[:6])
    assert "  trial_0 failed: server diverged" in status.stdout
    assert launch(tmp_path / "out", *options).returncode == 1
    assert [each["reason"] for each in failure(tmp_path / "out")["earlier"]] == ["diverged"]


def test_a_resumed_trial_says_that_the_code_has_changed(tmp_path, copy_of_project):
    project, out = copy_of_project, tmp_path / "out"
    options = (*STATEFUL, "--rounds", "400")
    trial = kill_after(Sweep(out, *options, project=project), 5)
    with open(project / "federated" / "seeds.py", "a") as file:
        file.write("# a change that changes nothing\n")
    code, output = Sweep(out, *options, project=project).wait()
    assert code == 0, output
    assert "the code has changed since round 0: it was " in (trial / "server.log").read_text()
    runs = json.loads((trial / "results.json").read_text())["provenance"]["runs"]
    assert len({run["code"] for run in runs}) == 2


def test_a_checkpoint_of_another_trial_is_refused(run, tmp_path):
    out = tmp_path / "out"
    trial = kill_after(Sweep(out, *STATEFUL, "--rounds", "400"), 5)
    result = run("server_benchmark.py", "--output_dir", trial, "--trial_seed", 3, "--timeout", 5)
    assert result.returncode == 2
    assert "holds the checkpoint of a trial with other settings" in result.stderr.splitlines()[-1]


def test_a_client_with_other_code_than_its_server_is_refused(tmp_path, copy_of_project):
    with open(copy_of_project / "federated" / "seeds.py", "a") as file:
        file.write("# a change that changes nothing\n")
    command = [sys.executable, PROJECT / "server_benchmark.py", "--output_dir", tmp_path / "trial", "--timeout", "20"]
    server = subprocess.Popen([*command, "--client_processes", "1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    address = server.stdout.readline().split(" at ")[1].strip()
    client = subprocess.run(
        [sys.executable, copy_of_project / "client_benchmark.py", "--host", address],
        capture_output=True,
        text=True,
        check=False,
    )
    assert client.returncode == 2 and "the server runs other code (" in client.stderr
    _, error = server.communicate(timeout=30)
    assert server.returncode == 4 and "client process 0 is lost" in error
