"""Studies: several sweeps in one output directory."""

import dataclasses
import json

import pytest
from helpers import results

import sweep
from federated import study
from federated.options import UsageError
from federated.search import Space
from federated.settings import MAX_NAME_BYTES, Settings
from federated.study import combinations, sweeps_of
from federated.trial import Trial
from hparams_registry import space_of

AXES = {
    "algorithm": ["Fedavg", "Fedprox", "Scaffold"], "dataset": ["digits", "fashion_mnist"], "partition": ["iid", "dirichlet"],
    "partition_alpha": [0.1, 0.5], "num_clients": [10], "participation": [0.2, 1.0], "local_optimizer": ["sgd"],
}  # fmt: skip
TWO_BY_TWO = ("--algorithm", "Fedavg", "Scaffold", "--partition", "iid", "dirichlet", "--partition_alpha", 0.3)
SMALL = (*TWO_BY_TWO, "--local_optimizer", "sgd", "--num_hparams", 1, "--num_clients", 3)


def test_every_combination_is_a_sweep_and_equal_ones_are_one(tmp_path):
    sweeps = sweeps_of(combinations(AXES), tmp_path)
    assert len(sweeps) == 36 and len({each.name for each in sweeps}) == 36
    assert len([each for each in sweeps if each.partition == "iid"]) == 12
    assert {each.partition_alpha for each in sweeps if each.partition == "iid"} == {None}


def test_a_name_has_what_is_not_the_default():
    assert Settings().name == Settings(rounds=3, eval_every=2, device="cpu", threads=2).name == "mlp_digits_Fedavg"
    assert Settings(partition="dirichlet").name == "mlp_digits_Fedavg,partition=dirichlet"
    mnist = Settings(
        model_arch="cnn", dataset="mnist", algorithm="fedavg", num_clients=100, participation=0.10, partition="dirichlet",
        partition_alpha=1e-1,
    )  # fmt: skip
    assert mnist.name == "cnn_mnist_Fedavg,num_clients=100,participation=0.1,partition=dirichlet,partition_alpha=0.1"
    assert Settings(dataset="heart_disease").name == "logistic_heart_disease_Fedavg"
    assert Settings(participation=0.5).optimizer_state == "reset" and "optimizer" not in Settings(participation=0.5).name


def test_a_long_name_is_cut_and_stays_unique():
    many = {
        "num_clients": 99999, "local_epochs": 999999, "samples_per_client": 99999999, "participation": 0.123456789012,
        "partition": "dirichlet", "holdout_fraction": 0.123456789012, "augmentation": "crop_flip", "precision": "bf16",
        "local_optimizer": "sgd",
    }  # fmt: skip
    one, other = (Settings(**many, partition_alpha=alpha) for alpha in (0.123456789012, 0.123456789013))
    assert len(one.name.encode()) == len(other.name.encode()) == MAX_NAME_BYTES and one.name != other.name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--partition_alpha", "0.1"), "--partition_alpha 0.1 has no effect under --partition iid"),
        (
            ("--partition", "dirichlet", "--labels_per_client", "3"),
            "no effect under --partition dirichlet",
        ),
        (("--algorithm", "Fedavg", "Scaffold", "--local_optimizer", "adam"), "Scaffold is defined for sgd only"),
        (("--search", "grid", "--num_hparams", "3"), "takes every combination: --num_hparams does not apply"),
        (
            ("--search", "grid", "--hparams", '{"dropout_rate": {"low": 0, "high": 1}}'),
            "grid: dropout_rate has the range",
        ),
        (
            ("--search", "grid", "--hparams", json.dumps({"dropout_rate": [k / 10**6 for k in range(10**5 + 1)]})),
            "exceed the limit",
        ),
        (("--hparams", '{"mu": [0.1, 1]}'), "unknown hyper-parameter 'mu'"),
        (("--num_clients", "2", "3", "--num_hparams", "1", "--num_trials", "60000"), "exceed the limit of 100000"),
    ],
)
def test_what_makes_no_sense_is_one_line(tmp_path, capsys, options, message):
    options = [*options, "--output_dir", str(tmp_path / "out"), "--skip_confirmation"]
    assert sweep.main(["launch", *options]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1] and not (tmp_path / "out").exists()


def test_a_study_is_launched_seen_and_deleted_whole_or_in_part(launch_here, call, tmp_path):
    out = tmp_path / "out"
    launched = launch_here(out, *SMALL)
    assert launched.returncode == 0 and "Sweeps: 4, trials left: 4, rounds left: 8." in launched.stderr
    assert len(results(out)) == 4 and len(list(out.iterdir())) == 4
    assert launch_here(out, *SMALL, "--participation", 0.5).returncode == 0  # which adds to it
    assert len(list(out.iterdir())) == 8

    def status(*options):
        listed = call("sweep.py", "status", "--json", "--output_dir", out, "--num_hparams", 1, "--num_trials", 1, *options)
        return [job["state"] for job in json.loads(listed.stdout)]

    assert status() == ["Done"] * 8 and status("--algorithm", "scaffold") == ["Done"] * 4
    assert status("--participation", "0.5", "--partition", "dirichlet") == ["Done"] * 2
    assert status("--algorithm", "Fedavg", "Fedprox") == ["Not launched", *["Done"] * 4]
    deleted = call("sweep.py", "delete_all", "--output_dir", out, "--participation", 0.5, "--skip_confirmation")
    assert "Deleted 4 jobs!" in deleted.stderr and status() == ["Done"] * 4
    deleted = call("sweep.py", "delete_all", "--output_dir", out, "--skip_confirmation")
    assert "Deleted 4 jobs!" in deleted.stderr and not list(out.iterdir())


