import numpy as np
import pytest

from federated import algorithms
from federated.options import UsageError
from federated.search import GRID, RANDOM, Space
from federated.seeds import seed_hash
from federated.trial import hparams_hash
from hparams_registry import check_hparams, default_hparams, random_hparams, space_of


def test_golden_defaults():
    hparams = default_hparams("Fedavg", "cifar10")
    assert hparams == {"batch_size": 64, "dropout_rate": 0.5, "learning_rate": 0.0003}
    assert hparams_hash(hparams) == "db339c756bf05546161ab518b8b50bfb"


def test_golden_draw():
    hparams = random_hparams("Fedavg", "cifar10", 1)
    assert hparams == {"batch_size": 38, "dropout_rate": 0.5, "learning_rate": 4.0098916586726516e-05}
    assert hparams_hash(hparams) == "fa88977bac8b0e6b05a8fbdac7e4f8d1"


def test_names_match_in_any_case():
    assert random_hparams("FEDAVG", "digits", 7) == random_hparams("fedavg", "digits", 7)


@pytest.mark.parametrize("seed", range(1, 30))
def test_draws_stay_in_their_ranges(seed):
    hparams = random_hparams("Fedavg", "digits", seed)
    assert 1e-5 <= hparams["learning_rate"] <= 1e-3
    assert 32 <= hparams["batch_size"] <= 1024
    assert hparams["dropout_rate"] in (0.0, 0.5)
    assert {name: type(value) for name, value in hparams.items()} == {
        "batch_size": int,
        "dropout_rate": float,
        "learning_rate": float,
    }


def test_sgd_has_its_own_space_and_leaves_the_other_draws():
    adam, sgd = random_hparams("Fedavg", "digits", 3), random_hparams("Fedavg", "digits", 3, "sgd")
    assert {"momentum", "weight_decay"} == sgd.keys() - adam.keys()
    assert 1e-2 <= sgd["learning_rate"] <= 1
    assert (sgd["batch_size"], sgd["dropout_rate"]) == (adam["batch_size"], adam["dropout_rate"])


def test_each_name_has_a_stream_of_its_own():
    uniform = np.random.RandomState(seed_hash(5, "learning_rate")).uniform(-5, -3)
    assert random_hparams("Fedavg", "digits", 5)["learning_rate"] == 10**uniform


@pytest.mark.parametrize("make", [default_hparams, lambda a, d: random_hparams(a, d, 1)])
def test_unknown_names_are_errors_that_list_the_valid_ones(make):
    with pytest.raises(KeyError, match=r"unknown algorithm 'Fedavgg'.*Fedavg"):
        make("Fedavgg", "digits")
    with pytest.raises(KeyError, match=r"unknown dataset 'digitz'.*digits.*cifar10"):
        make("Fedavg", "digitz")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": 1}, "unknown hyper-parameter 'lr'.*batch_size, dropout_rate, learning_rate"),
        ({"batch_size": 0}, "batch_size 0 is not a whole number of at least 1"),
        ({"batch_size": 1.5}, "batch_size 1.5 is not a whole number"),
        ({"batch_size": "64"}, 'batch_size "64" is not a whole number'),
        ({"batch_size": True}, "batch_size true is not"),
        ({"dropout_rate": 1.5}, "dropout_rate 1.5 is not a number of at least 0 and at most 1"),
        ({"learning_rate": float("nan")}, "learning_rate NaN is not a number of at least 0"),
        ({"learning_rate": None}, "learning_rate null is not"),
        ({"learning_rate": [1]}, r"learning_rate \[1\] is not"),
    ],
)
def test_values_given_by_hand_are_checked(values, message):
    with pytest.raises(UsageError, match=message):
        check_hparams(values, "Fedavg", "digits")


def test_values_given_by_hand_get_the_type_of_the_default():
    assert check_hparams({"batch_size": 32.0, "learning_rate": 1}, "Fedavg", "digits") == {
        "batch_size": 32,
        "learning_rate": 1.0,
    }


KEY = ("Fedprox", "digits", "sgd")


@pytest.mark.parametrize("algorithm", algorithms.REGISTRY)
def test_a_search_draws_what_the_registry_draws(algorithm):
    """Set 0 holds the defaults, which lie within all domains; a space survives its file."""
    for optimizer in algorithms.load(algorithm).local_optimizers:
        key = (algorithm, "digits", optimizer)
        space = space_of(RANDOM, {}, *key)
        assert Space.from_json(space.as_json()) == space
        drawn = [random_hparams(algorithm, "digits", k, optimizer) for k in range(1, 8)]
        assert list(space.sets(0, 8)) == list(enumerate([default_hparams(*key), *drawn]))
        assert (
            all(list(space.sets(k, 1)) == [(k, hparams)] for k, hparams in enumerate(drawn, start=1)) and drawn[0] != drawn[1]
        )


def test_domains_given_by_hand_take_the_place_of_the_registrys():
    values = {"batch_size": 32, "mu": [0.3, 3], "learning_rate": {"low": 0.5, "high": 1, "log": True}, "momentum": [0, 0.5]}
    sets = [hparams for _, hparams in space_of(RANDOM, values, *KEY).sets(0, 30)]
    assert {each["batch_size"] for each in sets} == {32} and {each["mu"] for each in sets} == {0.3, 3}
    assert all(0.5 <= each["learning_rate"] <= 1 for each in sets) and len({each["learning_rate"] for each in sets}) == 30
    assert sets[0]["momentum"] == 0.0 and sets[0]["weight_decay"] == 0.0  # the defaults that lie within
    plain = [hparams for _, hparams in space_of(RANDOM, {}, *KEY).sets(0, 30)]
    assert [each["weight_decay"] for each in sets] == [each["weight_decay"] for each in plain]  # a stream for each name


def test_whole_numbers_are_drawn_whole_and_with_both_ends():
    for log in (True, False):
        space = space_of(RANDOM, {"batch_size": {"low": 1, "high": 3, "log": log}}, *KEY)
        drawn = {hparams["batch_size"] for _, hparams in space.sets(1, 200)}
        assert drawn == ({1, 2} if log else {1, 2, 3}) and {type(each) for each in drawn} == {int}


def test_a_grid_is_every_combination_in_a_fixed_order():
    values = {"learning_rate": [0.1, 1], "mu": [0.01, 0.1, 1.0], "batch_size": 16}
    space = space_of(GRID, values, *KEY)
    sets = list(space.sets(0, space.size()))
    assert [k for k, _ in sets] == list(range(6))
    assert [(each["learning_rate"], each["mu"]) for _, each in sets] == [
        (0.1, 0.01), (0.1, 0.1), (0.1, 1.0), (1.0, 0.01), (1.0, 0.1), (1.0, 1.0),
    ]  # fmt: skip
    assert {each["batch_size"] for _, each in sets} == {16} and {each["dropout_rate"] for _, each in sets} == {0.5}
    assert Space.from_json(space.as_json()) == space
    with pytest.raises(UsageError, match="--search grid: mu has the range"):
        space_of(GRID, {"mu": {"low": 0.1, "high": 1}}, *KEY)
