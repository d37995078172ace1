"""What only a GPU can show: bash run_tests.sh --gpu."""

import json

import numpy as np
import pytest
import torch
from helpers import STATEFUL, Sweep, failure, kill_after, results, trial_of
from pretended_device import CASES, prepare, two_rounds

from federated.algorithms.fedavg import Fedavg
from federated.learning.captured import CapturedSteps, is_capturable

DEVICE = "cuda"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.process,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs --gpu and a CUDA device"),
]

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))


def losses(reports):
    return [each["loss"] for each in reports]


@each_case
def test_a_gpu_gives_what_the_cpu_gives_and_the_same_bits_again(case):
    torch.set_num_threads(1)
    prepared = [prepare(device, **case, hparams={"dropout_rate": 0.0}) for device in ("cpu", DEVICE, DEVICE)]
    cpu, gpu, again = (two_rounds(*each) for each in prepared)
    assert gpu == again
    assert np.array_equal(prepared[1][1].updates, prepared[2][1].updates)
    np.testing.assert_allclose(losses(gpu), losses(cpu), rtol=1e-2)


@each_case
def test_captured_steps_give_what_others_give_and_the_same_bits_again(case, monkeypatch, capsys):
    """With dropout, whose draws are those of a step without a graph."""
    captured, again = prepare(DEVICE, **case), prepare(DEVICE, **case)
    monkeypatch.setattr(Fedavg, "may_be_captured", False)
    plain = prepare(DEVICE, **case)
    replayed = two_rounds(*captured)
    assert replayed == two_rounds(*again)
    assert np.array_equal(captured[1].updates, again[1].updates)
    np.testing.assert_allclose(losses(replayed), losses(two_rounds(*plain)), rtol=1e-3)
    monkeypatch.undo()
    steps = captured[0].backward
    assert isinstance(steps, CapturedSteps) == is_capturable(captured[0].algorithm)
    assert not isinstance(plain[0].backward, CapturedSteps)
    assert not isinstance(steps, CapturedSteps) or steps.is_capturing, capsys.readouterr().err


def test_a_model_that_cannot_be_captured_trains_without(monkeypatch, capsys):
    """It waits for the device in its forward pass; dropout, which a failed capture may leave unusable, is in it."""

    class Waiting(torch.nn.Sequential):
        def forward(self, inputs):
            assert inputs.sum().item() != 0.123
            return super().forward(inputs)

    def build(*_):
        torch.manual_seed(0)
        return Waiting(torch.nn.Flatten(), torch.nn.Dropout(0.5), torch.nn.Linear(64, 10))

    monkeypatch.setattr("federated.models.build", build)
    reports = []
    for _ in range(2):
        worker, *rest = prepare(DEVICE, "Fedavg", hparams={"batch_size": 16})
        reports.append(two_rounds(worker, *rest))
        assert not worker.backward.is_capturing
    monkeypatch.setattr(Fedavg, "may_be_captured", False)
    assert reports[0] == reports[1] == two_rounds(*prepare(DEVICE, "Fedavg", hparams={"batch_size": 16}))
    assert "training steps run without CUDA graphs, as capturing one failed" in capsys.readouterr().err


def launched(launch, out, *options):
    done = launch(out, "--device", DEVICE, "--model_arch", "2nn", *options)
    assert done.returncode == 0, done.stderr
    for log in out.rglob("client_process_*.log"):
        assert "without CUDA graphs" not in log.read_text()
    for path in out.rglob("results.json"):
        assert set(json.loads(path.read_text())["provenance"]["devices"]) == {torch.cuda.get_device_name()}
    return results(out)


def test_trials_have_the_same_bits_however_many_run_at_once_and_by_how_many_processes(launch, tmp_path):
    """Fedavg's steps are captured, Moon's are not."""
    size = ("--algorithm", "Fedavg", "Moon", "--num_hparams", 1, "--num_trials", 3, "--samples_per_client", 200, "--rounds", 5)
    alone = launched(launch, tmp_path / "alone", *size, "--client_processes", 1)
    together = launched(launch, tmp_path / "together", *size, "--client_processes", 2, "--trials_per_device", 3)
    assert alone == together and len(alone) == 6


def test_a_trial_that_was_killed_goes_on_to_the_same_bits(launch, tmp_path):
    size = (*STATEFUL, "--rounds", "200", "--model_arch", "2nn", "--device", DEVICE)
    kill_after(Sweep(tmp_path / "killed", *size), 20)
    undisturbed = launched(launch, tmp_path / "undisturbed", *size)
    assert launched(launch, tmp_path / "killed", *size) == undisturbed
    assert "resumes after round" in (trial_of(tmp_path / "killed") / "server.log").read_text()


def test_bf16(launch, tmp_path):
    size = ("--precision", "bf16", "--num_hparams", 1, "--samples_per_client", 600, "--rounds", 10)
    first, second = (launched(launch, tmp_path / name, *size) for name in ("first", "second"))
    assert first == second
    ((_, content),) = first.items()
    assert content["curves"]["test_acc"][-1] > content["curves"]["test_acc"][0] + 0.2


def test_memory_that_others_hold_is_named_and_the_trial_runs_once_they_are_gone(launch, tmp_path):
    size = ("--num_hparams", 1, "--device", DEVICE)
    launched(launch, tmp_path / "roomy", *size)
    torch.cuda.empty_cache()
    held = torch.empty(torch.cuda.mem_get_info()[0] - (200 << 20), dtype=torch.uint8, device=DEVICE)
    done = launch(tmp_path / "out", *size)
    assert done.returncode == 1, done.stderr
    assert failure(tmp_path / "out")["reason"].startswith("ran out of the GPU's memory (")
    del held
    torch.cuda.empty_cache()
    done = launch(tmp_path / "out", *size)
    assert done.returncode == 0, done.stderr
