import dataclasses
import gzip
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import urllib.request

import numpy as np
import pytest
from helpers import HUNG, PROJECT, SHARED_DATA, without_the_power_of_root

from federated.data import datasets, decoded
from federated.options import UsageError


def test_digits_ship_with_the_project():
    data = datasets.load("digits", "/nonexistent")
    assert data.train_inputs.shape == (1437, 1, 8, 8) and data.test_inputs.shape == (360, 1, 8, 8)
    assert data.train_inputs.dtype == np.uint8 and data.train_inputs.max() == 16
    train, test = np.bincount(data.train_labels), np.bincount(data.test_labels)
    np.testing.assert_allclose(test / 360, (train + test) / 1797, atol=1 / 360)  # stratified
    both = np.concatenate([data.train_inputs, data.test_inputs]).reshape(1797, 64)
    assert hashlib.sha256(both[np.lexsort(both.T)].tobytes()).hexdigest() == SORTED_DIGITS


# of scikit-learn's load_digits().data as bytes, its rows sorted
SORTED_DIGITS = "3013ca2de9a064a8f3b0cd1f57c04dc521fef20303d1b6a8e0c8eb1350569fee"


def test_heart_disease_ships_with_the_project():
    """Against the archive's files: the patients whose first ten features are known, none lost and none twice."""
    data = datasets.load("heart_disease", "/nonexistent")
    assert data.train_inputs.shape == (486, 13) and data.test_inputs.shape == (254, 13)
    inputs = np.concatenate([data.train_inputs, data.test_inputs])
    labels, owners = (
        np.concatenate([getattr(data, f"{part}_{what}") for part in ("train", "test")]) for what in ("labels", "owners")
    )
    assert np.bincount(owners).tolist() == [303, 261, 46, 130]
    assert [int(labels[owners == owner].sum()) for owner in range(4)] == [139, 98, 45, 101]
    assert set(inputs[:, 8:11].sum(axis=1)) == {0, 1} and set(inputs[:, 11:].sum(axis=1)) == {0, 1}
    if not SHARED_DATA.is_dir():
        pytest.skip(f"needs the files of {SHARED_DATA}")
    for owner, hospital in enumerate(("cleveland", "hungarian", "switzerland", "va")):
        lines = (SHARED_DATA / "heart_disease" / f"processed.{hospital}.csv").read_text().splitlines()
        rows = [line.split(",") for line in lines if "?" not in line.split(",")[:10]]
        raw = sorted((*map(np.float32, row[:2]), np.float32(row[7]), row[13] != "0") for row in rows)
        assert sorted(zip(*inputs[owners == owner][:, [0, 1, 5]].T, labels[owners == owner] > 0)) == raw


FOLDERS = {
    "mnist": "MNIST/raw",
    "fashion_mnist": "FashionMNIST/raw",
    "emnist": "EMNIST/raw",
    "kmnist": "KMNIST/raw",
    "svhn": "",
    "cifar10": "cifar-10-batches-py",
    "cifar100": "cifar-100-python",
    "domains": "MNIST/raw",
    "femnist": "femnist/data/train",
    "shakespeare": "shakespeare/data/train",
}


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_the_mnist_files_are_read_and_decoded_once(shared_data, name):
    data = datasets.load(name, shared_data)
    assert data.train_inputs.shape == (60000, 1, 28, 28) and data.test_inputs.shape == (10000, 1, 28, 28)
    folder = FOLDERS[name]
    packed = gzip.decompress((shared_data / folder / "train-images-idx3-ubyte.gz").read_bytes())
    assert data.train_inputs.tobytes() == packed[16:]
    packed = gzip.decompress((shared_data / folder / "t10k-labels-idx1-ubyte.gz").read_bytes())
    assert data.test_labels.astype(np.uint8).tobytes() == packed[8:]
    for file in (shared_data / folder).iterdir():
        file.unlink()
    again = datasets.load(name, shared_data)
    assert np.array_equal(again.test_inputs, data.test_inputs)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_the_normalisation_is_that_of_the_training_set(shared_data, name):
    data = datasets.load(name, shared_data)
    images = data.train_inputs / 255
    assert images.mean() == pytest.approx(data.spec.mean[0], abs=1e-3)
    assert images.std() == pytest.approx(data.spec.std[0], abs=1e-3)


