"""Every option of every command with wrong values: exit code 2, one line that names the value and what is valid, and nothing
made. An option that has no case here fails the test."""

import argparse
import json
import sys

import pytest
from helpers import PROJECT

import client_benchmark
import collect_results
import server_benchmark
import slurm_job
import sweep
from federated.options import Parser

COMMANDS = [["collect_results.py"], ["sweep.py"], *(["sweep.py", command] for command in sweep.COMMANDS)]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_reads_well_in_a_terminal_of_80_columns(call, monkeypatch, command):
    """What is to be copied is whole, and no option shows what only the program knows."""
    monkeypatch.setenv("COLUMNS", "80")
    shown = call(*command, "--help")
    lines = shown.stdout.splitlines()
    assert shown.returncode == 0 and max(map(len, lines)) <= 80
    assert lines[0].startswith(f"usage: {' '.join(command)} [") and lines[1] == ""
    assert not [line for line in lines if "default: None" in line or "STR" in line or line.endswith("-")]
    if command[1:]:
        assert lines[-1].startswith(f"example: python {' '.join(command)} ")


NUL, SURROGATE = "a\0b", "a\udcffb"
NO_NUMBERS = (
    "",
    " ",
    "abc",
    "nan",
    "NaN",
    "1e999",
    "-inf",
    "1,5",
    "0x10",
    "/tmp",
    "\u00bd",
    "\u4e00",
    SURROGATE,
    NUL,
    "1\n2",
    "None",
    "9" * 5000,
)
NO_NAMES = ("", "nonsense", "0", "/tmp", "\u00e9", SURROGATE, NUL, "a\nb", "x" * 100_000)


def wholes(low, high):
    return (*NO_NUMBERS, "inf", "1.5", "1e3", str(low - 1), "-" + "9" * 30, str(high + 1), str(10**30))


def reals(*outside):
    return (*NO_NUMBERS, "inf", "-1", *outside)


DIRECTORIES = (
    "", NUL, SURROGATE, "x" * 300, "a/" * 3000, "/dev/null", "/dev/null/x", "FILE", "FILE/below/it", "LINK", "LINK/x", "LOOP",
    "LOOP/x",
)  # fmt: skip
JSONS = (
    "", "{", "[1]", "1", "null", "NaN", '"text"', "{'a': 1}",
    '{"batch_size": 1, "batch_size": 2}', '{"batch_size": {"a": 1, "a": 2}}',
    "[" * 100_000, '{"a":' * 100_000, "/tmp", SURROGATE, '{"batch_size": ' + "9" * 5000 + "}",
)  # fmt: skip
PICTURES = (
    "", "x", "x.txt", ".png", NUL + ".png", SURROGATE + ".png", "FILE/x.png", "LINK/x.png", "LOOP/x.png", "/nowhere/x.png",
)  # fmt: skip
# These are read with the algorithm and the data set, after parsing
HPARAMS = tuple(
    json.dumps(values)
    for values in (
        {"lr": 1}, {"": 1}, {"x" * 100_000: 1}, {"\ud800": 1}, {"BATCH_SIZE": 1},
        {"batch_size": 0}, {"batch_size": -1}, {"batch_size": 1.5},
        {"batch_size": "64"}, {"batch_size": True}, {"batch_size": None}, {"batch_size": {"a": 1}},
        {"batch_size": 10**30}, {"learning_rate": -1e-9}, {"learning_rate": float("nan")}, {"learning_rate": float("inf")},
        {"learning_rate": 10**400}, {"learning_rate": 1e300}, {"dropout_rate": 1.1}, {"dropout_rate": "x" * 100_000},
    )
)  # fmt: skip
DOMAINS = tuple(
    json.dumps({"batch_size": domain})
    for domain in (
        [], [0], [32, 32], [32, 32.0], ["a"], [[1]], {}, {"low": 1}, {"low": 2, "high": 1}, {"low": 1, "high": 1},
        {"low": 0, "high": 9}, {"low": 1, "high": 2.5}, {"low": 1, "high": 9, "log": 1}, {"low": 1, "high": 9, "base": 2},
        {"low": 1, "high": 9, "log": True, "base": 3}, {"low": 1, "high": 9, "step": 2}, {"low": [1], "high": 9},
    )
)  # fmt: skip
EXPORTS = (*PICTURES, "x.png", "x.csv.gz", "FILE/x.csv", "/nowhere/x.json", "/nowhere/x.parquet", NUL + ".csv")
PAGES = (*PICTURES, "x.htm", "FILE/x.html", "/nowhere/x.html", SURROGATE + ".html")
EXTENSIONS = (
    "",
    "FILE",
    "LINK",
    "LOOP",
    "/tmp",
    "x.txt",
    "missing.py",
    "FILE/x.py",
    "x" * 300 + ".py",
    NUL + ".py",
    SURROGATE + ".py",
)
HOSTS = (
    "", ":", "nowhere", ":80", "host:", "host:0", "host:65536", "host:-1", "host:1e3", "host:\u0661",
    "host:" + "9" * 5000, NUL + ":80", SURROGATE + ":80",
)  # fmt: skip

