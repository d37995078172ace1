import dataclasses

import numpy as np
import pytest

from federated.options import UsageError
from federated.partition import REGISTRY, split
from federated.trial import Settings

LABELS = np.random.default_rng(0).integers(0, 10, 5000)


def settings(**changes):
    return dataclasses.replace(Settings(num_clients=10), **changes)


@pytest.mark.parametrize("name", REGISTRY)
def test_every_sample_goes_to_one_client_and_a_tenth_is_held_out(name):
    parts = split(LABELS, settings(partition=name), 3)
    everything = np.concatenate([indices for part in parts for indices in (part.train, part.val)])
    assert np.array_equal(np.sort(everything), np.arange(5000))
    for part in parts:
        assert len(part.val) == max(1, round((len(part.train) + len(part.val)) / 10))


@pytest.mark.parametrize("name", REGISTRY)
def test_a_partition_is_a_function_of_the_trial_seed(name):
    one, again, other = (split(LABELS, settings(partition=name), seed) for seed in (3, 3, 4))
    same = [np.array_equal(a.train, b.train) for a, b in zip(one, again)]
    assert all(same)
    assert not all(np.array_equal(a.train, b.train) for a, b in zip(one, other))


def test_iid_is_even():
    parts = split(LABELS, settings(), 0)
    assert {len(part.train) for part in parts} == {450}


@pytest.mark.parametrize("labels_per_client", [1, 2, 5])
def test_labels_gives_each_client_as_many(labels_per_client):
    parts = split(LABELS, settings(partition="labels", labels_per_client=labels_per_client), 0)
    for client, part in enumerate(parts):
        held = set(LABELS[np.concatenate([part.train, part.val])])
        assert len(held) == labels_per_client and client % 10 in held


def test_dirichlet_is_skewed_by_alpha_and_caps_sizes():
    def skew(alpha):
        parts = split(LABELS, settings(partition="dirichlet", partition_alpha=alpha), 0)
        counts = np.array([np.bincount(LABELS[part.train], minlength=10) for part in parts])
        return (counts.max(axis=1) / counts.sum(axis=1)).mean()

    assert skew(0.1) > skew(1) > skew(100) > 0.1
    assert skew(100) < 0.15


def test_a_full_client_gets_no_more_of_a_later_label():
    parts = split(LABELS, settings(partition="dirichlet", partition_alpha=0.3), 1)
    for part in parts:
        counts = np.bincount(LABELS[np.concatenate([part.train, part.val])], minlength=10)
        counts[counts == 1] = 0  # the cut of a share may be off by one, as in NIID-Bench
        assert counts[: np.flatnonzero(counts)[-1]].sum() < 500


def test_samples_per_client_is_kept():
    parts = split(LABELS, settings(samples_per_client=50), 0)
    assert [len(part.train) + len(part.val) for part in parts] == [50] * 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples_per_client": 501}, "more than the 5000 training samples"),
        ({"num_clients": 5000}, "none to train on"),
        ({"partition": "dirichlet", "partition_alpha": 1e-3, "num_clients": 30}, "raise --partition_alpha 0.001"),
        ({"partition": "quantity", "partition_alpha": 1e-9}, "raise --partition_alpha"),
        ({"partition": "labels", "labels_per_client": 11}, "the 10 labels"),
    ],
)
def test_too_few_samples_are_an_error_that_names_the_setting(changes, message):
    with pytest.raises(UsageError, match=message):
        split(LABELS, settings(**changes), 0)
