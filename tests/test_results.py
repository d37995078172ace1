"""What is made of finished trials: selections, statistics, formats, exports."""

import html
import io
import itertools
import json
import re
import shlex
import subprocess
import sys

import numpy as np
import pandas
import pytest
from helpers import PROJECT, call, make_trial, results

import collect_results
from federated.options import names_of
from federated.reporting import selection
from federated.reporting.collect import COLUMNS, collect
from federated.reporting.report import Report
from federated.settings import Settings, comparable
from hparams_registry import OF_ALGORITHM


def collected(capsys, out, *options):
    """(stdout, stderr) of collect_results.py."""
    assert collect_results.main(["--output_dir", str(out), *options]) == 0
    return capsys.readouterr()


def numbers(capsys, out, *options):
    return json.loads(collected(capsys, out, "--format", "json", *options).out)


def test_the_frame_has_the_documented_columns_and_means(tmp_path):
    """Clients hold 10 and 30 validation samples, and 30 and 10 test samples."""
    make_trial(tmp_path, 0, 2, [[0.5, 0.6], [0.9, 0.8]], [0.5, 0.75], local=[[0.5, 0.8], [0.7, None]])
    rounds = collect([tmp_path]).rounds
    assert list(rounds) == [*COLUMNS, "hparams.batch_size", "hparams.dropout_rate", "hparams.learning_rate"]
    assert rounds["round"].tolist() == [1, 2] and rounds["trial_seed"].tolist() == [2, 2]
    expected = {
        "val_acc": [0.8, 0.75], "accuracy": [0.5, 0.75], "test_acc": [0.5, 0.75],
        "local_acc_weighted": [0.55, 0.8], "local_acc_mean": [0.6, 0.8], "local_acc_worst": [0.5, 0.8],
        "local_acc_std": [0.1, 0.0], "seconds": [0.5, 1.0], "bytes_sent": [1e6, 2e6],
    }  # fmt: skip
    for name, values in expected.items():
        assert rounds[name].tolist() == pytest.approx(values), name
    assert json.loads(rounds["hparams"][0]) == {"batch_size": 64, "dropout_rate": 0.5, "learning_rate": 0.0003}


def test_each_clients_accuracy_is_kept_and_has_the_tables_mean_worst_and_spread(tmp_path):
    """Round 2 counts, with `original` all. In trial 1 client 1 has no test samples."""
    for trial, local in enumerate(([[0.5, 0.8, 0.2], [0.7, 0.6, 0.3]], [[0.9, 0.4, 0.5], [None] * 3])):
        make_trial(tmp_path, 0, trial, [[0.3, 0.9, 0.4]] * 2, [0.5, 0.6, 0.7], local=local)
    found = collect([tmp_path])
    assert {accuracies.dtype for accuracies in found.of_clients.values()} == {np.dtype("float32")}
    for name, expected in {
        "validation": [[0.8, 0.6], [0.4, np.nan]],
        "original": [[0.5, 1.6 / 3], [0.6, np.nan]],
    }.items():
        report = Report(found, name)
        (accuracies,), (best,) = report.of_clients.values(), report.best.to_dict("records")
        assert accuracies == pytest.approx(np.array(expected), nan_ok=True)
        assert np.nanmean(accuracies, axis=1).mean() == pytest.approx(best["local_acc_mean"])
        if name == "validation":
            assert np.nanmin(accuracies, axis=1).mean() == pytest.approx(best["local_acc_worst"])
            assert np.nanstd(accuracies, axis=1).mean() == pytest.approx(best["local_acc_std"])