SETTINGS = {
    "--model_arch": NO_NAMES,
    "--dataset": NO_NAMES,
    "--algorithm": NO_NAMES,
    "--num_clients": wholes(1, 100_000),
    "--rounds": wholes(1, 10**6),
    "--local_epochs": wholes(1, 10**9),
    "--samples_per_client": wholes(2, 10**9),
    "--participation": reals("0", "1.1", "1e-400"),
    "--straggler_fraction": reals("1.1"),
    "--dropout_fraction": reals("0.995", "1"),
    "--partition": NO_NAMES,
    "--partition_alpha": reals("0", "1e7", "1e300"),
    "--labels_per_client": wholes(1, 10**9),
    "--holdout_fraction": reals("0", "0.91", "1"),
    "--augmentation": NO_NAMES,
    "--local_optimizer": NO_NAMES,
    "--optimizer_state": NO_NAMES,
    "--precision": NO_NAMES,
    "--compression": NO_NAMES,
    "--compression_ratio": reals("0", "1.1", "1e-400"),
    "--bits": (*wholes(2, 32), "1"),
    "--dp_clip": reals("0", "1e7", "1e300", "1e-400"),
    "--dp_noise_multiplier": reals("1e7", "1e300"),
    "--eval_every": wholes(1, 10**9),
    "--device": (*NO_NAMES, "CPU", "cuda:0"),
    "--threads": wholes(1, 1024),
}
SWEEP = {
    "--extension": EXTENSIONS,
    "--output_dir": DIRECTORIES,
    "--num_hparams": wholes(1, 100_000),
    "--num_trials": wholes(1, 100_000),
    "--hparams_seed": wholes(0, 10**9),
    "--hparams": (*JSONS, *HPARAMS, *DOMAINS, "FILE", "LINK", "LOOP", "/dev/zero"),
    "--search": NO_NAMES,
    **SETTINGS,
}
DELETE = {**SWEEP, "--skip_confirmation": None, "--take_over": None}
RUN = {"--extension": EXTENSIONS, "--data_dir": DIRECTORIES, "--timeout": reals("0", "1e7", "1e300")}
SERVER = {"--checkpoint_seconds": reals("1e7"), "--keep_checkpoints": None, "--save_model": None, "--tensorboard": None}
TRIAL = {
    "--trials_per_device": wholes(1, 1024),
    "--client_processes": wholes(1, 1024),
    "--retries": wholes(0, 1000),
    "--jobs": wholes(1, 1024),
    "--host": (*HOSTS, "/tmp/socket"),
}
NO_FILES = ("", NUL, SURROGATE, "x" * 300, "/tmp", "FILE/x", "LINK", "LOOP")
SLURM_ARGS = ('"', "--comment='a", NUL, SURROGATE)
# {command: {option: wrong values}}; None: it takes no value
OPTIONS = {
    "sweep.py launch": {
        **DELETE,
        "--again": None,
        "--halving": wholes(2, 100_000),
        "--min_rounds": wholes(1, 1_000_000),
        "--finalists": wholes(1, 100_000),
        **RUN,
        **SERVER,
        **TRIAL,
        "--command_launcher": NO_NAMES,
        "--slurm_args": SLURM_ARGS,
        "--trials_per_job": wholes(1, 100_000),
        "--wait": None,
        "--dry_run_of": (*NO_NAMES, "dry_run"),
    },
    "slurm_job.py": {**RUN, **SERVER, **TRIAL, "--trials": NO_FILES, "--launch": NO_FILES},
    "sweep.py status": {**SWEEP, "--watch": None, "--json": None},
    "sweep.py verify": {
        **SETTINGS,
        **RUN,
        **TRIAL,
        "--output_dir": DIRECTORIES,
        "--fraction": reals("0", "1.1", "1e-400"),
        "--checkpoint_seconds": reals("1e7"),
        "--command_launcher": NO_NAMES,
        "--slurm_args": SLURM_ARGS,
        "--trials_per_job": wholes(1, 100_000),
    },
    "sweep.py delete_incomplete": DELETE,
    "sweep.py delete_all": DELETE,
    "sweep.py show_partition": {**SETTINGS, "--extension": EXTENSIONS, "--data_dir": DIRECTORIES, "--picture": PICTURES},
    "sweep.py check": {"--data_dir": DIRECTORIES},
    "server_benchmark.py": {
        **SETTINGS,
        **RUN,
        **SERVER,
        "--output_dir": DIRECTORIES,
        "--trial_seed": wholes(0, 10**9),
        "--hparams": (*JSONS, *HPARAMS),
        "--hparams_seed": wholes(0, 10**9),
        "--host": (*HOSTS, "/tmp/" + "x" * 110, "/tmp/" + NUL, "/tmp/" + SURROGATE),
        "--client_processes": wholes(1, 1024),
    },
    "client_benchmark.py": {
        **RUN,
        "--host": (*HOSTS, "/tmp/" + "x" * 110, "/tmp/" + NUL),
        "--process": wholes(0, 1023),
    },
    "collect_results.py": {
        "--output_dir": DIRECTORIES,
        "--selection": NO_NAMES,
        "--target": reals("1.1"),
        "--delta": reals("0", "1.1", "1e-400"),
        "--against": [name for name in NO_NAMES if name not in ("nonsense", "0")],  # which an extension may have had
        "--where": ("", "partition", "=", "nonsense=1", "algorithm"),
        "--columns": NO_NAMES,
        "--format": NO_NAMES,
        "--top": wholes(1, 10**9),
        "--best_command": None,
        "--export": EXPORTS,
        "--plots": DIRECTORIES,
        "--html": PAGES,
    },
}
STANDS_ALONE = {"--halving"}  # without its value, too
NEEDED = {
    "slurm_job.py": ("--trials", "FILE"),
    "sweep.py launch": ("--skip_confirmation",),
    "sweep.py delete_incomplete": ("--skip_confirmation",),
    "sweep.py delete_all": ("--skip_confirmation",),
    "sweep.py check": ("MINE.py",),
    "server_benchmark.py": ("--output_dir", "trial"),
    "client_benchmark.py": ("--host", "/nowhere/socket"),
}
MODULES = {
    "sweep.py": sweep,
    "server_benchmark.py": server_benchmark,
    "client_benchmark.py": client_benchmark,
    "collect_results.py": collect_results,
    "slurm_job.py": slurm_job,
}


