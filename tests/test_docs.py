"""What README and docs say holds: links lead somewhere, tables are those of the code, and commands run."""

import importlib.util
import re
import shlex
import shutil

import pytest
from helpers import PROJECT, call

from federated.version import VERSION

PAGES = sorted([*PROJECT.glob("*.md"), *PROJECT.glob("docs/*.md"), *PROJECT.glob("examples/**/*.md")])
COMMANDED = [page for page in PAGES if page.name != "CHANGELOG.md"]

# Commands that this test does not run, by how they begin, and where they run instead
ELSEWHERE = {
    "bash run_": "continuous integration and a first-time user run them",
    "bash .ci/run": "the continuous integration itself",
    "bash benchmarks/": "a benchmark, which takes minutes",
    "python benchmarks/": "a benchmark, which takes minutes",
    "python server_benchmark.py": "test_by_hand.py",
    "python client_benchmark.py": "test_by_hand.py",
    "python docs/make_tables.py": "test_tables_are_those_of_the_code, below",
    "python sweep.py check": "test_extension.py",
    "python sweep.py launch --extension": "test_extension.py",
    "python sweep.py launch --command_launcher slurm": "test_slurm.py",
    "python sweep.py launch --dataset femnist": "test_leaf.py",
    "python sweep.py launch --dataset shakespeare": "test_leaf.py",
    "python sweep.py launch @examples/fashion_on_slurm.txt": "test_slurm.py",
    "python sweep.py status @examples/fashion_on_slurm.txt": "test_slurm.py",
    "python collect_results.py --output_dir fashion_on_slurm": "test_slurm.py",
    "python sweep.py COMMAND": "not a command but the form of one",
    "python $FEDSWEEP": "test_extension.py",
}
HALVED = ("--num_hparams", "6", "--rounds", "4", "--output_dir", "halved")  # rungs at which there is something to stop
TINY = ("--rounds", "1", "--num_hparams", "1", "--num_trials", "1", "--samples_per_client", "20", "--skip_confirmation")
# What does not ship with the project, or takes long, and what stands in for it
INSTEAD = {"mnist": "digits", "cifar10": "digits", "resnet18": "mlp", "resnet18_gn": "mlp", "DIR": "study", "10": "2"}


def name_of(page):
    return str(page.relative_to(PROJECT))


def slug(heading):
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def commands(page):
    """The commands that a page shows as a block or in a sentence, each as one line, and that run here. What ends in … is no
    command but the form of one."""
    text = page.read_text().replace("\\\n", " ")
    found = re.findall(r"^(?:    (?:\$ )?|)((?:python|bash) [^`\n]+?)(?:  +#.*)?$", text, flags=re.M)
    found += [re.sub(r"\s+", " ", each) for each in re.findall(r"`((?:python|bash) [^`]+)`", text)]
    return [each for each in found if "…" not in each and not each.startswith(tuple(ELSEWHERE))]


def test_the_readme_is_read_in_minutes():
    assert len((PROJECT / "README.md").read_text().splitlines()) <= 160


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            linked = (page.parent / path) if path else page
            assert linked.exists(), target
            if anchor:
                headings = re.findall(r"^#+ (.+)$", linked.read_text(), flags=re.M)
                assert anchor in map(slug, headings), target


def test_tables_are_those_of_the_code():
    """If this fails: python docs/make_tables.py."""
    spec = importlib.util.spec_from_file_location("make_tables", PROJECT / "docs" / "make_tables.py")
    make_tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_tables)
    for page, text in make_tables.tables().items():
        assert (PROJECT / "docs" / page).read_text() == text


def test_every_algorithm_data_set_and_model_has_a_row():
    from federated import algorithms, models
    from federated.data import datasets

    for page, names in (("algorithms", algorithms.REGISTRY), ("data", datasets.REGISTRY), ("models", models.REGISTRY)):
        table = "".join(line for line in (PROJECT / "docs" / f"{page}.md").read_text().splitlines() if line.startswith("| `"))
        assert [name for name in names if f"`{name}`" not in table] == []


def test_the_version_to_cite_is_the_projects():
    assert f"\nversion: {VERSION}\n" in (PROJECT / "CITATION.cff").read_text()


def test_the_tests_that_guarantees_name_are_there():
    for file, name in re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", (PROJECT / "docs" / "guarantees.md").read_text()):
        assert not name or f"def {name}(" in (PROJECT / "tests" / file).read_text(), f"{file}::{name}"


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    directory = tmp_path_factory.mktemp("launched")
    ran(call(directory, "sweep.py", "launch", *TINY, "--output_dir", "out"))
    return directory / "out"


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("page", list(filter(commands, COMMANDED)), ids=name_of)
def test_commands_run(launched, tmp_path, page):
    (tmp_path / "examples").symlink_to(PROJECT / "examples")
    for name in ("study", "sweep_logs", "two_minutes", "here", "there"):  # what earlier pages and lines have launched
        shutil.copytree(launched, tmp_path / name)
    for command in commands(page):
        program, script, *words = shlex.split(command, comments=True)
        assert program == "python" and script in ("sweep.py", "collect_results.py"), command
        if ">" in words:
            words = words[: words.index(">")]
        words = [INSTEAD.get(word, word) for word in words]
        if words and words[0].startswith("delete_"):
            words += ["--skip_confirmation", "--output_dir", "there"]
        if words and words[0] == "launch":
            words += [*TINY, *(HALVED if "--halving" in words else ())]
        ran(call(tmp_path, script, *words))


def ran(ended):
    assert ended.returncode == 0, (ended.args, ended.stderr)