def test_what_each_selection_takes(tmp_path, capsys):
    """Set 0 is best on validation, in round 2; set 1 on test data, in round 1, and in the last round's validation."""
    for trial in (0, 1):
        make_trial(tmp_path, 0, trial, [[0.3, 0.9, 0.4]] * 2, [0.5, 0.6, 0.7])
        make_trial(tmp_path, 1, trial, [[0.1, 0.2, 0.5]] * 2, [0.95, 0.2, 0.3 + 0.1 * trial])
    found = {name: numbers(capsys, tmp_path, "--selection", name)["results"][0] for name in selection.SELECTIONS}
    assert {name: (best["hparams_seed"], best["n"], best["accuracy"]) for name, best in found.items()} == {
        "validation": (0, 2, 0.6),
        "last": (1, 2, pytest.approx(0.35)),
        "oracle": (1, 2, 0.95),
        "original": (0, 6, pytest.approx(0.6)),
    }
    assert found["original"]["accuracy_std"] == pytest.approx(np.std([0.5, 0.6, 0.7] * 2, ddof=1))
    for name in ("last", "oracle", "original"):
        out = collected(capsys, tmp_path, "--selection", name).out
        assert f"Selection '{name}': " in out and "Best Test Accuracy" not in out


def test_intervals_corrections_and_power_are_the_known_ones():
    from scipy import stats

    values = pandas.Series([0.91, 0.93, 0.9, 0.95])
    mean, deviation, low, high = selection.mean_and_interval(values)
    assert (mean, deviation) == (values.mean(), values.std())
    assert (low, high) == pytest.approx(stats.t.interval(0.95, 3, loc=mean, scale=stats.sem(values)))
    assert np.isnan(selection.mean_and_interval(values[:1])[2])
    # Holm: the smallest times 3, the next times 2, and never less than the one before
    corrected = selection.holm(pandas.Series([0.04, 0.01, np.nan, 0.03, 0.9]))
    assert corrected.tolist() == pytest.approx([0.09, 0.04, np.nan, 0.09, 0.9], nan_ok=True)
    # 34 pairs are the usual answer for half a standard deviation
    assert selection.detectable(34) < 0.5 < selection.detectable(33)
    assert selection.detectable(selection.ENOUGH_PAIRS) < 1 < selection.detectable(selection.ENOUGH_PAIRS - 1)


def test_the_expected_best_is_the_mean_over_all_ways_to_draw():
    accuracies = [0.4, 0.9, 0.5, 0.7]
    ranking = pandas.DataFrame({"hparams_seed": [0, 1, 2, 3, 4], "val_acc": [0.99, *accuracies]})
    curve = selection.expected_best(ranking)  # the defaults, at 0.99, are no draw
    for budget in (1, 2, 3, 4):
        assert curve[budget] == pytest.approx(np.mean([max(draw) for draw in itertools.product(accuracies, repeat=budget)]))
    # What the authors' own samplemax (github.com/dodgejesse/show_your_work) gives for seven draws, two of them equal
    ranking = pandas.DataFrame({"hparams_seed": range(1, 8), "val_acc": [0.61, 0.83, 0.79, 0.42, 0.9, 0.77, 0.83]})
    golden = [0.735714286, 0.814897959, 0.842594752, 0.856130779, 0.86457131, 0.87063494, 0.875331841]
    assert selection.expected_best(ranking).tolist() == pytest.approx(golden, abs=1e-9)


def test_importance_is_the_rank_correlation():
    ranking = pandas.DataFrame({"val_acc": [0.9, 0.8, 0.7, 0.6], "a": [1, 10, 100, 1000], "b": [5, 5, 5, 5], "c": [2, 1, 1, 2]})
    found = selection.importance(ranking, ["b", "c", "a"]).set_index("hparam")
    assert found.index[0] == "a" and found.loc["a", "importance"] == 1 and found.loc["a", "correlation"] == -1
    assert found.loc["c", "importance"] == 0 and np.isnan(found.loc["b", "importance"])


ACCURACIES = {"Fedavg": [0.70, 0.72, 0.75, 0.71], "Fedprox": [0.72, 0.75, 0.77, 0.74], "Scaffold": [0.70, 0.70, 0.75, 0.73]}


def make_three(out):
    """Three algorithms with two settings each; Scaffold misses a seed and has one of its own."""
    for algorithm, accuracies in ACCURACIES.items():
        for seed, accuracy in enumerate(accuracies, start=algorithm == "Scaffold"):
            settings = Settings(algorithm=algorithm, local_optimizer="sgd")
            make_trial(out, 0, seed, [[0.5]] * 2, [accuracy], settings)


