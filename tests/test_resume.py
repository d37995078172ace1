"""A trial that was killed goes on from its checkpoint to the same results."""

import contextlib
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from helpers import (
    HUNG,
    PROJECT,
    STATEFUL,
    Sweep,
    call,
    failure,
    kill_after,
    launch,
    processes_of,
    results,
    trial_of,
    wait_until_dead,
)

import slurm_job
from federated.running import checkpoint
from federated.settings import Settings
from federated.trial import CHECKPOINT, CHECKPOINTS, DAMAGED, PREVIOUS, Trial

pytestmark = pytest.mark.process

ROUNDS = "120"
RARELY = ("--checkpoint_seconds", "10")  # a checkpoint a round takes most of the time


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """undisturbed(rounds) is what `results` gives of a trial that nothing happened to."""
    known = {}

    def run(rounds):
        if rounds not in known:
            out = tmp_path_factory.mktemp("undisturbed")
            launched = launch(functools.partial(call, out), out, *STATEFUL, "--rounds", rounds, *RARELY)
            assert launched.returncode == 0, launched.stderr
            known[rounds] = results(out)
            assert len(known[rounds]) == 1
        return known[rounds]

    return run


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    out = tmp_path_factory.mktemp("killed") / "out"
    kill_after(Sweep(out, *STATEFUL, "--rounds", ROUNDS), 10)
    return out


@pytest.fixture
def killed_copy(killed, tmp_path):
    """The directory of a sweep whose trial was killed after some rounds."""
    return shutil.copytree(killed, tmp_path / "out")


@pytest.mark.slow
def test_a_checkpoint_of_a_version_that_lacked_a_setting_is_one_of_its_default(killed_copy, launch_here, undisturbed):
    trial = trial_of(killed_copy)
    state, arrays = checkpoint.load(trial)
    for name in ("straggler_fraction", "dropout_fraction"):
        assert state["trial"].pop(name) == 0
    checkpoint.save(trial, state, arrays)
    launched = launch_here(killed_copy, *STATEFUL, "--rounds", ROUNDS)
    assert launched.returncode == 0, launched.stderr
    assert f"resumes after round {state['round']}" in (trial / "server.log").read_text()
    assert results(killed_copy) == undisturbed(ROUNDS)


def test_it_goes_on_where_it_was_to_the_same_bits(killed_copy, launch_here, undisturbed):
    trial = trial_of(killed_copy)
    assert {CHECKPOINT, PREVIOUS} & {path.name for path in trial.iterdir()}  # a kill may fall between the two renames
    state, _ = checkpoint.load(trial)
    launched = launch_here(killed_copy, *STATEFUL, "--rounds", ROUNDS, *RARELY)
    assert launched.returncode == 0, launched.stderr
    assert f"resumes after round {state['round']}" in (trial / "server.log").read_text()
    assert results(killed_copy) == undisturbed(ROUNDS)
    assert not {path.name for path in trial.iterdir()} & {*CHECKPOINTS, "lock"}  # a done trial keeps none
    runs = json.loads((trial / "results.json").read_text())["provenance"]["runs"]
    assert [run["round"] for run in runs] == [0, state["round"]]


