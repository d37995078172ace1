"""Natural federations: LEAF's files, the owners that take part, sequences, and domains."""

import bz2
import dataclasses
import functools
import hashlib
import json
import os

import numpy as np
import pytest
import torch
from helpers import call, launch, results
from in_process import SEED, pixels
from leaf_files import write_leaf
from PIL import Image
from torch.nn import functional

from federated import models
from federated.data import datasets, leaf, partition
from federated.data.leaf import CHARACTERS
from federated.learning.evaluation import BLOCK, EvaluationPlan
from federated.options import UsageError
from federated.seeds import stream_seed
from federated.settings import Settings

SIZES = [(12, 3), (7, 2), (1, 0), (30, 6), (2, 1)]
PARTS = ("train", "test")


@pytest.mark.parametrize("name", ["femnist", "shakespeare"])
def test_leafs_files_are_read_by_user(tmp_path, name):
    """Users in their order, whichever files they are in."""
    written = write_leaf(tmp_path, name, SIZES)
    data = datasets.load(name, tmp_path)
    assert data.spec.num_owners == 5
    for part in PARTS:
        inputs, labels, owners = (getattr(data, f"{part}_{what}") for what in ("inputs", "labels", "owners"))
        assert inputs.dtype == np.uint8 and inputs.shape[1:] == data.spec.shape
        for owner, size in enumerate(SIZES):
            mine, user = owners == owner, written[part].get(f"u{owner:05}", {"x": [], "y": []})
            assert mine.sum() == size[part == "test"]
            if name == "femnist":
                assert np.array_equal(inputs[mine].reshape(-1, 784) / 255, np.reshape(user["x"], (-1, 784)))
                assert labels[mine].tolist() == user["y"]
            else:
                assert ["".join(CHARACTERS[each] for each in row) for row in inputs[mine]] == user["x"]
                assert [CHARACTERS[each] for each in labels[mine]] == user["y"]


def test_leafs_alphabet_has_80_characters():
    assert len(CHARACTERS) == len(set(CHARACTERS)) == 80 and list(CHARACTERS) == sorted(CHARACTERS)


def test_leafs_files_are_read_once_until_they_change(tmp_path, monkeypatch):
    """Whatever else has their name is no file of theirs."""
    write_leaf(tmp_path, "shakespeare", SIZES)
    folder = tmp_path / "shakespeare/data/train"
    os.mkfifo(folder / "pipe.json")
    (folder / "device.json").symlink_to("/dev/zero")
    (folder / "notes.txt").write_text("no JSON")
    before = datasets.load("shakespeare", tmp_path)
    assert isinstance(before.train_inputs, np.memmap)
    with monkeypatch.context() as patch:
        patch.setattr(leaf, "read_regular", lambda *anything: pytest.fail("it was read anew"))
        assert np.array_equal(datasets.load("shakespeare", tmp_path).train_inputs, before.train_inputs)
    path = min(folder.glob("all*.json"))
    path.write_text(path.read_text().replace('"users"', ' "users"'))
    monkeypatch.setattr(leaf, "MAX_BYTES", path.stat().st_size - 1)
    with pytest.raises(UsageError, match=r"'shakespeare': .*all_data_0_train_9.json' is no file of LEAF's: it is larger than"):
        datasets.load("shakespeare", tmp_path)


def of(x, y, **more):
    return {"users": ["a"], "num_samples": [len(y)], "user_data": {"a": {"x": x, "y": y}}, **more}