def test_algorithms_are_compared_over_the_seeds_they_share(tmp_path, capsys):
    from scipy import stats

    make_three(tmp_path)
    found = numbers(capsys, tmp_path)
    assert [best["algorithm"] for best in found["results"]] == ["Fedavg", "Fedprox", "Scaffold"]
    prox, scaffold = found["comparison"]
    p = [
        stats.ttest_rel(ACCURACIES["Fedprox"], ACCURACIES["Fedavg"]).pvalue,
        stats.ttest_rel(ACCURACIES["Scaffold"][:3], ACCURACIES["Fedavg"][1:]).pvalue,
    ]
    assert (prox["against"], prox["n"], scaffold["n"]) == ("Fedavg", 4, 3)
    assert prox["difference"] == pytest.approx(0.025)
    assert [prox["p"], scaffold["p"]] == pytest.approx(p)
    assert [prox["p_holm"], scaffold["p_holm"]] == pytest.approx([min(2 * p[0], 1), max(2 * p[0], p[1])])
    out = collected(capsys, tmp_path).out
    assert "n = 3 is too small to tell small differences" in out
    assert "| **0.7450 ± 0.0208**  |" in out and out.count("**") == 2
    assert r"\textbf{0.7450 $\pm$ 0.0208}" in collected(capsys, tmp_path, "--format", "latex").out
    assert "<b>0.7450 ± 0.0208</b>" in collected(capsys, tmp_path, "--format", "html").out


def test_algorithms_are_compared_with_the_one_that_is_named(tmp_path, capsys):
    """In any case of letters. MNIST has no Fedprox, so there nothing is compared; on the digits Holm corrects two tests."""
    make_three(tmp_path)
    for algorithm in ("Fedavg", "Moon"):
        settings = Settings(dataset="mnist", algorithm=algorithm, local_optimizer="sgd")
        make_trial(tmp_path, 0, 0, [[0.5]] * 2, [0.5], settings)
    default = {(test["dataset"], test["algorithm"]): test for test in numbers(capsys, tmp_path)["comparison"]}
    assert list(default) == [("digits", "Fedprox"), ("digits", "Scaffold"), ("mnist", "Moon")]
    found = numbers(capsys, tmp_path, "--against", "FEDPROX")
    avg, scaffold = found["comparison"]
    assert [(test["algorithm"], test["against"], test["n"]) for test in (avg, scaffold)] == [
        ("Fedavg", "Fedprox", 4),
        ("Scaffold", "Fedprox", 3),
    ]
    assert avg["difference"] == pytest.approx(-default["digits", "Fedprox"]["difference"])
    assert avg["p"] == pytest.approx(default["digits", "Fedprox"]["p"])
    assert avg["p_holm"] == pytest.approx(min(1, max(2 * min(avg["p"], scaffold["p"]), avg["p"])))
    assert "Not compared: mlp mnist, where Fedprox has no finished trials." in found["notes"]
    assert numbers(capsys, tmp_path, "--against", "fedavg")["comparison"] == list(default.values())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--against", "ditto"), "--against Ditto: it has no finished trials; there are those of Fedavg, Fedprox, Scaffold"),
        (("--against", "Fedavg", "--selection", "original"), "--selection original compares nothing"),
    ],
)
def test_where_nothing_is_to_be_compared_with_it_is_said(tmp_path, capsys, options, words):
    make_three(tmp_path)
    page = tmp_path / "page.html"
    assert collect_results.main(["--output_dir", str(tmp_path), "--html", str(page), *options]) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == "" and words in line and not page.exists()


