import dataclasses
import hashlib

import numpy as np
import pytest

from federated.data import datasets
from federated.data.partition import REGISTRY, split
from federated.options import UsageError
from federated.settings import Settings

LABELS, TEST_LABELS = np.random.default_rng(0).integers(0, 10, 5000), np.random.default_rng(1).integers(0, 10, 1000)
OWNERS, TEST_OWNERS = np.arange(5000) % 10, np.arange(1000) % 7 + 3
SPEC = datasets.Spec((1,), 10, None, num_owners=10)
DATA = datasets.Dataset(SPEC, LABELS[:, None], LABELS, TEST_LABELS[:, None], TEST_LABELS, OWNERS, TEST_OWNERS)
DRAWN = [name for name in REGISTRY if name != "natural"]


def settings(**changes):
    return dataclasses.replace(Settings(num_clients=10), **changes)


@pytest.mark.parametrize("name", REGISTRY)
def test_every_sample_goes_to_one_client_and_a_tenth_is_held_out(name):
    splits = split(DATA, settings(partition=name), 3)
    everything = np.concatenate([indices for each in splits for indices in (each.train, each.val)])
    assert np.array_equal(np.sort(everything), np.arange(5000))
    for each in splits:
        assert len(each.val) == max(1, round((len(each.train) + len(each.val)) / 10))


@pytest.mark.parametrize("name", DRAWN)
def test_a_partition_is_a_function_of_the_trial_seed(name):
    one, again, other = (split(DATA, settings(partition=name), seed) for seed in (3, 3, 4))
    same = [np.array_equal(a.train, b.train) for a, b in zip(one, again)]
    assert all(same)
    assert not all(np.array_equal(a.train, b.train) for a, b in zip(one, other))


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("iid", "0bb4b50ddc8f0cec"),
        ("dirichlet", "c6aa6923b19ea7a3"),
        ("labels", "2c1d545624577ddf"),
        ("quantity", "1f75b3964ec1e23b"),
    ],
)
def test_golden_partitions_of_digits(name, digest):
    """What a trial of a seed trains on and holds out stays what it was, or its results would not compare with older ones."""
    data, seen = datasets.load("digits", "data"), hashlib.sha256()
    for seed, samples in ((0, 100), (1, None), (7, None)):
        for each in split(data, Settings(num_clients=6, partition=name, samples_per_client=samples), seed):
            seen.update(each.train.tobytes() + each.val.tobytes())
    assert seen.hexdigest().startswith(digest)


@pytest.mark.parametrize("name", DRAWN)
def test_each_test_sample_goes_to_one_client_by_the_shares_of_its_label(name):
    splits = split(DATA, settings(partition=name), 3)
    everything = np.concatenate([each.test for each in splits])
    assert np.array_equal(np.sort(everything), np.arange(1000))
    held = np.array([np.bincount(LABELS[np.concatenate([each.train, each.val])], minlength=10) for each in splits])
    tested = np.array([np.bincount(TEST_LABELS[each.test], minlength=10) for each in splits])
    exact = held / held.sum(axis=0) * np.bincount(TEST_LABELS)
    assert (np.abs(tested - exact) < 1).all()  # the largest remainders round each share up or down
    assert not tested[held == 0].any()


def test_golden_test_partition_of_digits():
    seen = hashlib.sha256()
    for each in split(datasets.load("digits", "data"), Settings(num_clients=6, partition="dirichlet"), 3):
        seen.update(each.test.tobytes())
    assert seen.hexdigest().startswith("b0cfd1b73a4c9fda")


def test_a_label_that_nobody_holds_is_tested_by_nobody():
    splits = split(DATA, settings(num_clients=3, partition="labels", labels_per_client=1), 0)
    assert [set(TEST_LABELS[each.test]) for each in splits] == [{0}, {1}, {2}]


def test_clients_without_test_samples_are_allowed():
    splits = split(dataclasses.replace(DATA, test_labels=TEST_LABELS[:30]), settings(num_clients=200), 0)
    sizes = [len(each.test) for each in splits]
    assert sum(sizes) == 30 and 0 in sizes and splits[sizes.index(0)].test.dtype == np.int64