TEXT, IMAGE = "a" * 80, [0.0] * 784
WRONG = {
    "no JSON": ("femnist", "{", "Expecting property name"),
    "no object": ("femnist", "[1]", 'it has no "user_data"'),
    "deep": ("femnist", "[" * 100_000, "recursion"),
    "no users": ("femnist", {"user_data": {"a": {"x": [], "y": []}}}, 'its "users" are not those'),
    "other users": ("femnist", of([], [], users=["b"]), 'its "users" are not those'),
    "users of no kind": ("femnist", of([], [], users=[[]]), "unhashable"),
    "no samples of a user": ("femnist", {"users": ["a"], "user_data": {"a": {"x": []}}}, 'it has no "user_data" of users'),
    "unlike numbers": ("femnist", of([IMAGE], []), "a user has 1 samples and 0 labels"),
    "small image": ("femnist", of([IMAGE[1:]], [0]), "reshape"),
    "ragged": ("femnist", of([IMAGE, IMAGE[1:]], [0, 0]), "inhomogeneous"),
    "no pixel": ("femnist", of([[None] * 784], [0]), "a pixel is not one of the 256 greys"),
    "bright": ("femnist", of([[1.1] * 784], [0]), "a pixel is not one of the 256 greys"),
    "huge": ("femnist", of([[10**400] * 784], [0]), "too large"),
    "not a number": ("femnist", of([[float("nan")] * 784], [0]), "a pixel is not one of the 256 greys"),
    "no class": ("femnist", of([IMAGE], [62]), "a label is not a whole number from 0 to 61"),
    "half a class": ("femnist", of([IMAGE], [0.5]), "a label is not a whole number from 0 to 61"),
    "short": ("shakespeare", of([TEXT[1:]], ["a"]), "a sample is not a text of 80 characters"),
    "two characters": ("shakespeare", of([TEXT], ["ab"]), "a sample is not a text of 1 characters"),
    "a stranger": ("shakespeare", of([TEXT[1:] + "ä"], ["a"]), "the character 'ä', which is none of LEAF's 80"),
    "half a character": ("shakespeare", of([TEXT[1:] + "\ud800"], ["a"]), "surrogates"),
    "no text": ("shakespeare", of([1], ["a"]), "a sample is not a text"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_file_that_is_not_of_leafs_form_is_one_line(tmp_path, case):
    name, content, message = WRONG[case]
    write_leaf(tmp_path, name, SIZES[:2])
    path = tmp_path / name / "data/test/more.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UsageError) as error:
        datasets.load(name, tmp_path)
    text = str(error.value)
    assert text.startswith(f"dataset {name!r}: {str(path)!r} is no file of LEAF's: ") and message in text and "\n" not in text
    path.unlink()
    assert len(datasets.load(name, tmp_path).train_labels) == 19


def test_a_user_in_two_files_is_named(tmp_path):
    write_leaf(tmp_path, "shakespeare", SIZES)
    folder = tmp_path / "shakespeare/data/train"
    (folder / "again.json").write_bytes(min(folder.glob("*.json")).read_bytes())
    with pytest.raises(UsageError, match="user 'u00003' is in another file, too"):
        datasets.load("shakespeare", tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--dataset", "femnist"), "no samples are in 'data/femnist/data/train': put the .json files there that LEAF's"),
        (
            ("--dataset", "shakespeare", "--model_arch", "mlp"),
            "--model_arch mlp does not fit sequences of 80: it takes no sequences",
        ),
        (("--dataset", "shakespeare", "--model_arch", "resnet50"), "does not fit sequences of 80: it takes images only"),
        (
            ("--dataset", "femnist", "--model_arch", "lstm"),
            "--model_arch lstm does not fit 1x28x28 images: it takes sequences only",
        ),
        (
            ("--dataset", "digits", "--model_arch", "lstm"),
            "--model_arch lstm does not fit 1x8x8 images: it takes sequences only",
        ),
        (("--dataset", "shakespeare", "--augmentation", "crop_flip"), "does not fit sequences of 80: it takes images only"),
        (("--dataset", "shakespeare", "--num_clients", "5"), "natural 4 owners of shakespeare have enough samples to train on"),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path, options, message):
    write_leaf(tmp_path / "data", "shakespeare", SIZES)
    result = call(tmp_path, "sweep.py", "launch", "--skip_confirmation", *options)
    assert result.returncode == 2 and message in result.stderr.splitlines()[-1], result.stderr
    assert not (tmp_path / "sweep_logs").exists()


# The owners that take part


def test_clients_are_owners_drawn_by_seed(tmp_path):
    """Those that can train; the test set is theirs."""
    write_leaf(tmp_path, "shakespeare", SIZES)
    data = datasets.load("shakespeare", tmp_path)
    settings, chosen = Settings(dataset="shakespeare", num_clients=2), set()
    for seed in range(40):
        splits = partition.split(data, settings, seed)
        owners = [np.unique(data.train_owners[np.concatenate([each.train, each.val])]) for each in splits]
        assert [len(each) for each in owners] == [1, 1]
        chosen.add(tuple(int(each[0]) for each in owners))
        for each, (owner,) in zip(splits, owners):
            assert len(each.train) + len(each.val) == SIZES[owner][0]
            assert each.test.tolist() == np.flatnonzero(data.test_owners == owner).tolist()
        tested = partition.test_set(data, settings, splits)
        assert tested.tolist() == sorted([*splits[0].test, *splits[1].test])
        plan = EvaluationPlan(splits, tested, personal=False)
        rows = np.zeros((len(plan.blocks), 2, BLOCK), np.float32)
        rows[0, 0, : len(tested)] = tested  # a sample's loss is its number
        losses = plan.metrics(rows)["local_test"][0]
        assert losses.tolist() == [each.test.mean() for each in splits]
    assert chosen == {(a, b) for a in (0, 1, 3, 4) for b in (0, 1, 3, 4) if a < b}
    everybody = Settings(dataset="shakespeare", num_clients=4, partition="iid")
    assert len(partition.test_set(data, everybody, partition.split(data, everybody, 0))) == len(data.test_labels)


def test_several_clients_share_an_owner_evenly():
    data = datasets.load("heart_disease", "data")
    splits = partition.split(data, Settings(dataset="heart_disease", num_clients=12), 0)
    for part, whole in (("train", [199, 172, 30, 85]), ("test", [104, 89, 16, 45])):
        seen = [np.concatenate([each.train, each.val]) if part == "train" else each.test for each in splits]
        for owner in range(4):
            shares = seen[3 * owner : 3 * owner + 3]
            assert np.ptp([len(each) for each in shares]) <= 1
            assert np.array_equal(np.sort(np.concatenate(shares)), np.flatnonzero(getattr(data, f"{part}_owners") == owner))
            assert sum(map(len, shares)) == whole[owner]


def test_owners_without_test_samples_are_refused(tmp_path):
    """As of LEAF's split by user."""
    write_leaf(tmp_path, "shakespeare", [(5, 0), (6, 0), (0, 7)])
    data = datasets.load("shakespeare", tmp_path)
    with pytest.raises(UsageError, match="none of the owners that train has test samples; give another --partition"):
        partition.split(data, Settings(dataset="shakespeare", num_clients=2), 0)
    partition.split(data, Settings(dataset="shakespeare", num_clients=2, partition="iid"), 0)


# Training


@pytest.fixture
def leaf_data(tmp_path, monkeypatch):
    """The test runs beside data of LEAF's form, which --data_dir names by default."""
    monkeypatch.chdir(tmp_path)
    for name in ("femnist", "shakespeare"):
        write_leaf(tmp_path / "data", name, SIZES)


PLAIN = {"batch_size": 1000, "dropout_rate": 0.0, "learning_rate": 0.5}


@pytest.mark.parametrize(("name", "model"), [("femnist", "cnn_femnist"), ("shakespeare", "lstm")])
def test_full_batches_make_a_step_of_gradient_descent(leaf_data, train, name, model):
    run = train("Fedavg", PLAIN, dataset=name, model_arch=model, num_clients=3, samples_per_client=None, rounds=1)
    data = datasets.load(name, "data")
    splits = partition.split(data, run.settings, SEED)
    indices = np.concatenate([each.train for each in splits])
    if name == "femnist":
        inputs, labels = pixels(data, indices)
    else:
        inputs, labels = (
            torch.from_numpy(data.train_inputs[indices].astype(np.int64)),
            torch.from_numpy(data.train_labels[indices]),
        )
    reference = models.build(model, data.spec, 0.0, stream_seed(SEED, "model"))
    functional.cross_entropy(reference(inputs), labels).backward()
    start = torch.nn.utils.parameters_to_vector(reference.parameters())
    moved = torch.cat([-PLAIN["learning_rate"] * each.grad.flatten() for each in reference.parameters()])
    assert (run.broadcast[0] - start - moved).norm() < 1e-3 * moved.norm()
    curves = json.loads((run.trial.directory / "results.json").read_text())["curves"]
    assert curves["test_acc"] == pytest.approx(curves["local_acc_weighted"])  # the test set is the clients' own


def test_an_lstm_trains_under_bf16(leaf_data, train, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)  # others emulate it
    options = {"dataset": "shakespeare", "num_clients": 2, "samples_per_client": 6}
    run, exact = (train("Fedavg", PLAIN, precision=precision, **options).broadcast[0] for precision in ("bf16", "fp32"))
    assert not torch.equal(run, exact)
    torch.testing.assert_close(run, exact, rtol=0.1, atol=0.05)


ALGORITHMS = ("Moon", "Fedntd", "Fedlc", "Feddecorr", "Fedper", "Lgfedavg", "Fedbabu", "Fedala", "Fedbn", "Centralized")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_algorithms_that_look_into_models_train_on_sequences(leaf_data, train, algorithm):
    run = train(algorithm, dataset="shakespeare", num_clients=2, samples_per_client=6, rounds=2)
    assert run.settings.model_arch == "lstm" and torch.isfinite(run.broadcast).all()


@pytest.mark.slow
@pytest.mark.process
def test_a_sweep_over_users_has_the_same_bits_for_any_number_of_processes(leaf_data, tmp_path):
    start = functools.partial(call, tmp_path)
    options = (
        "--dataset",
        "shakespeare",
        "--samples_per_client",
        10,
        "--num_clients",
        4,
        "--participation",
        0.5,
        "--algorithm",
        "Fedavg",
        "Ditto",
    )
    for processes in (1, 2):
        launched = launch(start, tmp_path / str(processes), *options, "--client_processes", processes)
        assert launched.returncode == 0, launched.stderr
    assert len(results(tmp_path / "1")) == 4 and results(tmp_path / "1") == results(tmp_path / "2")
    shown = call(tmp_path, "sweep.py", "show_partition", "--dataset", "shakespeare", "--num_clients", "3")
    assert shown.returncode == 0 and len(shown.stdout.splitlines()) == 2 + 3 + 1
    table = call(tmp_path, "collect_results.py", "--output_dir", "1")
    assert table.returncode == 0 and "| lstm " in table.stdout, table.stderr


def test_own_sequences_are_checked(monkeypatch):
    """Of any whole numbers below num_tokens."""

    def load(values, kind=np.int32):
        sequences = np.array(values, dtype=kind)
        arrays = {"train_inputs": sequences, "test_inputs": sequences}
        arrays |= {f"{part}_labels": np.arange(len(sequences)) for part in PARTS}
        spec = datasets.Spec((2,), 3, lambda data_dir: arrays, num_tokens=1000)
        monkeypatch.setitem(datasets.REGISTRY, "mine", spec)
        return datasets.load("mine", "data")

    data = load([[0, 999], [3, 4]])
    assert data.spec.mean is None and str(data.spec) == "sequences of 2"
    assert models.build("lstm", data.spec, 0.0, 0)(torch.from_numpy(data.train_inputs)).shape == (2, 3)
    for values, kind, message in (
        ([[0, 1000]], np.int32, "hold other numbers than those from 0 to 999"),
        ([[-1, 0]], np.int64, "hold other numbers than those from 0 to 999"),
        ([[0, 1]], np.float32, r"are float32 \[1, 2\], not uint8 or int32 or int64 \[samples, 2\]"),
    ):
        with pytest.raises(UsageError, match=message):
            load(values, kind)


# Domains


def write_domains(folder, monkeypatch):
    """Files of MNIST, USPS and SVHN; returns {part: [(images, labels) of each]}."""
    from scipy.io import savemat
    from test_datasets import write_idx
    from torchvision.datasets import SVHN

    rng, written = np.random.default_rng(0), {}
    (folder / "MNIST/raw").mkdir(parents=True)
    for part, prefix, usps, number in (("train", "train", "usps", 12), ("test", "t10k", "usps.t", 4)):
        labels = np.arange(number) % 10
        mnist, small = (rng.integers(0, 256, (number, size, size), dtype=np.uint8) for size in (28, 16))
        colour = rng.integers(0, 256, (32, 32, 3, number), dtype=np.uint8)
        write_idx(folder / f"MNIST/raw/{prefix}-images-idx3-ubyte", mnist)
        write_idx(folder / f"MNIST/raw/{prefix}-labels-idx1-ubyte", labels)
        values = (small.reshape(number, 256) + 0.5) / 255 * 2 - 1  # the reader cuts to whole numbers
        lines = [
            f"{label + 1} " + " ".join(f"{i + 1}:{v:.6f}" for i, v in enumerate(row)) for label, row in zip(labels, values)
        ]
        (folder / f"{usps}.bz2").write_bytes(bz2.compress("\n".join(lines).encode()))
        savemat(folder / f"{part}_32x32.mat", {"X": colour, "y": np.where(labels == 0, 10, labels)[:, None]})
        written[part] = [(mnist, labels), (small, labels), (colour.transpose(3, 2, 0, 1), labels)]
    sums = {part: hashlib.md5((folder / f"{part}_32x32.mat").read_bytes()).hexdigest() for part in PARTS}
    monkeypatch.setattr(SVHN, "split_list", {part: ["", f"{part}_32x32.mat", md5] for part, md5 in sums.items()})
    return written


def test_domains_are_owners_of_one_task(tmp_path, monkeypatch):
    written = write_domains(tmp_path, monkeypatch)
    data = datasets.load("domains", tmp_path)
    assert data.spec.num_owners == 3
    for part, origins in written.items():
        inputs, labels, owners = (getattr(data, f"{part}_{what}") for what in ("inputs", "labels", "owners"))
        for owner, (images, classes) in enumerate(origins):
            mine = inputs[owners == owner]
            assert mine.shape == (len(classes), 3, 32, 32) and labels[owners == owner].tolist() == classes.tolist()
            if images.ndim == 3:
                images = [np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BILINEAR)) for image in images]
                images = np.stack([images] * 3, axis=1)
            assert np.array_equal(mine, images)
    assert [Settings(dataset="domains").num_clients, Settings(dataset="domains").partition] == [3, "natural"]
    for clients in (3, 6):
        splits = partition.split(data, dataclasses.replace(Settings(dataset="domains"), num_clients=clients), 0)
        owners = [set(data.train_owners[each.train]) for each in splits]
        assert owners == [{client * 3 // clients} for client in range(clients)]
    with pytest.raises(UsageError, match=r"--num_clients 4: .* 3 owners of domains"):
        partition.split(data, Settings(dataset="domains", num_clients=4), 0)


def test_domains_follow_their_files(tmp_path, monkeypatch):
    """When one of them changes, they are made anew."""
    written = write_domains(tmp_path, monkeypatch)
    before = datasets.load("domains", tmp_path)
    images = tmp_path / "MNIST/raw/t10k-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-784] + bytes(784))
    after = datasets.load("domains", tmp_path)
    assert after.test_inputs[3].max() == 0 < before.test_inputs[3].max()
    assert np.array_equal(after.train_inputs, before.train_inputs) and len(written["test"]) == 3
