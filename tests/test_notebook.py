"""What a notebook does, which has no script of its own, as a program that Python reads from its standard input; and what a
script does that calls a command without asking whether it is the main one."""

import json
import os
import subprocess
import sys

import pytest
from helpers import HUNG, PROJECT

import collect_results
from federated.settings import Settings

PROGRAM = """
import signal, sys
import sweep
from collect_results import collect
before = signal.getsignal(signal.SIGINT)
options = ["--rounds", "2", "--samples_per_client", "40", "--num_hparams", "2", "--num_trials", "2", "--num_clients", "3"]
options += ["--participation", "0.67", "--output_dir", sys.argv[1], "--skip_confirmation"]
assert sweep.main(["launch", *options]) == 0 and sweep.main(["launch", *options]) == 0
assert signal.getsignal(signal.SIGINT) is before

study = collect([sys.argv[1]])
rounds, clients = study.frame(), study.clients()

import json
print("NUMBERS", json.dumps({"rounds": len(rounds), "clients": len(clients), "alike": bool(
    clients.dropna(subset=["train_loss"]).groupby(["hash", "trial_seed", "round"]).apply(
        lambda rows: (rows["train_loss"] * rows["train_samples"]).sum() / rows["train_samples"].sum()
    ).sub(rounds.set_index(["hash", "trial_seed", "round"])["train_loss"]).abs().max() < 1e-5
), "columns": list(rounds)[:6]}))
"""


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("is_script", [False, True])
def test_a_notebook_launches_a_study_and_has_its_frames(tmp_path, is_script):
    (tmp_path / "my study.py").write_text(PROGRAM)
    command = [sys.executable, str(tmp_path / "my study.py") if is_script else "-", str(tmp_path / "out")]
    done = subprocess.run(
        command, input=None if is_script else PROGRAM, capture_output=True, text=True, timeout=HUNG, check=False,
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(PROJECT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("NUMBERS"))
    assert json.loads(line.removeprefix("NUMBERS ")) == {
        "rounds": 2 * 2 * 2, "clients": 3 * 2 * 2 * 2, "alike": True,
        "columns": ["sweep", "model_arch", "dataset", "algorithm", "num_clients", "rounds"],
    }  # fmt: skip


def test_the_frames_of_an_empty_directory_are_empty(tmp_path):
    study = collect_results.collect([tmp_path])
    assert study.frame().empty and study.clients().empty and set(vars(Settings())) < set(study.frame())