def test_a_study_is_written_down_in_a_file(launch_here, call, tmp_path):
    """Comments, quotes, several options a line; what follows on the command line goes on with it. Commands that launch nothing
    take the file, too."""
    (tmp_path / "my study.txt").write_text(
        "# Two algorithms under two skews\n--algorithm Fedavg Scaffold   # both with sgd\n\n--local_optimizer\nsgd\n"
        """--partition iid dirichlet --partition_alpha 0.3 --hparams '{"learning_rate": 0.1}'\n"""
        "--command_launcher local_parallel --jobs 2 --retries 1\n"
    )
    common = ("--num_hparams", 1, "--num_clients", 3)
    assert launch_here(tmp_path / "file", f"@{tmp_path / 'my study.txt'}", *common).returncode == 0
    words = (*TWO_BY_TWO, "--local_optimizer", "sgd", "--hparams", '{"learning_rate": 0.1}')
    assert launch_here(tmp_path / "words", *words, *common).returncode == 0
    assert len(results(tmp_path / "file")) == 4 and results(tmp_path / "file") == results(tmp_path / "words")
    written = f"@{tmp_path / 'my study.txt'}"
    there = ("--num_trials", 1, *common, "--output_dir", tmp_path / "file")
    assert "\n4 jobs: 4 done, 0 incomplete, 0 not launched.\n" in call("sweep.py", "status", written, *there).stdout
    assert "Deleted 4 jobs!" in call("sweep.py", "delete_all", written, *there, "--skip_confirmation").stderr
    for wrong in (("--jobs", 2), (written, "--jobz", 2)):
        refused = call("sweep.py", "status", *wrong)
        assert refused.returncode == 2 and refused.stderr == f"sweep.py: error: unrecognized arguments: {wrong[-2]} 2\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"--partition 'iid", '"--partition \'iid" in a file of arguments: No closing quotation'),
        (b"\xff\xfe", "a file of arguments is no text"),
        (b"--nonsense", "unrecognized arguments: --nonsense"),
        (None, "No such file"),
    ],
)
def test_a_file_of_arguments_that_cannot_be_read_is_one_line(call, tmp_path, content, message):
    if content is not None:
        (tmp_path / "study.txt").write_bytes(content)
    refused = call("sweep.py", "status", f"@{tmp_path / 'study.txt'}")
    (line,) = refused.stderr.splitlines()
    assert refused.returncode == 2 and message in line


def test_a_study_equals_its_sweeps_launched_one_by_one(launch_here, tmp_path):
    assert launch_here(tmp_path / "study", *SMALL).returncode == 0
    for algorithm in ("Fedavg", "Scaffold"):
        for partition in (("iid",), ("dirichlet", "--partition_alpha", 0.3)):
            options = ("--algorithm", algorithm, "--partition", *partition, "--local_optimizer", "sgd")
            assert launch_here(tmp_path / "one", *options, "--num_hparams", 1, "--num_clients", 3).returncode == 0
    assert results(tmp_path / "study") == results(tmp_path / "one")


def test_a_sweep_knows_the_spaces_of_its_sets(launch_here, tmp_path):
    """Sets drawn from another space are added; a file says the domains as well as an option does."""
    out, domains = tmp_path / "out", {"learning_rate": [0.1, 1], "mu": [0.01, 0.1]}
    (tmp_path / "my domains.json").write_text(json.dumps(domains))
    common = ("--algorithm", "Fedavg", "Fedprox", "--local_optimizer", "sgd")
    assert launch_here(out, *common, "--num_hparams", 2).returncode == 0
    grid = [str(word) for word in (*common, "--search", "grid", "--hparams", tmp_path / "my domains.json")]
    options = ["--output_dir", str(out), "--rounds", "2", "--samples_per_client", "40", "--num_trials", "1"]
    assert sweep.main(["launch", *options, *grid, "--skip_confirmation"]) == 0
    for algorithm, sets in (("Fedavg", 2 + 2 - 1), ("Fedprox", 2 + 4 - 1)):  # the grid holds the defaults, which are done
        (sweep_dir,) = out.glob(f"mlp_digits_{algorithm},*")
        assert len(list(sweep_dir.glob("*/trial_0/done"))) == sets
        key = (algorithm, "digits", "sgd")
        own = {name: values for name, values in domains.items() if algorithm == "Fedprox" or name != "mu"}
        spaces = list(map(Space.from_json, json.loads((sweep_dir / "sweep.json").read_text())["spaces"]))
        assert spaces == [space_of("random", {}, *key), space_of("grid", own, *key)]


def test_a_trial_that_begins_reads_no_settings(launch_here, tmp_path):
    """Those of its sweep are written by then. What has become of the file since does not end the sweep."""
    launched = launch_here(tmp_path / "out", "--num_hparams", 1)
    assert launched.returncode == 0
    (trial,) = (tmp_path / "out").glob("*/*/trial_0")
    (trial.parents[1] / "sweep.json").write_text("{")
    Trial(Settings(), {}, 0, 1, trial.with_name("trial_1")).prepare()
    assert trial.with_name("trial_1").is_dir() and (trial.parents[1] / "sweep.json").read_text() == "{"


def test_sweeps_of_unreadable_settings_are_told(tmp_path, capsys):
    (tmp_path / "mlp_digits_Fedavg").mkdir()
    (tmp_path / "mlp_digits_Fedavg" / "sweep.json").write_text(
        json.dumps({"settings": dataclasses.asdict(Settings(num_clients=3)), "spaces": []})
    )
    assert study.sweeps_there(tmp_path) == []
    assert "holds the settings of mlp_digits_Fedavg,num_clients=3" in capsys.readouterr().err
    with pytest.raises(UsageError, match="--num_clients"):
        sweeps_of([{}], tmp_path)