def test_what_jobs_took_is_lines_in_github_and_a_table_elsewhere(tmp_path, capsys):
    make_three(tmp_path)
    make_trial(tmp_path, 1, 0, [[0.4]] * 2, [0.4], Settings(dataset="fashion_mnist", algorithm="fedper"))
    texts = {form: collected(capsys, tmp_path, "--format", form).out for form in ("github", "latex", "html")}
    expected = [
        *(("mlp", "digits", algorithm, "sgd", "1", "4", "2", "2.0", "0.5", "1.0") for algorithm in ACCURACIES),
        ("mlp", "fashion_mnist", "fedper", "adam", "1", "1", "2", "0.5", "0.5", "1.0"),
    ]
    lines = texts["github"].partition("Job Statistics:\n\n")[2]
    assert lines == "".join(
        f"{row[0]} {row[1]} {row[2]}, local_optimizer={row[3]}:\n"
        f"Number of hyperparameter sets: {row[4]}\nNumber of trials: {row[5]}\nNumber of clients: {row[6]}\n"
        f"Training time: {row[7]} s in total, {row[8]} s a trial\nBytes sent: {row[9]} MB a trial\n"
        for row in expected
    )
    tables_of = {form: texts[form].partition("Job statistics:")[2] for form in ("latex", "html")}
    cells = [tuple(re.split(r"\s+&\s+", line.strip(" \\"))) for line in tables_of["latex"].splitlines() if " & " in line][1:]
    assert [tuple(cell.replace(r"\_", "_") for cell in row) for row in cells] == expected
    rows = tables_of["html"].splitlines()
    assert [tuple(re.findall(">([^<]+)</td>", row)) for row in rows if "<td" in row] == expected


def test_what_latex_takes_for_its_own_is_escaped_everywhere(tmp_path, capsys):
    make_three(tmp_path)
    make_trial(tmp_path, 1, 0, [[0.4]] * 2, [0.4], Settings(dataset="fashion_mnist"))
    out = collected(capsys, tmp_path, "--format", "latex", "--top", "1").out
    assert (
        r"Settings of mlp fashion\_mnist Fedavg, local\_optimizer=adam:" in out
        and r" & batch\_size " in out
        and r"in 80 \% of cases" in out
    )
    assert not re.search(r"(?<!\\)[_%#]|[±–]", out)


def test_accuracies_that_read_the_same_are_bold_together(tmp_path, capsys):
    """The sums of 0.1, 0.2 and 0.3 differ with their order."""
    for algorithm, accuracies in {"Fedavg": (0.1, 0.2, 0.3), "Fedprox": (0.3, 0.2, 0.1), "Moon": (0.1, 0.2, 0.2)}.items():
        for seed, accuracy in enumerate(accuracies):
            make_trial(tmp_path, 0, seed, [[0.5]] * 2, [accuracy], Settings(algorithm=algorithm))
    assert collected(capsys, tmp_path).out.count("| **0.2000 ± 0.1000** ") == 2


def test_csv_and_json_hold_the_numbers_and_nothing_else(tmp_path, capsys):
    make_three(tmp_path)
    make_trial(tmp_path, 1, 0, [[0.9]] * 2, [0.9], done=False)
    out, err = collected(capsys, tmp_path, "--format", "csv", "--top", "5")
    table = pandas.read_csv(io.StringIO(out))
    assert "not done" in err and table["algorithm"].tolist() == list(ACCURACIES)
    assert table["accuracy"].tolist() == pytest.approx([np.mean(values) for values in ACCURACIES.values()])
    assert table["hparams.learning_rate"].tolist()[:2] == [0.1, 0.1]
    assert any("not done" in note for note in numbers(capsys, tmp_path)["notes"])


def test_where_there_is_no_global_model_clients_are_counted(tmp_path, capsys):
    """0.9 on 30 test samples and 0.5 on 10: 0.8. The second client has no test samples in the other trial."""
    settings = Settings(algorithm="Fedper")
    make_trial(tmp_path, 0, 0, [[0.5]] * 2, [0.1], settings, local=[[0.9], [0.5]])
    make_trial(tmp_path, 0, 1, [[0.5]] * 2, [0.1], settings, local=[[0.8], [None]])
    out = collected(capsys, tmp_path).out
    assert "Best Test Accuracy on Clients' Shares: 0.8000 ± 0.0000\n" in out
    (row,) = (line for line in out.splitlines() if line.startswith("| mlp"))
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[7:12] == ["–", "0.8000", "0.7500", "0.6500", "0.1000"]
    assert "As clients have models of their own with Fedper, all rows are judged on the clients' shares" in out
    assert "shares of the test set, 40 samples in a trial: each test sample" in out