def write_cifar(folder, batches, label_key):
    """Files in the format of the CIFAR archives, for tests without the real ones."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    written = {}
    for name, samples in batches.items():
        written[name] = rng.integers(0, 256, (samples, 3072), dtype=np.uint8), rng.integers(0, 10, samples).tolist()
        with open(folder / name, "wb") as file:
            pickle.dump({"data": written[name][0], label_key: written[name][1]}, file)
    return written


@pytest.mark.parametrize(
    ("name", "train", "test", "label_key", "classes_key"),
    [
        ("cifar10", [f"data_batch_{i}" for i in range(1, 6)], "test_batch", "labels", "label_names"),
        ("cifar100", ["train"], "test", "fine_labels", "fine_label_names"),
    ],
)
def test_the_cifar_files_are_read(tmp_path, monkeypatch, name, train, test, label_key, classes_key):
    from torchvision import datasets as readers

    reader = getattr(readers, name.upper())
    folder = tmp_path / FOLDERS[name]
    written = write_cifar(folder, {**dict.fromkeys(train, 6), test: 4}, label_key)
    with open(folder / reader.meta["filename"], "wb") as file:
        pickle.dump({classes_key: [str(i) for i in range(10)]}, file)

    def md5(file):
        return hashlib.md5((folder / file).read_bytes()).hexdigest()

    monkeypatch.setattr(reader, "train_list", [[file, md5(file)] for file in train])
    monkeypatch.setattr(reader, "test_list", [[test, md5(test)]])
    monkeypatch.setattr(reader, "meta", {**reader.meta, "md5": md5(reader.meta["filename"])})
    data = datasets.load(name, tmp_path)
    assert data.train_inputs.reshape(-1, 3072).tolist() == np.concatenate([written[file][0] for file in train]).tolist()
    assert data.train_labels.tolist() == [label for file in train for label in written[file][1]]
    assert data.test_inputs.shape == (4, 3, 32, 32)


def write_idx(path, array):
    """A file in MNIST's format: a magic number of type (8: bytes) and dimensions, the sizes, the bytes."""
    header = [(8 << 8) + array.ndim, *array.shape]
    path.write_bytes(np.array(header, dtype=">i4").tobytes() + array.astype(np.uint8).tobytes())


@pytest.mark.parametrize(
    ("name", "classes", "prefixes"),
    [("emnist", 47, ("emnist-balanced-train", "emnist-balanced-test")), ("kmnist", 10, ("train", "t10k"))],
)
def test_files_in_mnists_format_are_read(tmp_path, name, classes, prefixes):
    folder = tmp_path / FOLDERS[name]
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    written = {}
    for part, prefix, samples in zip(("train", "test"), prefixes, (100, 50)):
        images, labels = rng.integers(0, 256, (samples, 28, 28), dtype=np.uint8), np.arange(samples) % classes
        written[part] = images, labels
        write_idx(folder / f"{prefix}-images-idx3-ubyte", images)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte", labels)
    data = datasets.load(name, tmp_path)
    assert data.spec.num_classes == classes
    assert np.array_equal(data.train_inputs[:, 0], written["train"][0]) and np.array_equal(data.test_labels, written["test"][1])


def test_the_svhn_files_are_read(tmp_path, monkeypatch):
    from scipy.io import savemat
    from torchvision.datasets import SVHN

    rng = np.random.default_rng(0)
    written = {}
    for part, samples in (("train", 12), ("test", 4)):
        images, labels = rng.integers(0, 256, (32, 32, 3, samples), dtype=np.uint8), np.arange(samples) % 10 + 1
        written[part] = images, labels % 10  # in the files a zero is label 10
        savemat(tmp_path / f"{part}_32x32.mat", {"X": images, "y": labels[:, None]})
    sums = {part: hashlib.md5((tmp_path / f"{part}_32x32.mat").read_bytes()).hexdigest() for part in written}
    monkeypatch.setattr(SVHN, "split_list", {part: ["", f"{part}_32x32.mat", md5] for part, md5 in sums.items()})
    data = datasets.load("svhn", tmp_path)
    assert np.array_equal(data.train_inputs, written["train"][0].transpose(3, 2, 0, 1))
    assert np.array_equal(data.test_labels, written["test"][1])


@pytest.mark.parametrize("name", FOLDERS)
def test_missing_files_without_a_network_are_one_clear_line(call, tmp_path, monkeypatch, name):
    """The proxy stands for a network that is not there."""
    for protocol in ("http", "https"):
        monkeypatch.setenv(f"{protocol}_proxy", "http://127.0.0.1:9")
    monkeypatch.setattr(urllib.request, "_opener", None)  # which knows the proxies that there were before
    result = call("sweep.py", "launch", "--skip_confirmation", "--dataset", name, "--data_dir", tmp_path / "none")
    assert result.returncode == 2
    error = result.stderr.splitlines()[-1]
    assert error.startswith("sweep.py launch: error: dataset") and str(tmp_path / "none" / FOLDERS[name]) in error
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "sweep_logs").exists()