def parser_of(command, monkeypatch):
    """The parser that a command really has: caught as it is about to parse."""
    script, _, subcommand = command.partition(" ")
    caught = []
    parse = Parser.parse_known_args

    def catch(self, argv=None, namespace=None):
        if not self.add_help:  # it looks ahead, for extensions
            return parse(self, argv, namespace)
        caught.append(self)
        raise SystemExit

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Parser, "parse_known_args", catch)  # which parse_args calls, too
        MODULES[script].main([])
    (parser,) = caught
    if subcommand:
        (action,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
        assert {f"{script} {name}" for name in action.choices} == {name for name in OPTIONS if name.startswith(script)}
        parser = action.choices[subcommand]
    return parser


@pytest.mark.parametrize("command", OPTIONS)
def test_every_option_has_cases(monkeypatch, command):
    actions = [action for action in parser_of(command, monkeypatch)._actions if action.dest not in ("help", "version")]
    assert {name for action in actions for name in action.option_strings} == set(OPTIONS[command])
    by_position = [action for action in actions if not action.option_strings]
    assert [action.dest for action in by_position] == ["extension"] * (command == "sweep.py check")
    for action in [action for action in actions if action.option_strings]:
        assert (action.nargs == 0) == (OPTIONS[command][action.option_strings[0]] is None)


def test_every_script_has_cases():
    scripts = {path.name for path in PROJECT.glob("*.py") if '__name__ == "__main__"' in path.read_text()}
    assert scripts == set(MODULES)


@pytest.fixture
def traps(tmp_path, monkeypatch):
    """A working directory with a file, a link that leads nowhere and one that leads to itself."""
    (tmp_path / "FILE").write_text("")
    (tmp_path / "MINE.py").write_text("")
    (tmp_path / "LINK").symlink_to("nowhere")
    (tmp_path / "LOOP").symlink_to("LOOP")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEDERATED_KEY", raising=False)
    monkeypatch.setattr(sys, "argv", ["server_benchmark.py"])  # which it names itself by
    return tmp_path


def what_is_there(directory):
    return sorted(str(path) for path in directory.rglob("*"))


def refusal(argv, capsys):
    """The one line with which a command refuses its options."""
    script, *arguments = argv
    try:
        code = MODULES[script].main(arguments)
    except SystemExit as ended:
        code = ended.code
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert (code, out, len(lines)) == (2, "", 1), (argv, code, out, err)
    return lines[0]


@pytest.mark.parametrize(("command", "option"), [(command, option) for command in OPTIONS for option in OPTIONS[command]])
def test_wrong_values_are_one_line_and_make_nothing(traps, capsys, command, option):
    before = what_is_there(traps)
    start = [*command.split(), *NEEDED.get(command, ())]
    values = OPTIONS[command][option]
    if values is None:
        assert "ignored explicit argument 'yes'" in refusal([*start, f"{option}=yes"], capsys)
        return
    for value in values:
        line = refusal([*start, f"{option}={value}"], capsys)
        assert line.startswith(f"{command}: error: ") and option in line, (value, line)
        if option == "--hparams" and value in (*HPARAMS, *DOMAINS):
            ((name, given),) = json.loads(value).items()
            texts = (
                map(json.dumps, (given, *(given.values() if isinstance(given, dict) else given))) if value in DOMAINS else ()
            )
            assert repr(name)[1:20].rstrip("'") in line, line
            assert json.dumps(given)[:100] in line or "unknown" in line or any(text in line for text in texts), line
        else:
            assert repr(value)[:100].rstrip("'") in line, (value, line)
        assert len(line) < 2000 and any(word in line for word in (" is not ", " is neither ", " has ")), line
    if option not in STANDS_ALONE:
        assert f"argument {option}: expected" in refusal([*start, option], capsys)
    assert what_is_there(traps) == before


@pytest.mark.parametrize("command", OPTIONS)
def test_other_options_and_positions_are_refused(traps, capsys, command):
    more = ("--output_dir", ".", "--") if command == "collect_results.py" else ()  # else it would be a directory
    for wrong in ("--nonsense", "nonsense", "--nonsense=1", "--output"):
        before = more if wrong == "nonsense" else ()
        line = refusal([*command.split(), *NEEDED.get(command, ()), *before, wrong], capsys)
        by_position = command == "sweep.py check" and wrong == "nonsense"
        assert ("is not a Python file" if by_position else "unrecognized arguments") in line and wrong in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--num_hparams", "2", "--num_trials", "100000"), "exceed the limit of 100000"),
        (("--num_clients", "2000"), "none to train on: lower --num_clients 2000"),
        (("--num_clients", "100000"), "none to train on: lower --num_clients 100000"),
        (("--samples_per_client", "2", "--holdout_fraction", "0.9"), "none to train on: lower it"),
        (
            ("--model_arch", "resnet18", "--hparams", '{"batch_size": 1}'),
            "cannot train on a batch of one sample of 1x8x8 images",
        ),
        (("--model_arch", "resnet18", "--samples_per_client", "2"), "cannot train on a batch of one sample of 1x8x8 images"),
        (("--num_clients", "100000", "--partition", "dirichlet"), "--num_clients 100000"),
        (("--num_clients", "100000", "--partition", "quantity"), "--num_clients 100000"),
        (("--samples_per_client", "1000"), "more than the 1437 training samples"),
        (("--samples_per_client", "1000000000"), "more than the 1437 training samples"),
        (("--partition", "dirichlet", "--partition_alpha", "1e-6", "--num_clients", "30"), "raise --partition_alpha"),
        (("--partition", "labels", "--labels_per_client", "11"), "more than the 10 labels"),
        (("--host", "127.0.0.1:1"), "set FEDERATED_KEY"),
        (("--model_arch", "lenet"), "--model_arch lenet does not fit 1x8x8 images: it takes images of at least 16x16"),
        (
            ("--model_arch", "cnn", "--dataset", "heart_disease"),
            "--model_arch cnn does not fit 13 features: it takes images only",
        ),
        (("--model_arch", "resnet34"), "--model_arch resnet34 does not fit 1x8x8 images: Given groups=1"),
        (("--augmentation", "crop_flip", "--dataset", "heart_disease"), "--augmentation crop_flip does not fit 13 features"),
        (
            ("--partition", "natural"),
            "the samples of digits have no owners; those of heart_disease, femnist, shakespeare, domains do",
        ),
        (("--dataset", "heart_disease", "--num_clients", "5"), "natural 4 owners of heart_disease have enough samples"),
    ],
)
def test_values_that_do_not_go_together(traps, capsys, options, message):
    before = what_is_there(traps)
    assert sweep.main(["launch", "--skip_confirmation", *options]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert what_is_there(traps) == before


def test_a_batch_larger_than_the_data_is_one_batch(launch_here, tmp_path):
    for number, size in enumerate((32, 1000, 10**9)):
        options = ("--num_hparams", 1, "--hparams", json.dumps({"batch_size": size}))
        assert launch_here(tmp_path / str(number), *options).returncode == 0
    losses = [
        json.loads(next((tmp_path / str(number)).rglob("results.json")).read_text())["curves"]["train_loss"]
        for number in range(3)
    ]
    assert losses[0] != losses[1] == losses[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--dataset", "cifar11"),
            "'cifar11' is not one of digits, heart_disease, mnist, fashion_mnist, emnist, kmnist, svhn, cifar10, cifar100",
        ),
        (("--algorithm", "sgd"), "'sgd' is not one of Fedavg"),
        (("--rounds", "0"), "'0' is not a whole number of at least 1"),
        (("--num_clients", "2000"), "none to train on"),
        (("--hparams", '{"lr": 1}'), "unknown hyper-parameter 'lr'"),
        (("--output_dir", "/dev/null/x"), "'/dev/null' is a file"),
        (("--nonsense",), "unrecognized arguments: --nonsense"),
        (("--device", "cuda"), "--device cuda: torch finds no CUDA device"),
    ],
)
def test_bad_input_is_one_line_and_makes_nothing(call, tmp_path, options, message):
    result = call("sweep.py", "launch", "--skip_confirmation", *options)
    assert result.returncode == 2
    assert message in result.stderr.splitlines()[-1] and "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_bad_input_to_a_real_process_is_one_line_and_makes_nothing(run, tmp_path):
    result = run("sweep.py", "launch", "--skip_confirmation", "--algorithm", "sgd")
    assert result.returncode == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert "'sgd' is not one of Fedavg" in line
    assert list(tmp_path.iterdir()) == []