def test_shares_of_unlike_sizes_are_told(tmp_path, capsys):
    settings = Settings(algorithm="Fedper")
    for seed in (0, 1):
        trial = make_trial(tmp_path, 0, seed, [[0.5]] * 2, [0.1], settings, local=[[0.9], [0.9]])
    with np.load(trial / "clients.npz") as file:
        clients = dict(file)
    np.savez(trial / "clients.npz", **clients | {"local_samples": np.array([20, 7])})
    assert "shares of the test set, 27 to 40 samples in a trial: each" in collected(capsys, tmp_path).out


def test_the_target_is_timed_in_the_trials_that_reach_it(tmp_path, capsys):
    make_trial(tmp_path, 0, 0, [[0.5] * 3] * 2, [0.5, 0.8, 0.9])
    make_trial(tmp_path, 0, 1, [[0.5] * 3] * 2, [0.5, 0.6, 0.7])
    (best,) = numbers(capsys, tmp_path, "--target", "0.8")["results"]
    assert (best["target_round"], best["target_seconds"], best["target_bytes_sent"]) == (2, 1.0, 2e6)
    out = collected(capsys, tmp_path, "--target", "0.8").out
    assert "| Rounds to 0.8   | Seconds to 0.8   |" in out and "| 2.0 (1 of 2)    | 1.0              |" in out
    assert re.search(r"\| –  +\| –  +\|\n", collected(capsys, tmp_path, "--target", "0.95").out)


def test_settings_are_ranked_with_their_hyper_parameters(tmp_path, capsys):
    for seed, accuracy in enumerate((0.5, 0.8, 0.7)):
        make_trial(tmp_path, seed, 0, [[accuracy]] * 2, [accuracy])
    out = collected(capsys, tmp_path, "--top", "2").out
    assert "| 1      | 38           | 0.5            | 4.00989e-05     | 0.8000 " in out and "| 3      |" not in out
    assert "Absolute rank correlation (Spearman)" in out
    assert "| 1              | 0.7500 " in out and "| 2              | 0.7750 " in out  # of 0.7 and 0.8


def test_what_diverged_and_what_mixes_versions_is_told(tmp_path, capsys):
    make_trial(tmp_path, 0, 0, [[0.5]] * 2, [0.5])
    mixed = make_trial(tmp_path, 0, 1, [[0.5]] * 2, [0.5]) / "results.json"
    values = json.loads(mixed.read_text())
    values["provenance"]["runs"].append({"round": 1, "code": "b"})
    mixed.write_text(json.dumps(values))
    for seed, is_final in enumerate((True, False, True), start=2):
        trial = make_trial(tmp_path, 0, seed, [[0.5]] * 2, [0.5], done=False)
        failed = {"role": "server", "reason": "ended", "is_final": is_final, "earlier": []}
        (trial / "failed.json").write_text(json.dumps(failed))
    err = collected(capsys, tmp_path).err
    assert "Ignored: 3 trials that are not done, 2 of them diverged.\n" in err
    assert "Computed by more than one version of the code: 1 trials" in err


@pytest.mark.parametrize("suffix", ["csv", "json", "CSV", "JSON"])
def test_the_exported_rows_are_those_collected(tmp_path, capsys, suffix):
    make_three(tmp_path / "out")
    file = tmp_path / f"rows.{suffix}"
    collected(capsys, tmp_path / "out", "--export", str(file))
    read = pandas.read_csv(file) if suffix.lower() == "csv" else pandas.read_json(file, dtype={"hash": str})
    rounds = collect([tmp_path / "out"]).rounds
    assert [name for name in read if name in rounds] == list(rounds) and len(read) == len(rounds) == 12
    assert list(read)[1 : 1 + len(SETTINGS)] == SETTINGS and read["local_optimizer"].tolist() == ["sgd"] * 12
    assert read["accuracy"].tolist() == pytest.approx(rounds["accuracy"].tolist())
    assert read["hparams"].map(str).tolist() == rounds["hparams"].tolist()