@pytest.mark.parametrize("damage", ["truncated", "bit", "empty", "foreign"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(killed_copy, launch_here, tmp_path, undisturbed, damage):
    trial = trial_of(killed_copy)
    latest = trial / CHECKPOINT
    if not latest.exists():  # killed between the two renames
        shutil.copy(trial / PREVIOUS, latest)
    content = bytearray(latest.read_bytes())
    content[len(content) // 2] ^= 1
    damaged = {"truncated": content[: len(content) // 2], "bit": content, "empty": b"", "foreign": b"hello"}[damage]
    latest.write_bytes(damaged)
    before, _ = checkpoint.load(shutil.copytree(trial, tmp_path / "copy"))
    assert (tmp_path / "copy" / DAMAGED).read_bytes() == damaged
    launched = launch_here(killed_copy, *STATEFUL, "--rounds", ROUNDS, *RARELY)
    assert launched.returncode == 0, launched.stderr
    log = (trial / "server.log").read_text()
    assert f"{CHECKPOINT} is damaged" in log and f"resumes after round {before['round']}" in log
    assert results(killed_copy) == undisturbed(ROUNDS)


def test_with_both_damaged_it_starts_anew(killed_copy, launch_here, undisturbed):
    trial = trial_of(killed_copy)
    for name in (CHECKPOINT, PREVIOUS):
        (trial / name).write_bytes(b"PK\3\4")
    launched = launch_here(killed_copy, *STATEFUL, "--rounds", ROUNDS, *RARELY)
    assert launched.returncode == 0, launched.stderr
    assert "resumes after" not in (trial / "server.log").read_text()
    assert results(killed_copy) == undisturbed(ROUNDS)


@pytest.mark.slow
def test_kills_at_random_instants_do_not_change_a_bit(tmp_path, undisturbed, request):
    """`--kills 200` makes it long. Half of the kills hit single processes, which --retries outlives, half of them the sweep
    or all at once, also during start-up. A trial that is done before all kills are is followed by another one."""
    kills, seed = request.config.getoption("kills"), random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    command = (*STATEFUL, "--rounds", "500", "--retries", "1000")
    done = 0
    while done < kills:
        out = tmp_path / str(done)
        sweep = Sweep(out, *command)
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
                wait_until_dead(roles.values())
                sweep = Sweep(out, *command)
        code, output = sweep.wait()
        assert code == 0, output
        assert results(out) == undisturbed(500)


def test_what_fails_by_logic_is_not_retried(launch_here, call, tmp_path):
    options = ("--local_optimizer", "sgd", "--hparams", '{"learning_rate": 1e30}', "--num_hparams", "1", "--retries", "3")
    failed = launch_here(tmp_path / "out", *options)
    assert failed.returncode == 1 and "server diverged: diverged: " in failed.stderr
    assert failure(tmp_path / "out")["earlier"] == []
    status = call("sweep.py", "status", "--output_dir", tmp_path / "out", *options[:6])
    assert "  trial_0 failed: server diverged" in status.stdout
    assert launch_here(tmp_path / "out", *options).returncode == 0
    assert launch_here(tmp_path / "out", *options, "--again").returncode == 1
    assert [each["reason"] for each in failure(tmp_path / "out")["earlier"]] == ["diverged"]


@pytest.mark.slow
def test_a_resumed_trial_says_that_the_code_has_changed(tmp_path, copy_of_project):
    project, out = copy_of_project, tmp_path / "out"
    options = (*STATEFUL, "--rounds", "150")
    trial = kill_after(Sweep(out, *options, project=project), 5)
    with open(project / "federated" / "seeds.py", "a") as file:
        file.write("# a change that changes nothing\n")
    code, output = Sweep(out, *options, project=project).wait()
    assert code == 0, output
    assert "the code has changed since round 0: it was " in (trial / "server.log").read_text()
    runs = json.loads((trial / "results.json").read_text())["provenance"]["runs"]
    assert len({run["code"] for run in runs}) == 2


def test_a_checkpoint_of_another_trial_is_refused(call, killed_copy):
    result = call("server_benchmark.py", "--output_dir", trial_of(killed_copy), "--trial_seed", 3, "--timeout", 5)
    assert result.returncode == 2
    assert "holds the checkpoint of a trial with other settings" in result.stderr.splitlines()[-1]


@pytest.mark.slow
def test_a_client_with_other_code_than_its_server_is_refused(tmp_path, copy_of_project):
    with open(copy_of_project / "federated" / "seeds.py", "a") as file:
        file.write("# a change that changes nothing\n")
    command = [sys.executable, PROJECT / "server_benchmark.py", "--output_dir", tmp_path / "trial", "--timeout", "60"]
    server = subprocess.Popen([*command, "--client_processes", "1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    address = server.stdout.readline().split(" at ")[1].strip()
    client = subprocess.run(
        [sys.executable, copy_of_project / "client_benchmark.py", "--host", address],
        capture_output=True,
        text=True,
        check=False,
    )
    assert client.returncode == 2 and "the server runs other code (" in client.stderr
    _, error = server.communicate(timeout=HUNG)
    assert server.returncode == 4 and "client process 0 is lost" in error


def test_a_job_has_advanced_also_if_its_end_fell_between_two_renames(tmp_path):
    """Else it would not be requeued at its time limit."""
    trial = Trial(Settings(), {}, 0, 0, tmp_path)
    before = slurm_job.progress_marker(trial)
    (tmp_path / CHECKPOINT).write_bytes(b"")
    made = slurm_job.progress_marker(trial)
    os.replace(tmp_path / CHECKPOINT, tmp_path / PREVIOUS)
    assert before != made == slurm_job.progress_marker(trial)
