"""The table of a study: settings that vary, chosen and side by side."""

import itertools
import re
import subprocess

import pytest
from helpers import make_trial

import collect_results
from federated.search import RANDOM
from federated.settings import Settings, write_sweep_file
from hparams_registry import default_hparams, space_of

SKEWS = {"iid": {}, "0.1": {"partition": "dirichlet", "partition_alpha": 0.1}, "0.5": {"partition": "dirichlet"}}
# Accuracies of three seeds. Fedprox is no different from Fedavg under 0.1, and better under iid
ACCURACIES = {
    ("Fedavg", "iid"): (0.80, 0.81, 0.83), ("Fedprox", "iid"): (0.90, 0.911, 0.93),
    ("Fedavg", "0.1"): (0.50, 0.62, 0.60), ("Fedprox", "0.1"): (0.60, 0.52, 0.61),
    ("Fedavg", "0.5"): (0.70, 0.71, 0.73),
}  # fmt: skip


@pytest.fixture
def study(tmp_path):
    """Two algorithms under three skews and two participations, of which Fedprox misses two combinations."""
    out = tmp_path / "a study"
    for ((algorithm, skew), accuracies), participation in itertools.product(ACCURACIES.items(), (0.5, 1.0)):
        settings = Settings(algorithm=algorithm, participation=participation, local_optimizer="sgd", **SKEWS[skew])
        for seed, accuracy in enumerate(accuracies):
            make_trial(out, 0, seed, [[0.5]] * 2, [accuracy], settings)
    return out


def collected(capsys, out, *options):
    assert collect_results.main(["--output_dir", str(out), *options]) == 0
    return capsys.readouterr().out