def test_parquet_keeps_every_bit_and_type(tmp_path, capsys):
    """Of rounds that were not evaluated and hyper-parameters that not every algorithm has, too."""
    make_three(tmp_path / "out")
    make_trial(tmp_path / "out", 1, 0, [[None, 0.5]] * 2, [None, 0.7], Settings(algorithm="Fedrep"))
    file = tmp_path / "rows.parquet"
    collected(capsys, tmp_path / "out", "--export", str(file))
    rounds = collect([tmp_path / "out"]).rounds
    rounds["accuracy"] = rounds["local_acc_weighted"]  # by which all are judged, as Fedrep is among them
    assert rounds["val_acc"].isna().sum() == 1 and rounds["hparams.head_epochs"].isna().sum() == 12
    read = pandas.read_parquet(file)
    pandas.testing.assert_frame_equal(read[list(rounds)], rounds, check_exact=True)
    assert list(zip(read["algorithm"], read["local_optimizer"]))[-1] == ("Fedrep", "adam")


SETTINGS = names_of(Settings)
FORMS = ("github", "latex", "html", "csv", "json")


def unformatted(text):
    """What a table or note says, whatever its format."""
    return html.unescape(text).replace("\\", "").replace("$", "")


UNLIKE = {
    "rounds": {"rounds": 2},
    "partition_alpha": {"partition": "dirichlet"},
    "local_optimizer sgd instead of adam": {"local_optimizer": "sgd"},
    "samples_per_client": {"samples_per_client": 40},
    "hyper-parameter sets 2 instead of 1": {},
    "2nn": {"model_arch": "2nn"},
}


@pytest.mark.parametrize("difference", UNLIKE)
def test_what_has_other_settings_or_another_budget_is_not_compared(tmp_path, capsys, difference):
    for trial in range(3):
        make_trial(tmp_path, 0, trial, [[0.5]] * 2, [0.5 + trial / 100])
        for hparams_seed in range(1 + difference.startswith("hyper")):
            settings = Settings(**{"algorithm": "Fedprox", **UNLIKE[difference]})
            curve = [0.6 + trial / 50] * (1 + difference.startswith("rounds"))
            make_trial(tmp_path, hparams_seed, trial, [curve] * 2, curve, settings)
    for form in FORMS:
        out = collected(capsys, tmp_path, "--format", form).out
        assert difference in unformatted(out) or (form == "csv" and difference.startswith("hyper")), form
        assert "**" not in out and "textbf" not in out and "<b>" not in out and "Comparison" not in out
    found = numbers(capsys, tmp_path)
    assert found["comparison"] == [] and [best["group"] for best in found["results"]] == [0, 1]


def test_the_algorithm_and_where_it_is_computed_are_no_difference():
    def equal(*settings):
        first, second = (comparable(Settings(**each)) for each in settings)
        return first == second

    assert equal({"device": "cpu", "threads": 1, "algorithm": "Moon"}, {"threads": 2})
    assert not equal({"partition": "dirichlet"}, {"partition": "dirichlet", "partition_alpha": 0.1})
    assert not equal({"partition": "labels"}, {"partition": "labels", "labels_per_client": 1})
    checked = {
        "model_arch",
        "local_epochs",
        "participation",
        "holdout_fraction",
        "augmentation",
        "optimizer_state",
        "precision",
    }
    assert checked | {"eval_every"} < set(comparable(Settings()))


def test_beside_personal_models_all_are_judged_on_the_same_samples(tmp_path, capsys):
    """Two algorithms that do the same on the clients' shares, of which one is worse on the rest of the test set."""
    for trial, accuracy in enumerate((0.9, 0.8, 0.7)):
        for algorithm in ("Fedavg", "Ditto"):
            local = [[accuracy], [accuracy + 0.1 * (algorithm == "Ditto")]]
            make_trial(tmp_path, 0, trial, [[0.5]] * 2, [0.1 + trial / 50], Settings(algorithm=algorithm), local=local)
    for form in ("github", "latex", "html"):
        assert "Best Test Accuracy on Clients' Shares" in unformatted(collected(capsys, tmp_path, "--format", form).out)
    found = numbers(capsys, tmp_path, "--target", "0.65")
    avg, ditto = found["results"]
    assert [best["judged_by"] for best in (avg, ditto)] == ["local_acc_weighted"] * 2
    assert (avg["accuracy"], ditto["accuracy"]) == (pytest.approx(0.8), pytest.approx(0.825))
    assert avg["test_acc"] == pytest.approx(0.12) and avg["target_reached"] == 3
    assert found["comparison"][0]["difference"] == pytest.approx(0.025)
    assert "counts in Global only" in found["notes"][0]
    file = tmp_path / "rows.csv"
    collected(capsys, tmp_path, "--export", str(file))
    rows = pandas.read_csv(file)
    assert rows["accuracy"].tolist() == rows["local_acc_weighted"].tolist()


