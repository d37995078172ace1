import numpy as np
import pytest

from federated.options import UsageError
from federated.seeds import seed_hash
from federated.trial import hparams_hash
from hparams_registry import check_hparams, default_hparams, random_hparams


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