def test_a_damaged_file_is_named(call, shared_data):
    raw = shared_data / "MNIST" / "raw"
    for packed in list(raw.iterdir()):
        packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes())[:1000])
        packed.unlink()
    result = call("sweep.py", "launch", "--skip_confirmation", "--dataset", "mnist", "--data_dir", shared_data)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert str(raw) in result.stderr.splitlines()[-1]


def unpack(source, target):
    """Replace what is in `target` by the unpacked files of `source`."""
    target.mkdir(parents=True, exist_ok=True)
    for file in target.iterdir():
        file.unlink()
    for packed in source.glob("*.gz"):
        (target / packed.stem).write_bytes(gzip.decompress(packed.read_bytes()))


def labels_in(raw):
    return np.frombuffer(gzip.decompress((raw / "t10k-labels-idx1-ubyte.gz").read_bytes())[8:], np.uint8)


@pytest.mark.parametrize("are_unpacked", [True, False])
def test_files_that_are_put_right_are_decoded_anew(shared_data, are_unpacked):
    """Fashion-MNIST's files in the place of MNIST's, of the same names and sizes and times; then the right ones, or their
    archives beside the wrong ones."""
    raw, fashion = shared_data / "MNIST/raw", SHARED_DATA / "FashionMNIST/raw"
    unpack(fashion, raw)
    for file in raw.iterdir():
        os.utime(file, (0, 0))
    assert np.array_equal(datasets.load("mnist", shared_data).test_labels, labels_in(fashion))
    if are_unpacked:
        unpack(SHARED_DATA / "MNIST/raw", raw)
        for file in raw.iterdir():
            os.utime(file, (0, 0))
    else:
        for packed in (SHARED_DATA / "MNIST/raw").iterdir():
            shutil.copy(packed, raw)
    assert np.array_equal(datasets.load("mnist", shared_data).test_labels, labels_in(SHARED_DATA / "MNIST/raw"))


def test_decoded_arrays_know_their_files_and_outlive_a_copy(shared_data, tmp_path, monkeypatch):
    data = datasets.load("mnist", shared_data)
    made = json.loads((shared_data / "decoded/mnist/made.json").read_text())
    assert set(made["from"]) == {f"MNIST/raw/{path.name}" for path in (shared_data / "MNIST/raw").iterdir()}
    for name, noted in made["from"].items():
        assert noted["sha256"] == hashlib.sha256((shared_data / name).read_bytes()).hexdigest()
    shutil.copytree(shared_data, tmp_path / "copy")  # of other times
    monkeypatch.setattr(decoded, "_decode", lambda *anything: pytest.fail("it was decoded anew"))
    assert np.array_equal(datasets.load("mnist", tmp_path / "copy").train_inputs, data.train_inputs)
    stamps = json.loads((tmp_path / "copy/decoded/mnist/made.json").read_text())
    assert stamps != made
    monkeypatch.setattr(decoded, "_digest", lambda path: pytest.fail("it was read anew"))
    datasets.load("mnist", tmp_path / "copy")


def cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


def half_as_many(path):
    np.save(path, np.load(path)[::2])


def other_values(path):
    np.save(path, np.load(path)[::-1])