def test_sets_are_judged_on_the_seeds_that_all_have(tmp_path, capsys):
    """Three sets of two trials, and two trials more of two of them. The set that is best on the first two stays so."""
    for hparams_seed, accuracy in enumerate((0.5, 0.9, 0.6)):
        for trial in range(2):
            make_trial(tmp_path, hparams_seed, trial, [[accuracy]] * 2, [accuracy + trial / 100])
    before = numbers(capsys, tmp_path)["results"][0]
    for hparams_seed, trial in ((0, 2), (2, 2)):
        make_trial(tmp_path, hparams_seed, trial, [[0.99]] * 2, [0.99])
    make_trial(tmp_path, 1, 2, [[0.99]] * 2, [0.99], done=False)
    (best,) = numbers(capsys, tmp_path)["results"]
    assert (best["hparams_seed"], best["accuracy"], best["n"]) == (1, before["accuracy"], 2)
    assert (best["trial_seeds"], best["trials_left_out"], best["num_hparams"]) == ("0 1", 2, 3)
    for form in ("github", "latex", "html", "json"):
        out = unformatted(collected(capsys, tmp_path, "--format", form).out)
        assert "on the trial seeds that all its sets have, 0, 1; 2 more finished trials are left out" in out
        assert form == "json" or "2 of 3" in out
    table = pandas.read_csv(io.StringIO(collected(capsys, tmp_path, "--format", "csv").out))
    assert table["trials_left_out"].tolist() == [2] and table["trial_seeds"].tolist() == ["0 1"]


def test_a_set_that_diverged_is_left_out_and_part_of_the_budget(tmp_path, capsys):
    """And one that lacks the seed that most have."""
    for algorithm in ("Fedavg", "Fedprox"):
        settings = Settings(algorithm=algorithm)
        for hparams_seed, trial in ((0, 0), (0, 1), (1, 0), (1, 1)):
            is_diverged = (algorithm, hparams_seed, trial) == ("Fedprox", 1, 1)
            accuracy = 0.9 if hparams_seed else 0.5 + trial / 10
            directory = make_trial(tmp_path, hparams_seed, trial, [[accuracy]] * 2, [accuracy], settings, done=not is_diverged)
            if is_diverged:
                failed = {"role": "server", "reason": "ended", "is_final": True, "earlier": []}
                (directory / "failed.json").write_text(json.dumps(failed))
    make_trial(tmp_path, 2, 5, [[0.99]] * 2, [0.99], Settings(algorithm="Fedavg"))
    found = numbers(capsys, tmp_path)
    avg, prox = found["results"]
    assert (avg["hparams_seed"], avg["n"], avg["num_hparams"], avg["sets_unfinished"]) == (1, 2, 2, 1)
    assert (prox["hparams_seed"], prox["n"], prox["num_hparams"], prox["sets_diverged"]) == (0, 2, 2, 1)
    assert len(found["comparison"]) == 1 and any("1 with trials that diverged" in note for note in found["notes"])


def test_means_over_unlike_seeds_are_told(tmp_path, capsys):
    make_three(tmp_path)
    assert "unlike trial seeds: Fedavg 0 1 2 3, Fedprox 0 1 2 3, Scaffold 1 2 3 4" in collected(capsys, tmp_path).out


def test_trials_of_unlike_processors_are_told(tmp_path, capsys):
    for trial, runs in enumerate((["A, AVX2"], ["A, AVX2"], ["A, AVX2", "B, AVX512"])):
        file = make_trial(tmp_path, 0, trial, [[0.5]] * 2, [0.5]) / "results.json"
        values = json.loads(file.read_text())
        values["provenance"]["runs"] = [{"code": "a", "processor": each, "devices": ["cpu"]} for each in runs]
        file.write_text(json.dumps(values))
    line = "2 trials on A, AVX2, cpu; 1 trials on A, AVX2, cpu and then B, AVX512, cpu."
    assert line in collected(capsys, tmp_path).err and any(line in note for note in numbers(capsys, tmp_path)["notes"])