def test_the_test_partition_has_a_stream_of_its_own():
    ours, theirs = (split(data, settings(), 0) for data in (DATA, dataclasses.replace(DATA, test_labels=TEST_LABELS[::-1])))
    assert all(np.array_equal(a.train, b.train) and np.array_equal(a.val, b.val) for a, b in zip(ours, theirs))
    assert not all(np.array_equal(a.test, b.test) for a, b in zip(ours, theirs))


def test_natural_is_by_owner():
    splits = split(DATA, settings(partition="natural"), 0)
    for client, each in enumerate(splits):
        assert np.array_equal(np.sort(np.concatenate([each.train, each.val])), np.flatnonzero(client == OWNERS))
        assert np.array_equal(each.test, np.flatnonzero(client == TEST_OWNERS))


def test_heart_disease_goes_to_its_hospitals():
    """The numbers of FLamby's Fed-Heart-Disease (Ogier du Terrail et al., NeurIPS 2022)."""
    splits = split(datasets.load("heart_disease", "data"), Settings(dataset="heart_disease"), 0)
    assert [len(each.train) + len(each.val) for each in splits] == [199, 172, 30, 85]
    assert [len(each.test) for each in splits] == [104, 89, 16, 45]


def test_iid_is_even():
    splits = split(DATA, settings(), 0)
    assert {len(each.train) for each in splits} == {450}


@pytest.mark.parametrize("labels_per_client", [1, 2, 5])
def test_labels_gives_each_client_as_many(labels_per_client):
    splits = split(DATA, settings(partition="labels", labels_per_client=labels_per_client), 0)
    for client, each in enumerate(splits):
        held = set(LABELS[np.concatenate([each.train, each.val])])
        assert len(held) == labels_per_client and client % 10 in held
    counts = np.array([np.bincount(LABELS[np.concatenate([each.train, each.val])], minlength=10) for each in splits])
    for of_label in counts.T:  # split evenly among its holders
        assert np.ptp(of_label[of_label > 0]) <= 1


def test_dirichlet_is_skewed_by_alpha_and_caps_sizes():
    def skew(alpha):
        splits = split(DATA, settings(partition="dirichlet", partition_alpha=alpha), 0)
        counts = np.array([np.bincount(LABELS[each.train], minlength=10) for each in splits])
        return (counts.max(axis=1) / counts.sum(axis=1)).mean()

    assert skew(0.1) > skew(1) > skew(100) > 0.1
    assert skew(100) < 0.15


def test_a_full_client_gets_no_more_of_a_later_label():
    splits = split(DATA, settings(partition="dirichlet", partition_alpha=0.3), 1)
    for each in splits:
        counts = np.bincount(LABELS[np.concatenate([each.train, each.val])], minlength=10)
        counts[counts == 1] = 0  # the cut of a share may be off by one, as in NIID-Bench
        assert counts[: np.flatnonzero(counts)[-1]].sum() < 500


def test_samples_per_client_is_kept():
    splits = split(DATA, settings(samples_per_client=50), 0)
    assert [len(each.train) + len(each.val) for each in splits] == [50] * 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples_per_client": 501}, "more than the 5000 training samples"),
        ({"num_clients": 5000}, "none to train on"),
        ({"partition": "dirichlet", "partition_alpha": 1e-3, "num_clients": 30}, "raise --partition_alpha 0.001"),
        ({"partition": "quantity", "partition_alpha": 1e-9}, "raise --partition_alpha"),
        ({"partition": "labels", "labels_per_client": 11}, "the 10 labels"),
        ({"partition": "natural", "num_clients": 11}, "--num_clients 11: .* 10 owners"),
    ],
)
def test_too_few_samples_are_an_error_that_names_the_setting(changes, message):
    with pytest.raises(UsageError, match=message):
        split(DATA, settings(**changes), 0)


def test_an_owner_of_one_sample_takes_no_part():
    owners = np.where(np.arange(5000) == 4999, 9, np.arange(5000) % 9)
    lonely = dataclasses.replace(DATA, train_owners=owners)
    message = "^--num_clients 10: under --partition natural 9 owners of digits have enough samples to train on: give as many"
    with pytest.raises(UsageError, match=message):
        split(lonely, settings(partition="natural"), 0)
    assert len(split(lonely, settings(partition="natural", num_clients=9), 0)) == 9