DAMAGES = {
    "cut": cut,
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
    "no array": lambda path: path.write_text("{}"),
    "half as many": half_as_many,
    "other values": other_values,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", ["train_images.npy", "test_labels.npy", "made.json"])
def test_decoded_arrays_that_are_not_whole_are_made_anew(tmp_path, file, damage):
    """Also where those of a version that noted nothing lie beside the files."""
    folder = tmp_path / FOLDERS["kmnist"]
    folder.mkdir(parents=True)
    for prefix in ("train", "t10k"):
        write_idx(folder / f"{prefix}-images-idx3-ubyte", np.random.default_rng(0).integers(0, 256, (40, 28, 28)))
        write_idx(folder / f"{prefix}-labels-idx1-ubyte", np.arange(40) % 10)
    names = ("train_inputs", "train_labels", "test_inputs", "test_labels")
    before = {name: np.array(values) for name, values in vars(datasets.load("kmnist", tmp_path)).items() if name in names}
    path = tmp_path / "decoded" / "kmnist" / file
    if file == "made.json" and damage in ("half as many", "other values"):
        path.write_text('{"from": [], "arrays": {"train_images.npy": 1}}')
    else:
        DAMAGES[damage](path)
    again = datasets.load("kmnist", tmp_path)
    assert all(np.array_equal(getattr(again, name), before[name]) for name in names)


READ_ONE = "import sys; from federated.data import datasets; print(datasets.load('mnist', sys.argv[1]).test_labels.sum())"


def readers(data_dir, number, **options):
    """That many processes that read MNIST at once: their exit codes and outputs."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", READ_ONE, data_dir],
            cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options,
        )
        for _ in range(number)
    ]  # fmt: skip
    return [(process.communicate(timeout=HUNG)[0], process.returncode) for process in started]


@pytest.mark.slow
@pytest.mark.process
def test_several_processes_read_for_the_first_time_at_once(shared_data):
    """One decodes, the others wait; what a killed one left goes."""
    (shared_data / "decoded" / ".mnist-killed").mkdir(parents=True)
    expected = f"{labels_in(SHARED_DATA / 'MNIST/raw').sum()}\n", 0
    assert readers(shared_data, 3) == [expected] * 3
    assert sorted(path.name for path in (shared_data / "decoded").iterdir()) == [".mnist.lock", "mnist"]
    assert sorted((shared_data / "MNIST/raw").iterdir()) == sorted((shared_data / "MNIST/raw").glob("*.gz"))


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("power", [None, without_the_power_of_root])
def test_a_read_only_data_directory_is_read(shared_data, tmp_path, power):
    """Its arrays lie in the user's cache; if that may not be written to either, one line says so. Root, whom permissions do not
    bind, respects them."""
    shared_data.chmod(0o500)
    cache, expected = tmp_path / "cache", (f"{labels_in(SHARED_DATA / 'MNIST/raw').sum()}\n", 0)
    options = {"preexec_fn": power, "env": {**os.environ, "XDG_CACHE_HOME": str(cache)}}
    assert readers(shared_data, 1, **options) == [expected]
    assert len(list(cache.glob("fedsweep/*/mnist/made.json"))) == 1 and not (shared_data / "decoded").exists()
    assert readers(shared_data, 1, **options) == [expected]
    shutil.rmtree(cache)
    cache.mkdir(mode=0o500)
    ((output, code),) = readers(shared_data, 1, **options)
    assert code and "UsageError: cannot write decoded data" in output.splitlines()[-1] and "XDG_CACHE_HOME" in output


@pytest.mark.parametrize("name", ["digits", "heart_disease"])
def test_a_cut_file_of_those_that_ship_is_named(tmp_path, monkeypatch, name):
    (tmp_path / f"{name}.npz").write_bytes((datasets.SHIPPED / f"{name}.npz").read_bytes()[:-100])
    monkeypatch.setattr(datasets, "SHIPPED", tmp_path)
    with pytest.raises(UsageError, match=f"dataset '{name}' cannot be read"):
        datasets.load(name, tmp_path)


SPEC = datasets.Spec((2, 3), 4, None, num_owners=2)


def arrays_of(**changes):
    inputs, numbers = np.arange(48, dtype=np.float32).reshape(8, 2, 3), np.arange(8)
    whole = {"inputs": inputs, "labels": numbers % 4, "owners": numbers % 2}
    return {f"{part}_{name}": array for part in ("train", "test") for name, array in whole.items()} | changes


def test_where_a_spec_has_no_normalisation_it_is_that_of_the_training_set(monkeypatch):
    monkeypatch.setitem(datasets.REGISTRY, "mine", dataclasses.replace(SPEC, scale=2, read=lambda data_dir: arrays_of()))
    data = datasets.load("mine", "data")
    normalised = (data.train_inputs / 2 - np.reshape(data.spec.mean, (2, 1))) / np.reshape(data.spec.std, (2, 1))
    np.testing.assert_allclose(normalised.mean(axis=(0, 2)), 0, atol=1e-6)
    np.testing.assert_allclose(normalised.std(axis=(0, 2)), 1, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_inputs": np.zeros((8, 3, 2), np.float32)}, r"test_inputs are float32 \[8, 3, 2\], not .* \[samples, 2, 3\]"),
        ({"train_inputs": np.zeros((8, 2, 3))}, "train_inputs are float64"),
        ({"train_inputs": np.full((8, 2, 3), np.nan, np.float32)}, "not finite"),
        ({"train_labels": np.arange(8)}, "train_labels are not one number from 0 to 3 for each of 8 samples"),
        ({"train_labels": np.full(8, 0.5)}, "train_labels are not one number"),
        ({"train_labels": np.zeros(7)}, "train_labels are not one number"),
        ({"test_owners": np.arange(8)}, "test_owners are not one number from 0 to 1"),
    ],
)
def test_arrays_that_are_not_what_the_spec_says_are_refused(monkeypatch, changes, message):
    monkeypatch.setitem(datasets.REGISTRY, "mine", dataclasses.replace(SPEC, read=lambda data_dir: arrays_of(**changes)))
    with pytest.raises(UsageError, match=f"dataset 'mine': its .*{message}"):
        datasets.load("mine", "data")