@pytest.mark.slow
def test_a_hyper_parameter_may_have_the_name_of_a_column(tmp_path, capsys, monkeypatch):
    """As rank is one of an adapter, and of a setting among others. Who reads knows nothing of it."""
    with monkeypatch.context() as patch:
        patch.setitem(OF_ALGORITHM, "Fedprox", {"rank": OF_ALGORITHM["Fedprox"]["mu"]})
        for hparams_seed in range(2):
            make_trial(tmp_path / "out", hparams_seed, 0, [[0.5 - hparams_seed / 10]] * 2, [0.5], Settings(algorithm="Fedprox"))
    lines = collected(capsys, tmp_path / "out", "--top", "2", "--plots", str(tmp_path / "plots")).out.splitlines()
    head = next(number for number, line in enumerate(lines) if line.startswith("| Rank"))
    cells = [(row[1].strip(), row[5].strip()) for row in (lines[number].split("|") for number in (head, head + 2, head + 3))]
    assert cells == [("Rank", "rank"), ("1", "0.01"), ("2", "0.001")]


def test_without_pyarrow_parquet_is_refused(run_without, tmp_path):
    make_trial(tmp_path / "out", 0, 0, [[0.5]] * 2, [0.5])
    refused = run_without("pyarrow", "collect_results", "--output_dir", tmp_path / "out", "--export", tmp_path / "rows.parquet")
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert "needs pyarrow" in line and not list(tmp_path.glob("*parquet*"))


@pytest.mark.slow
@pytest.mark.process
def test_the_best_commands_train_the_best_settings_again(launch_here, tmp_path, capsys, monkeypatch):
    """Each a random draw with values fixed by hand, with settings that are no defaults, launched from another directory. Of
    MNIST nothing is done yet."""
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    options = ("--algorithm", "fedavg", "DITTO", "--local_optimizer", "sgd", "--partition", "dirichlet")
    options += ("--num_clients", 4, "--participation", 0.5, "--eval_every", 2, "--rounds", 3, "--num_trials", 2)
    options += ("--hparams_seed", 7, "--hparams", '{"weight_decay": 0.01, "momentum": 0.5}', "--data_dir", "my data")
    monkeypatch.chdir(tmp_path / "here")
    out = tmp_path / "here" / "my sweep"
    launched = launch_here("here/my sweep/", *options)
    assert launched.returncode == 0, launched.stderr
    make_trial(out, 0, 0, [[0.5]] * 2, [0.5], Settings(dataset="mnist"), done=False)
    printed = collected(capsys, "my sweep/", "--best_command").out
    best = {row["algorithm"]: row["hash"] for row in numbers(capsys, out)["results"]}
    assert list(best) == ["Fedavg", "Ditto"]
    expected = {
        name: content
        for name, content in results(out).items()
        if any(name.startswith(f"mlp_digits_{algorithm},") and f"/{best[algorithm]}/" in name for algorithm in best)
    }
    commands = list(map(shlex.split, printed.splitlines()))
    for command, algorithm in zip(commands, ("fedavg", "DITTO"), strict=True):
        assert {f"--algorithm={algorithm}", f"--data_dir={tmp_path / 'my data'}"} < set(command)
        assert command[:2] == [sys.executable, str(PROJECT / "sweep.py")]
        again = call(tmp_path / "there", "sweep.py", *command[2:], "--skip_confirmation")
        assert again.returncode == 0, again.stderr
    more = results(tmp_path / "here" / "my sweep_best")
    assert len(expected) == 2 * 2 and len(more) == 2 * 10 and more.items() >= expected.items()


@pytest.mark.process
def test_the_plain_command_imports_nothing_slow(tmp_path):
    make_trial(tmp_path, 0, 0, [[0.5]] * 2, [0.5])
    program = f"import sys, collect_results; collect_results.main(['--output_dir', {str(tmp_path)!r}]); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=PROJECT)
    assert not {"torch", "scipy.stats", "matplotlib"} & set(done.stdout.splitlines()[-1].split())
