"""`sweep.py verify`: a share of a study is computed again, and every number compared."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile

import numpy as np
import pytest
from helpers import HUNG, PROJECT, make_trial, processes_of, wait_until, wait_until_dead, without_the_power_of_root

from federated.metrics import weighted_mean
from federated.reporting.verification import done_trials, share_of
from federated.settings import Settings
from federated.trial import hparams_hash
from federated.version import CODE

pytestmark = pytest.mark.process


def state_of(out):
    """What lies in a directory, and when it was written."""
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None) for path in out.rglob("*")}


def tamper(trial, name, place, change):
    """Change the values at a `place` of an array of clients.npz, and have its curve in results.json say the same."""
    content = json.loads((trial / "results.json").read_text())
    with np.load(trial / "clients.npz") as members:
        clients = dict(members)
    before, samples = clients[name].copy(), clients[f"{name.partition('_')[0]}_samples"]
    clients[name][place] = change(before[place])
    np.savez_compressed(trial / "clients.npz", **clients)
    for round in np.flatnonzero((clients[name] != before).any(axis=0)):
        content["curves"][name][round] = float(weighted_mean(clients[name][:, round], samples))
    (trial / "results.json").write_text(json.dumps(content))


def test_a_whole_study_is_the_same_bits(launch_here, call, tmp_path):
    """Of several algorithms, of a sweep that was extended and of a trial in it that was not."""
    out = tmp_path / "out"
    options = ("--algorithm", "Fedavg", "Ditto", "--eval_every", 3, "--num_clients", 3, "--participation", 0.67)
    assert launch_here(out, *options, "--rounds", 4, "--keep_checkpoints").returncode == 0
    assert launch_here(out, *options, "--rounds", 5, "--num_hparams", 1).returncode == 0
    before = state_of(out)
    verified = call("sweep.py", "verify", "--output_dir", out, "--fraction", 1)
    assert (verified.returncode, verified.stdout) == (0, "4 of 4 trials: the same bits\n"), verified.stderr
    assert "About to compute 4 of 4 trials again, of 18 rounds in all." in verified.stderr and state_of(out) == before
    chosen = call("sweep.py", "verify", "--output_dir", out, "--algorithm", "ditto", "--fraction", 0.01)
    assert chosen.stdout == "1 of 1 trials: the same bits\n" and "of 2 trials" in chosen.stderr
    assert call("sweep.py", "verify", "--output_dir", out, "--algorithm", "Moon").returncode == 1


def test_a_changed_number_is_named(run, call, finished_copy):
    """In a real process. Results that were computed by other code are compared all the same, and so said."""
    first, second = sorted(path.parent for path in finished_copy.rglob("results.json"))

    tamper(first, "train_loss", (slice(None), 1), lambda values: values + 0.5)
    content = json.loads((first / "results.json").read_text())
    content["provenance"]["runs"][0].update(code="f00", processor="an abacus", devices=["beads"])
    (first / "results.json").write_text(json.dumps(content))
    verified = run("sweep.py", "verify", "--output_dir", finished_copy, "--fraction", 1)
    assert verified.returncode == 1, verified.stderr
    lines = verified.stdout.splitlines()
    assert lines[0] == f"{first}:" and lines[1:3] == [
        "  train_loss: since round 2, by at most 0.5", "  train_loss of clients: since round 2, by at most 0.5",
    ]  # fmt: skip
    assert lines[3].startswith("  then: code f00, version ") and lines[3].endswith("an abacus, beads")
    assert lines[4].startswith(f"  now: code {CODE}, version ") and ", torch " in lines[4] and lines[4].endswith(", cpu")
    assert lines[5:] == [
        "1 of 2 trials: the same bits",
        f"Other code computed 1 of them before; the digest of this code is {CODE}.",
    ]

    (second / "clients.npz").write_bytes((second / "clients.npz").read_bytes()[:-30])
    verified = call("sweep.py", "verify", "--output_dir", finished_copy, "--fraction", 1)
    assert verified.returncode == 1 and verified.stdout.splitlines()[-2] == "0 of 2 trials: the same bits"
    assert f"{second}:\n  cannot be read: " in verified.stdout


def test_a_missing_value_and_an_initial_one_are_named(call, finished_copy):
    first, second = sorted(path.parent for path in finished_copy.rglob("results.json"))
    tamper(first, "train_acc", (0, 0), lambda _: np.nan)
    content = json.loads((second / "results.json").read_text())
    (second / "results.json").write_text(json.dumps(content | {"initial_test_acc": content["initial_test_acc"] + 0.25}))
    out = call("sweep.py", "verify", "--output_dir", finished_copy, "--fraction", 1).stdout
    assert "train_acc of clients: since round 1, by at most 0; 1 values are missing in one of them" in out
    assert "test_acc: since round 0, by at most 0.25" in out and "0 of 2 trials: the same bits" in out


def test_the_share_is_a_function_of_the_study(tmp_path):
    for setting in range(4):
        for trial in range(5):
            make_trial(tmp_path, setting, trial, [[0.1] * 2] * 2, [0.1] * 2)
    done = done_trials([Settings(rounds=2)], tmp_path)
    assert len(done) == 20 and {settings.rounds for _, settings in done} == {2}
    shares = {fraction: [path for path, _ in share_of(done, fraction)] for fraction in (1e-9, 0.1, 0.5, 1)}
    assert [len(share) for share in shares.values()] == [1, 2, 10, 20]
    assert all(set(small) <= set(large) for small, large in zip(list(shares.values()), list(shares.values())[1:]))
    moved = [(pathlib.Path("elsewhere", *path.parts[-3:]), settings) for path, settings in reversed(done)]
    assert [path.parts[-3:] for path, _ in share_of(moved[::-1], 0.5)] == [path.parts[-3:] for path in shares[0.5]]
    assert shares[0.5] != [path for path, _ in done[:10]]


@pytest.mark.slow
def test_a_study_that_may_only_be_read(run, finished_copy):
    for path in (*finished_copy.rglob("*"), finished_copy):
        path.chmod(0o555 if path.is_dir() else 0o444)
    verified = run("sweep.py", "verify", "--output_dir", finished_copy, preexec_fn=without_the_power_of_root)
    assert (verified.returncode, verified.stdout) == (0, "1 of 1 trials: the same bits\n"), verified.stderr


def test_what_cannot_be_computed_is_one_line(call, tmp_path):
    make_trial(tmp_path / "out", 0, 0, [[0.1] * 2] * 2, [0.1] * 2, settings=Settings(dataset="mnist"))
    refused = call("sweep.py", "verify", "--output_dir", tmp_path / "out", "--data_dir", tmp_path / "none")
    assert refused.returncode == 2 and refused.stdout == "" and "mnist" in refused.stderr.splitlines()[-1]
    dry = call("sweep.py", "verify", "--output_dir", tmp_path / "out", "--command_launcher", "dry_run")
    assert dry.returncode == 2 and "dry_run computes nothing" in dry.stderr
    none = call("sweep.py", "verify", "--output_dir", tmp_path / "nothing")
    assert none.returncode == 1 and "No finished trials in " in none.stderr


def test_a_trial_that_fails_when_computed_again_is_named(call, tmp_path):
    trial = make_trial(tmp_path, 0, 0, [[0.1] * 2] * 2, [0.1] * 2, settings=Settings(local_optimizer="sgd"))
    content = json.loads((trial / "results.json").read_text())
    content["hparams"]["learning_rate"] = 1e30
    (trial / "results.json").write_text(json.dumps(content))
    renamed = trial.parent.rename(trial.parents[1] / hparams_hash(content["hparams"])) / trial.name
    verified = call("sweep.py", "verify", "--output_dir", tmp_path, "--fraction", 1)
    assert verified.returncode == 1
    assert f"{renamed}:\n  could not be computed again: server diverged" in verified.stdout


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["verify", "trial"])
def test_an_interrupted_verification_leaves_nothing(tmp_path, victim):
    out = tmp_path / "out"
    make_trial(out, 0, 0, [[0.1] * 20_000] * 2, [0.1] * 20_000)
    before = state_of(out)
    with tempfile.TemporaryDirectory(prefix="t-") as temporary:
        process = subprocess.Popen(
            [sys.executable, PROJECT / "sweep.py", "verify", "--output_dir", out, "--jobs", "1"],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "TMPDIR": temporary},
        )  # fmt: skip

        def running():
            for log in pathlib.Path(temporary).glob("*/*/*/trial_0/server.log"):
                if "round" in log.read_text():
                    return processes_of(log.parent)

        pids = wait_until(running)
        os.kill(process.pid if victim == "verify" else pids["server"], signal.SIGINT if victim == "verify" else signal.SIGKILL)
        output, errors = process.communicate(timeout=HUNG)
        wait_until_dead(pids.values())
        assert os.listdir(temporary) == [] and state_of(out) == before
    if victim == "verify":
        assert process.returncode == 130 and output == "" and "nothing is left behind" in errors
    else:
        assert process.returncode == 1 and "could not be computed again: server was killed by SIGKILL" in output
