import gzip
import hashlib
import pickle

import numpy as np
import pytest

from federated import datasets


def test_digits_ship_with_the_project():
    data = datasets.load("digits", "/nonexistent")
    assert data.train_images.shape == (1437, 1, 8, 8) and data.test_images.shape == (360, 1, 8, 8)
    assert data.train_images.dtype == np.uint8 and data.train_images.max() == 16
    train, test = np.bincount(data.train_labels), np.bincount(data.test_labels)
    np.testing.assert_allclose(test / 360, (train + test) / 1797, atol=1 / 360)  # stratified
    both = np.concatenate([data.train_images, data.test_images]).reshape(1797, 64)
    assert hashlib.sha256(both[np.lexsort(both.T)].tobytes()).hexdigest() == SORTED_DIGITS


# of scikit-learn's load_digits().data as bytes, its rows sorted
SORTED_DIGITS = "3013ca2de9a064a8f3b0cd1f57c04dc521fef20303d1b6a8e0c8eb1350569fee"


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_the_mnist_files_are_read_and_decoded_once(shared_data, name):
    data = datasets.load(name, shared_data)
    assert data.train_images.shape == (60000, 1, 28, 28) and data.test_images.shape == (10000, 1, 28, 28)
    folder = datasets.REGISTRY[name].folder
    packed = gzip.decompress((shared_data / folder / "train-images-idx3-ubyte.gz").read_bytes())
    assert data.train_images.tobytes() == packed[16:]
    packed = gzip.decompress((shared_data / folder / "t10k-labels-idx1-ubyte.gz").read_bytes())
    assert data.test_labels.astype(np.uint8).tobytes() == packed[8:]
    for file in (shared_data / folder).iterdir():
        file.unlink()
    again = datasets.load(name, shared_data)
    assert np.array_equal(again.test_images, data.test_images)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_the_normalisation_is_that_of_the_training_set(shared_data, name):
    data = datasets.load(name, shared_data)
    images = data.train_images / 255
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

    reader = getattr(readers, datasets.REGISTRY[name].torchvision)
    folder = tmp_path / datasets.REGISTRY[name].folder
    written = write_cifar(folder, {**dict.fromkeys(train, 6), test: 4}, label_key)
    with open(folder / reader.meta["filename"], "wb") as file:
        pickle.dump({classes_key: [str(i) for i in range(10)]}, file)

    def md5(file):
        return hashlib.md5((folder / file).read_bytes()).hexdigest()

    monkeypatch.setattr(reader, "train_list", [[file, md5(file)] for file in train])
    monkeypatch.setattr(reader, "test_list", [[test, md5(test)]])
    monkeypatch.setattr(reader, "meta", {**reader.meta, "md5": md5(reader.meta["filename"])})
    data = datasets.load(name, tmp_path)
    assert data.train_images.reshape(-1, 3072).tolist() == np.concatenate([written[file][0] for file in train]).tolist()
    assert data.train_labels.tolist() == [label for file in train for label in written[file][1]]
    assert data.test_images.shape == (4, 3, 32, 32)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "cifar100"])
def test_missing_files_without_a_network_are_one_clear_line(run, tmp_path, name):
    """The proxy stands for a network that is not there."""
    result = run(
        "sweep.py", "launch", "--skip_confirmation", "--dataset", name, "--data_dir", tmp_path / "none",
        env={"PATH": "/usr/bin:/bin", "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"},
    )  # fmt: skip
    assert result.returncode == 2
    error = result.stderr.splitlines()[-1]
    assert (
        error.startswith("sweep.py launch: error: dataset") and str(tmp_path / "none" / datasets.REGISTRY[name].folder) in error
    )
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "sweep_logs").exists()


def test_a_damaged_file_is_named(run, shared_data):
    raw = shared_data / "MNIST" / "raw"
    for packed in list(raw.iterdir()):
        packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes())[:1000])
    result = run("sweep.py", "launch", "--skip_confirmation", "--dataset", "mnist", "--data_dir", shared_data)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert str(raw) in result.stderr.splitlines()[-1]
