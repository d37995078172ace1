"""benchmarks/gpu.sh, on a CPU."""

import importlib
import json
import os
import re
import subprocess
import sys

import pytest
from helpers import HUNG, PROJECT

GPU = PROJECT / "benchmarks" / "gpu"


def gpu_sh(tmp_path, *arguments, **environment):
    command = ["bash", PROJECT / "benchmarks" / "gpu.sh", "--output", tmp_path / "results.jsonl", *arguments]
    environment = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=HUNG, check=False, cwd=tmp_path, env=environment)


@pytest.mark.slow
@pytest.mark.process
def test_all_parts_run_on_a_cpu(tmp_path):
    """Beside a pfl that is broken: what was measured before it is kept, and the part after it runs."""
    (tmp_path / "pfl").mkdir()
    (tmp_path / "pfl" / "__init__.py").write_text("raise ImportError('broken')")
    done = gpu_sh(tmp_path, "--device", "cpu", "--tiny", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1 and "pfl: failed with exit code 1" in done.stdout, done.stdout + done.stderr
    assert "ImportError: broken" in done.stderr and "4 of 5 parts worked" in done.stdout
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys(line["part"] for line in lines)) == ["tests", "steps", "at_once", "pfl", "headline"]
    assert {"captured arithmetic", "plain loop"} < {line["way"] for line in lines if line["part"] == "pfl"}
    assert all(line["passed"] == line["of"] > 0 for line in lines if line["part"] == "tests")


@pytest.mark.process
def test_a_part_that_does_not_exist_and_a_gpu_that_does_not(tmp_path):
    unknown = gpu_sh(tmp_path, "step")
    assert (
        unknown.returncode == 2 and "unknown part 'step': the parts are tests, steps, at_once, pfl, headline" in unknown.stderr
    )
    absent = gpu_sh(tmp_path, "steps", CUDA_VISIBLE_DEVICES="")
    assert absent.returncode == 1 and "torch finds no CUDA device here; --device cpu --tiny" in absent.stderr


@pytest.fixture
def decisions(monkeypatch):
    """decisions(module, rows) of one of the parts."""
    monkeypatch.syspath_prepend(GPU)
    yield lambda module, rows: list(importlib.import_module(module).decisions(rows))
    for name in ("common", "steps", "at_once", "headline", "comparison", "gpu_tests"):
        sys.modules.pop(name, None)


def step(model, batch, way, milliseconds, **more):
    return {"model": model, "batch": batch, "way": way, "ms_a_step": milliseconds, "peak_mb": 1, **more}


def test_what_follows_from_the_time_of_steps(decisions):
    rows = [
        step("lenet", 10, "eager", 1.0),
        step("lenet", 10, "captured", 0.1, differs_by=0.0),
        step("resnet18", 64, "eager", 2.0),
        step("resnet18", 64, "captured", 3.2, differs_by=1e-7),
        {"model": "lenet", "batch": 10, "way": "captured", "launches_a_step": 8.0},
        {"model": "8 MB update", "way": "as it is", "GB_a_second": 3.0},
        {"model": "8 MB update", "way": "registered", "GB_a_second": 24.0},
    ]
    assert decisions("steps", rows) == [
        "a captured step takes 0.40 of another (geometric mean): keep it",
        "captured is slower for resnet18 at 64: capture only what is launch-bound, by the size of the batch",
        "lenet at batch 10: 0.10 of today's, wanted at most 0.20: met",
        "captured steps give other last bits than others for resnet18 at 64: say so in docs/gpu.md",
        "updates are copied 8.0 times as fast into registered memory: register the rows of updates",
    ]
    assert decisions("steps", [step("lenet", 10, "eager", 1.0)]) == ["nothing was captured, so nothing follows"]


def test_what_follows_from_trials_at_once(decisions):
    rates = {"lenet": {1: 100, 2: 190, 4: 350, 8: 500, 16: 520}, "resnet18": {1: 60, 2: 66, 4: 65}}
    rows = [{"model": m, "at_once": n, "trials_an_hour": r} for m, of_model in rates.items() for n, r in of_model.items()]
    assert decisions("at_once", rows) == [
        "lenet: 8 at once give at least 0.9 of the most trials an hour, 5.2 times those of one",
        "resnet18: 1 at once give at least 0.9 of the most trials an hour, 1.1 times those of one",
        "the default of --trials_per_device: 1; docs/gpu.md gets the table",
        "8 trials of lenet at once: 5.0 times those of one, wanted 4: met",
    ]


def test_what_follows_from_other_frameworks(decisions):
    minutes = {
        "this sweep, 1 client processes": 3.0,
        "this sweep, 2 client processes": 2.9,
        "captured arithmetic": 1.5,
        "pfl": 12.0,
    }
    rows = [{"way": way, "minutes_of_1500_rounds": value} for way, value in minutes.items()]
    assert decisions("comparison", rows) == [
        "more client processes on the device gain nothing: one stays the default",
        "this sweep takes 1.93 of the time of captured arithmetic, wanted at most 1.50: not met",
        "this sweep takes 0.24 of the time of pfl, wanted at most 0.33: met",
    ]


def test_the_projection_of_the_headline(decisions):
    rows = [
        {"precision": "fp32", "batch_size": size, "s_a_round": 1.0, "s_start": 2.0, "s_trial": 5.0} for size in (64, 38, 423)
    ]
    rows += [{"precision": "fp32", "s_launch_itself": 9.0}]
    rows += [{"precision": "bf16", "batch_size": 64, "s_a_round": 0.5, "s_start": 2.0, "s_trial": 4.0}]
    first, second = decisions("headline", rows)
    arithmetic = "9.0 s + 3 trials x (6.0 s of starts + 50 rounds x 3.00 s, of 3 sets)"
    assert first == f"fp32: {arithmetic} = 8.0 minutes one after another, wanted 10: met"
    assert re.search(r"bf16 takes 0\.50 of fp32's time", second)