def rows(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_settings_stand_side_by_side(study, capsys):
    out = collected(capsys, study, "--columns", "partition_alpha", "--where", "participation=1")
    assert rows(out) == [
        ["Algorithm", "partition_alpha=–", "partition_alpha=0.1", "partition_alpha=0.5"],
        ["-" * len(cell) for cell in re.search(r"\n\|([-|]+)\|\n", out).group(1).split("|")],
        ["Fedavg", "81.33 ± 1.53", "57.33 ± 6.43†", "71.33 ± 1.53"],
        ["Fedprox", "**91.37 ± 1.52**", "**57.67 ± 4.93**", "–"],
    ]
    assert "over 3 trials" in out and "Holm's correction at level 0.05" in out


def test_what_varies_beside_the_columns_tells_rows_apart(study, capsys):
    """But for what follows from them: the optimizer's state from the participation, the partition from its parameter."""
    table = rows(collected(capsys, study, "--columns", "participation"))
    assert table[0] == ["Algorithm", "partition", "partition_alpha", "participation=0.5", "participation=1.0"]
    assert [row[:3] for row in table[2:]] == [
        ["Fedavg", "dirichlet", "0.1"],
        ["Fedprox", "dirichlet", "0.1"],
        ["Fedavg", "dirichlet", "0.5"],
        ["Fedavg", "iid", "–"],
        ["Fedprox", "iid", "–"],
    ]
    both = rows(collected(capsys, study, "--columns", "participation", "partition_alpha"))
    assert both[0][1:] == [
        f"participation={participation}" + f", partition_alpha={alpha}" * (alpha is not None)
        for participation in (0.5, 1.0)
        for alpha in (None, 0.1, 0.5)
    ]


def test_latex_and_html_group_the_heads(study, capsys, tmp_path):
    options = ("--columns", "partition_alpha", "participation", "--where", "partition=dirichlet")
    latex = collected(capsys, study, *options, "--format", "latex")
    assert r"partition\_alpha & \multicolumn{2}{c}{0.1} & \multicolumn{2}{c}{0.5} \\" in latex
    assert [latex.count(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule")] == [1, 1, 1]
    assert r"57.33 $\pm$ 6.43$^\dagger$" in latex and r"\textbf{57.67 $\pm$ 4.93}" in latex
    assert '<th colspan="2">0.1</th><th colspan="2">0.5</th>' in collected(capsys, study, *options, "--format", "html")
    page = tmp_path / "page.html"
    collected(capsys, study, *options, "--html", str(page))
    assert '<th colspan="2">0.1</th>' in page.read_text()


@pytest.mark.slow
@pytest.mark.network
def test_latex_compiles_and_fits_a_page_at_five_columns(capsys, tmp_path, need_programs):
    need_programs(["pdflatex"], ["texlive-latex-recommended"])
    for number, algorithm in itertools.product(range(5), ("Fedavg", "Fedprox")):
        settings = Settings(algorithm=algorithm, partition="dirichlet", partition_alpha=(number + 1) / 10)
        for seed in range(3):
            make_trial(tmp_path / "out", 0, seed, [[0.5]] * 2, [0.8 + (seed + number + len(algorithm)) % 4 / 50], settings)
    latex = collected(capsys, tmp_path / "out", "--columns", "partition_alpha", "--format", "latex")
    table = re.search(r"\\begin{tabular}.*\\end{tabular}", latex, re.DOTALL).group()
    (tmp_path / "paper.tex").write_text(
        r"\documentclass[twocolumn]{article}\usepackage{booktabs}\begin{document}\setbox0\hbox{" + table + "}"
        r"\ifdim\wd0>\textwidth\errmessage{too wide}\fi\begin{table*}\box0\end{table*}\end{document}"
    )
    command = ["pdflatex", "-halt-on-error", "paper.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0 and (tmp_path / "paper.pdf").exists(), done.stdout


def test_every_format_has_a_column_for_each_setting_that_varies(study, capsys, tmp_path):
    for form in ("github", "latex", "html", "csv", "json"):
        out = collected(capsys, study, "--format", form).replace("\\_", "_")
        assert all(name in out for name in ("partition_alpha", "participation")), form
        assert "num_clients" not in out or form in ("csv", "json")
    collected(capsys, study, "--export", str(tmp_path / "rows.csv"))
    head = (tmp_path / "rows.csv").read_text().splitlines()[0].split(",")
    assert {"num_clients", "rounds", "partition_alpha", "algorithm"} < set(head)


@pytest.mark.parametrize(
    ("where", "number"),
    [
        (["partition=dirichlet", "participation=0.50"], 3),
        (["algorithm=FEDPROX"], 4),
        (["algorithm=fedprox", "algorithm=Fedavg", "partition_alpha=.1"], 4),
        (["partition_alpha=none"], 4),
    ],
)
def test_conditions_choose_sweeps(study, capsys, where, number):
    out = collected(capsys, study, "--where", *where, "--format", "csv")
    assert len(out.splitlines()) == 1 + number


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--where", "partition_alpha=0.2"], "--where partition_alpha=0.2: no sweep has it; there are None, 0.1, 0.5"),
        (["--where", "partition=iid", "partition_alpha=0.1"], "--where partition=iid partition_alpha=0.1: no sweep has all"),
        (["--columns", "participation", "--format", "csv"], "--columns is for tables: --format csv has a column for each"),
    ],
)
def test_what_cannot_be_chosen_is_one_line(study, capsys, options, message):
    assert collect_results.main(["--output_dir", str(study), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_settings_of_several_search_spaces_are_told_apart(tmp_path, capsys):
    """Sets 1 to 3 are drawn from the registry's domains; the defaults are also the one set of a grid."""
    for number, accuracy in enumerate((0.5, 0.6, 0.7, 0.8)):
        make_trial(tmp_path, number, 0, [[accuracy]] * 2, [accuracy])
    out = collected(capsys, tmp_path, "--top", "5")
    assert "Importance in mlp digits Fedavg:" in out and "Best of k draws of mlp digits Fedavg:" in out
    assert "Space 1: random search, batch_size 32 to 1024, log; dropout_rate 0, 0.5; learning_rate 1e-05 to 0.001, log." in out
    key = Settings().hparams_key
    grid = space_of("grid", default_hparams(*key), *key)
    write_sweep_file(tmp_path / "mlp_digits_Fedavg", Settings(rounds=1), grid)
    out = collected(capsys, tmp_path, "--top", "5")
    assert (
        "has hyper-parameter sets of several search spaces: 4 from random search, " in out and "; 1 from grid search, " in out
    )
    assert "Best of k draws of mlp digits Fedavg (space 1):" in out and "(space 2)" not in out


def test_unlike_domains_of_what_is_compared_are_told(tmp_path, capsys):
    for algorithm in ("Fedavg", "Fedprox"):
        settings = Settings(algorithm=algorithm, rounds=1)
        if algorithm == "Fedavg":
            wide = space_of(RANDOM, {"learning_rate": {"low": 0.1, "high": 1}}, *settings.hparams_key)
            write_sweep_file(tmp_path / settings.name, settings, wide)
        make_trial(tmp_path, 0, 0, [[0.5]] * 2, [0.5], settings)
    out = collected(capsys, tmp_path)
    assert "learning_rate was tuned over unlike domains: Fedavg over 0.1 to 1 and 1e-05 to 0.001, log; Fedprox over " in out
    assert "batch_size was tuned" not in out
