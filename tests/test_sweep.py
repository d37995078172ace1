"""The command, end to end."""

import contextlib
import fcntl
import functools
import json
import os
import pty
import re
import shlex
import shutil
import struct
import subprocess
import sys
import termios
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers import AWKWARD_DATA, AWKWARD_OUT, HUNG, PROJECT, TINY, Sweep, results

import sweep
from federated.data import datasets, partition
from federated.running import resources
from federated.settings import Settings, write_sweep_file
from federated.trial import Trial, hparams_hash
from hparams_registry import default_hparams, random_hparams, space_of

SWEEP = "mlp_digits_Fedavg,samples_per_client=40"


def files(directory):
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


@pytest.mark.parametrize("launcher", [pytest.param("local_sequential", marks=pytest.mark.slow), "local_parallel"])
def test_the_workflow(launch, launch_here, call, awkward, launcher):
    launched = launch(awkward, "--command_launcher", launcher, "--client_processes", 1)
    assert launched.returncode == 0, launched.stderr
    assert "2 jobs: 0 done, 0 incomplete, 2 not launched.\n" in launched.stdout
    told = [line for line in launched.stderr.splitlines() if "/2 trials" not in line and "db339c" not in line]
    assert "About to launch 2 jobs." in told and "Launching..." in told and told[-1] == "Launched 2 jobs!"

    sets = [default_hparams("Fedavg", "digits"), random_hparams("Fedavg", "digits", 1)]
    expected = [f"{SWEEP}/sweep.json"]
    for hparams in sets:
        trial = f"{SWEEP}/{hparams_hash(hparams)}/trial_0"
        expected += [f"{trial}/{name}" for name in ("clients.npz", "done", "results.json", "server.log")]
        expected.append(f"{SWEEP}/{hparams_hash(hparams)}/hparams.json")
    assert [name for name in files(awkward) if "client_process" not in name] == sorted(expected)

    trial = awkward / SWEEP / hparams_hash(sets[1]) / "trial_0"
    content = json.loads((trial / "results.json").read_text())
    assert content.items() >= {"hparams_seed": 1, "hparams": sets[1], "trial_seed": 0, "personal": False}.items()
    assert content["settings"] == json.loads((awkward / SWEEP / "sweep.json").read_text())["settings"]
    assert {len(curve) for curve in content["curves"].values()} == {2}
    assert content["curves"]["bytes_sent"] == [2 * 2 * 26_122 * 4] * 2  # two clients, down and up, float32
    with np.load(trial / "clients.npz") as clients:
        assert clients["train_samples"].tolist() == [36, 36] and clients["val_samples"].tolist() == [4, 4]
        metrics = [f"{samples}_{what}" for samples in ("train", "val", "local") for what in ("loss", "acc")]
        assert {(clients[name].shape, clients[name].dtype.name) for name in metrics} == {((2, 2), "float32")}
    assert content["provenance"].keys() >= {"git_revision", "argv", "torch", "python", "devices", "processor"}

    again = launch_here(awkward)
    assert again.returncode == 0 and "Nothing to launch! Exiting...All jobs are done." in again.stderr
    status = call("sweep.py", "status", "--output_dir", awkward, "--num_hparams", 2, "--num_trials", 1)
    assert status.stdout.count("Done: ") == 2 and "2 jobs: 2 done, 0 incomplete, 0 not launched." in status.stdout

    deleted = call(
        "sweep.py", "delete_all", "--output_dir", awkward, "--num_hparams", 2, "--num_trials", 1, "--skip_confirmation"
    )
    assert "About to delete 2 jobs." in deleted.stderr and deleted.stderr.endswith("Deleted 2 jobs!\n")
    assert list(awkward.iterdir()) == []


def test_results_are_the_same_for_any_processes_launcher_and_time(launch_here, tmp_path):
    ways = {
        "one": ("--client_processes", 1, "--command_launcher", "local_sequential"),
        "two": ("--client_processes", 2, "--jobs", 1),
        "again": ("--client_processes", 2, "--jobs", 2),
        "three": ("--client_processes", 3),
    }
    common = (
        "--num_clients",
        5,
        "--participation",
        0.6,
        "--rounds",
        3,
        "--partition",
        "dirichlet",
        "--samples_per_client",
        200,
        "--num_hparams",
        1,
    )
    for name, options in ways.items():
        assert launch_here(tmp_path / name, *common, *options).returncode == 0
    reference = results(tmp_path / "one")
    assert len(reference) == 1
    for name in ways:
        assert results(tmp_path / name) == reference, name


def test_augmentation_is_drawn_from_the_trials_seed(launch_here, tmp_path):
    for name, *options in (
        ("one", "--client_processes", 1),
        ("three", "--client_processes", 3),
        ("none", "--augmentation", "none"),
    ):
        assert launch_here(tmp_path / name, "--num_clients", 3, "--augmentation", "crop_flip", *options).returncode == 0
    assert results(tmp_path / "one") == results(tmp_path / "three") != results(tmp_path / "none")


def test_kept_moments_follow_the_client_to_another_process(launch_here, tmp_path):
    common = ("--num_clients", 3, "--participation", 0.67, "--optimizer_state", "keep", "--rounds", 4, "--num_hparams", 1)
    for processes in (1, 2):
        assert launch_here(tmp_path / str(processes), *common, "--client_processes", processes).returncode == 0
    assert launch_here(tmp_path / "reset", *common, "--optimizer_state", "reset").returncode == 0
    assert results(tmp_path / "1") == results(tmp_path / "2") != results(tmp_path / "reset")


def test_a_sweep_is_extended_and_goes_on_where_it_stopped(launch_here, call, finished_copy):
    out = finished_copy
    shutil.rmtree(out / SWEEP / hparams_hash(random_hparams("Fedavg", "digits", 1)))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("results.json")}
    done = next(out.rglob("done"))
    done.unlink()
    status = call("sweep.py", "status", "--output_dir", out, *TINY)
    assert "2 jobs: 0 done, 1 incomplete, 1 not launched." in status.stdout
    assert launch_here(out, "--num_trials", 2).returncode == 0
    assert len(list(out.rglob("results.json"))) == 4
    unchanged = [path for path, time in before.items() if path.stat().st_mtime_ns == time]
    assert unchanged == []  # the incomplete trial ran again
    assert "2 jobs: 2 done" in call("sweep.py", "status", "--output_dir", out, *TINY, "--num_trials", 2).stdout


def test_another_setting_in_the_same_directory_is_an_error(launch_here, call, finished_copy):
    for option, value in (("--rounds", 1), ("--eval_every", 2), ("--threads", 2), ("--device", "cpu")):
        refused = launch_here(finished_copy, option, value)
        assert refused.returncode == 2
        (line,) = refused.stderr.splitlines()
        assert line.startswith(f"sweep.py launch: error: {option} is {value} here and ") and "--output_dir" in line
    assert launch_here(finished_copy, "--algorithm", "FEDAVG", "--client_processes", 1, "--jobs", 2).returncode == 0
    # who only looks need not repeat the settings
    assert "2 done" in call("sweep.py", "status", "--output_dir", finished_copy, "--num_hparams", 2, "--num_trials", 1).stdout
    assert "0 done" in call("sweep.py", "status", "--output_dir", finished_copy, "--rounds", 9).stdout


def test_delete_incomplete_leaves_the_rest_and_what_is_not_its_own(call, finished_copy, tmp_path):
    out = finished_copy
    default = out / SWEEP / hparams_hash(default_hparams("Fedavg", "digits"))
    (default / "trial_0" / "done").unlink()
    (default / "trial_0" / "notes.txt").write_text("mine")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "results.json").write_text("mine")
    (default / "trial_0" / "client_9").symlink_to(tmp_path / "precious")
    (default / "trial_7").symlink_to(tmp_path / "precious")
    other = next(path for path in (out / SWEEP).iterdir() if path.is_dir() and path != default)
    before = files(other)
    deleted = call("sweep.py", "delete_incomplete", "--output_dir", out, *TINY, "--skip_confirmation")
    assert deleted.returncode == 0, deleted.stderr
    assert files(other) == before
    assert files(default) == ["trial_0/notes.txt"]
    assert (tmp_path / "precious" / "results.json").read_text() == "mine"


def test_deleting_in_a_home_directory_loses_nothing(call, finished_sweep, tmp_path):
    """With names like the sweep's own, and links where its directories would be."""
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    for path in (home, elsewhere):
        shutil.copytree(finished_sweep, path)
    job = home / SWEEP / hparams_hash(default_hparams("Fedavg", "digits"))
    for path in ("done", "results.json", "trial_0/done", f"{SWEEP}/results.json", f"{SWEEP}/notes/trial_0/done"):
        (home / path).parent.mkdir(parents=True, exist_ok=True)
        (home / path).write_text("mine")
    (job / "server.log").write_text("mine")
    (job / "trial_0" / "my.log").write_text("mine")
    (job / "trial_0" / "checkpoint.npz.bak").write_text("mine")
    kept = [path for path in files(home) if (home / path).read_bytes() == b"mine"]
    assert call("sweep.py", "delete_all", "--output_dir", home, *TINY, "--skip_confirmation").returncode == 0
    assert sorted([*kept, f"{SWEEP}/sweep.json"]) == files(home)

    before = files(elsewhere)
    links = tmp_path / "links"
    links.mkdir()
    (links / SWEEP).symlink_to(elsewhere / SWEEP)
    deleted = call("sweep.py", "delete_all", "--output_dir", links, *TINY, "--skip_confirmation")
    assert "Not deleted, it is a link: " in deleted.stderr and "Deleted 0 jobs!" in deleted.stderr
    assert files(elsewhere) == before
    assert call("sweep.py", "delete_all", "--output_dir", "/", *TINY, "--skip_confirmation").returncode == 0


def test_status_and_deletion_look_at_what_is_there(launch_here, call, tmp_path):
    """Also at sets and trials that the command line would not draw."""
    out = tmp_path / "out"
    assert launch_here(out, "--num_hparams", 6, "--num_trials", 1).returncode == 0
    assert launch_here(out, "--num_hparams", 1, "--num_trials", 4).returncode == 0
    shown = call("sweep.py", "status", "--output_dir", out).stdout
    assert "4/4 trials done" in shown and "6 jobs: 2 done, 4 incomplete" in shown
    last = random_hparams("Fedavg", "digits", 5)
    assert f"{hparams_hash(last)} set 5, 1/1 trials done, {json.dumps(last)}" in shown
    some = call("sweep.py", "delete_all", "--output_dir", out, "--num_hparams", 2, "--skip_confirmation")
    assert "Deleted 2 jobs!" in some.stderr
    rest = call("sweep.py", "delete_all", "--output_dir", out, "--skip_confirmation")
    assert "Deleted 4 jobs!" in rest.stderr
    assert not list(out.iterdir())
    assert launch_here(out, "--num_hparams", 1, "--rounds", 1).returncode == 0


def test_a_set_that_nothing_describes_is_shown_and_deleted(launch_here, call, tmp_path):
    assert launch_here(tmp_path / "out", "--num_hparams", 1, "--hparams", '{"batch_size": 7}').returncode == 0
    next((tmp_path / "out").glob("*/*/hparams.json")).write_text('{"hparams_seed": 0, "hparams": {"batch_size": 8}}')
    assert "of unknown hyper-parameters" in call("sweep.py", "status", "--output_dir", tmp_path / "out").stdout
    deleted = call("sweep.py", "delete_all", "--output_dir", tmp_path / "out", "--skip_confirmation")
    assert "Deleted 1 jobs!" in deleted.stderr and not list((tmp_path / "out").iterdir())


def test_equal_values_are_one_set(launch_here, tmp_path):
    """Minus zero and zero, 0.5 and 5e-1, 32 and 32.0."""
    options = ("--num_hparams", 1, "--local_optimizer", "sgd", "--hparams")
    for hparams in (
        '{"weight_decay": 0, "momentum": 0.5, "batch_size": 32}',
        '{"weight_decay": -0.0, "momentum": 5e-1, "batch_size": 32.0}',
    ):
        assert launch_here(tmp_path / "out", *options, hparams).returncode == 0
    assert len(list((tmp_path / "out").glob("*/*/trial_0"))) == 1


def test_deleting_what_is_not_there_is_no_error(call, tmp_path):
    for command in ("delete_all", "delete_incomplete", "status"):
        result = call("sweep.py", command, "--output_dir", tmp_path / "none")
        assert result.returncode == 0, result.stderr
        assert not (tmp_path / "none").exists()


def answer(command, text, cwd):
    """Run `command` on a terminal and type `text`."""
    terminal, theirs = pty.openpty()
    process = subprocess.Popen(command, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=cwd)
    os.close(theirs)
    os.write(terminal, text.encode())
    output, _ = process.communicate(timeout=HUNG)
    os.close(terminal)
    return process.returncode, output


@pytest.mark.slow
@pytest.mark.process
def test_it_asks_before_it_does_anything(call, tmp_path):
    command = [sys.executable, PROJECT / "sweep.py", "launch", *TINY, "--num_hparams", "1"]
    code, output = answer(command, "n\n", tmp_path)
    assert code == 0 and "Are you sure? (y/n) Nevermind!" in output
    assert list(tmp_path.iterdir()) == []
    code, output = answer(command, "y\n", tmp_path)
    assert code == 0 and "Launched 1 jobs!" in output
    refused = call("sweep.py", "delete_all", *TINY)
    assert refused.returncode == 2 and "--skip_confirmation" in refused.stderr
    assert list(tmp_path.rglob("done"))


@pytest.mark.slow
@pytest.mark.process
def test_a_dry_run_prints_commands_that_work(call, awkward, tmp_path):
    out = awkward / "out"
    options = (*TINY, "--num_hparams", 1, "--client_processes", 1)
    dry = call("sweep.py", "launch", "--skip_confirmation", "--output_dir", out, *options, "--command_launcher", "dry_run")
    assert dry.returncode == 0 and not out.exists()
    commands = dry.stdout.split(".\n\n", 1)[1]
    subprocess.run(["bash", "-ec", commands + "wait"], check=True, timeout=HUNG, capture_output=True, cwd=tmp_path)
    assert len(results(out)) == 1


def test_a_dry_run_shows_which_gpu_each_trial_sees(tmp_path, monkeypatch, capsys):
    """There is none here, so that they are made up."""
    monkeypatch.setattr(resources, "gpus", lambda: ["3", "7"])
    size = ["--num_hparams", "1", "--num_trials", "3", "--output_dir", str(tmp_path / "out"), "--skip_confirmation"]
    assert sweep.main(["launch", *size, "--command_launcher", "dry_run", "--samples_per_client", "40"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "_benchmark.py" in line]
    assert [line.split()[0] for line in lines] == [f"CUDA_VISIBLE_DEVICES={gpu}" for gpu in (3, 3, 7, 7, 3, 3)]


def test_a_launch_needs_no_package_for_tables(run_without, tmp_path):
    """On a machine that was lent with torch, nothing may be installable."""
    options = ["--skip_confirmation", "--output_dir", tmp_path / "out", "--command_launcher", "dry_run", *TINY]
    done = run_without("tabulate", "sweep", "launch", *options)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("option", ["--slurm_args=--time=5", "--trials_per_job=2", "--wait", "--dry_run_of=slurm"])
def test_an_option_of_another_launcher_is_refused(launch_here, tmp_path, option):
    """Else a long sweep would begin on the login node."""
    refused = launch_here(tmp_path / "out", option)
    name = option[2:].partition("=")[0]
    assert refused.returncode == 2 and f"error: --{name} applies only to --command_launcher" in refused.stderr
    assert not (tmp_path / "out").exists()


def test_fixed_hparams_hold_in_every_set(launch_here, tmp_path):
    fixed = {"learning_rate": 0.001, "batch_size": 16}
    assert launch_here(tmp_path / "out", "--hparams", json.dumps(fixed)).returncode == 0
    found = results(tmp_path / "out")
    assert len(found) == 1  # both sets are the same one
    assert all(content["hparams"].items() >= fixed.items() for content in found.values())


def test_heart_disease_by_default_is_its_four_hospitals_and_logistic_regression(launch_here, tmp_path):
    """131 of the 254 test samples have one label, so that guessing reaches 0.52."""
    hparams = '{"learning_rate": 0.05, "batch_size": 16, "momentum": 0.0, "weight_decay": 0.001}'
    options = ("--dataset", "heart_disease", "--rounds", 20, "--local_optimizer", "sgd", "--hparams", hparams)
    launched = launch_here(tmp_path, *options, "--num_hparams", 1, "--samples_per_client", 100)
    assert launched.returncode == 0, launched.stderr
    sweep = tmp_path / "logistic_heart_disease_Fedavg,samples_per_client=100,local_optimizer=sgd"
    stored = json.loads((sweep / "sweep.json").read_text())["settings"]
    assert (stored["model_arch"], stored["partition"], stored["num_clients"]) == ("logistic", "natural", 4)
    (trial,) = sweep.glob("*/trial_0")
    with np.load(trial / "clients.npz") as clients:
        assert clients["train_samples"].tolist() == [90, 90, 27, 77]
    assert json.loads((trial / "results.json").read_text())["curves"]["test_acc"][-1] > 0.75


def test_commands_are_lists_of_arguments(awkward):
    from federated.running.processes import trial_commands
    from federated.settings import ServerOptions, Settings
    from server_benchmark import parse

    this = Trial(Settings(samples_per_client=30), {"batch_size": 8}, 3, 4, awkward)
    commands = trial_commands(this, "/tmp/x/socket", 2, ServerOptions(data_dir="data dir", save_model=True, tensorboard=True))
    assert list(commands) == ["server", "client_process_0", "client_process_1"]
    args = parse(commands["server"][2:])
    assert (args.output_dir, args.data_dir, args.hparams, args.trial_seed) == (str(awkward), "data dir", {"batch_size": 8}, 4)
    assert args.save_model and args.tensorboard


LONG = ("--rounds", "3000", "--num_hparams", "1", "--num_trials", "1", "--samples_per_client", "40")


@pytest.mark.slow
@pytest.mark.process
def test_a_sweep_is_watched_from_elsewhere(call, tmp_path):
    sweep = Sweep(tmp_path / "out", "--num_hparams", "1", "--rounds", "500")
    one = ("--output_dir", tmp_path / "out", "--num_hparams", 1, "--num_trials", 1)
    sweep.pids()
    (job,) = json.loads(call("sweep.py", "status", "--json", *one).stdout)
    (trial,) = job["trials"]
    assert (job["state"], trial["state"], trial["rounds"], trial["failures"]) == ("Running", "Running", 500, [])
    assert 0 <= trial["round"] < 500 and 0 <= trial["val_acc"] <= 1 and 0 <= trial["test_acc"] <= 1
    watched = call("sweep.py", "status", "--watch", *one)
    assert watched.returncode == 0, watched.stderr
    lines = watched.stdout.split(" running.\n\n")[1].splitlines()
    assert re.match(r"0/1 trials done, 1 running, 0 failed; round \(validation accuracy\) \d+/500 \(\d\.\d{4}\)", lines[0])
    assert lines[-1].startswith("1/1 trials done, 0 running, 0 failed")
    assert sweep.wait()[0] == 0


@pytest.mark.slow
@pytest.mark.process
def test_a_launch_tells_how_far_it_is_on_a_terminal(tmp_path):
    command = [sys.executable, str(PROJECT / "sweep.py"), "launch", *LONG]
    terminal, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 200, 0, 0))
    process = subprocess.Popen(command, stdin=theirs, stdout=subprocess.DEVNULL, stderr=theirs, cwd=tmp_path)
    os.close(theirs)
    os.write(terminal, b"y\n")
    shown = b""
    with contextlib.suppress(OSError):  # it has ended
        while more := os.read(terminal, 1 << 16):
            shown += more
    os.close(terminal)
    assert process.wait(HUNG) == 0
    line = rb"0/1 trials done, 1 running, 0 failed; round \(validation accuracy\) \d+/3000 .*; \d+ trials an hour, \d+ s left"
    assert re.search(line, shown), shown


@pytest.mark.slow
@pytest.mark.process
def test_directories_whose_names_look_like_something_else(call, tmp_path):
    """A dash in front, a space, quotes, Slurm's and the shell's own characters, a newline: a value stays that value, from
    process to process and in what dry_run prints for a shell."""
    out, data = AWKWARD_OUT, AWKWARD_DATA
    (tmp_path / data).mkdir()

    def launch(num_trials, launcher):
        options = [*TINY, "--num_hparams", 1, "--num_trials", num_trials, f"--output_dir={out}", f"--data_dir={data}"]
        options += ["--client_processes", 1, "--command_launcher", launcher]
        done = call("sweep.py", "launch", "--skip_confirmation", *options)
        assert done.returncode == 0, done.stderr
        return done.stdout

    launch(1, "local_parallel")
    launch(2, "local_sequential")
    printed = launch(3, "dry_run")
    script = printed[printed.index(shlex.quote(sys.executable)) :] + "wait\n"
    subprocess.run(["bash", "-c", script], cwd=tmp_path, check=True, timeout=HUNG, stdin=subprocess.DEVNULL)
    assert [path.rpartition("/trial_")[2] for path in results(tmp_path / out)] == [f"{n}/results.json" for n in range(3)]


def test_launches_at_once_note_all_their_search_spaces(tmp_path):
    spaces = [space_of("random", {"batch_size": size}, "Fedavg", "digits", "adam") for size in range(1, 17)]
    with ThreadPoolExecutor(len(spaces)) as pool:
        list(pool.map(functools.partial(write_sweep_file, tmp_path, Settings()), spaces))
    known = json.loads((tmp_path / "sweep.json").read_text())["spaces"]
    assert sorted(map(json.dumps, known)) == sorted(json.dumps(space.as_json()) for space in spaces)


def test_what_splits_alike_is_split_once(launch_here, tmp_path, monkeypatch):
    """A study of four sweeps with two partitions, of three trials each."""
    splits, split = [], partition.split

    def counted(data, settings, seed):
        splits.append((settings.partition, seed))
        return split(data, settings, seed)

    monkeypatch.setattr(partition, "split", counted)
    study = ("--algorithm", "Fedavg", "Fedprox", "--partition", "iid", "dirichlet", "--num_trials", 3)
    launched = launch_here(tmp_path / "out", *study, "--command_launcher", "dry_run")
    assert launched.returncode == 0 and "Sweeps: 4," in launched.stderr
    assert splits == [(name, seed) for name in ("iid", "dirichlet") for seed in range(3)]


@pytest.mark.parametrize("name", partition.REGISTRY)
def test_a_split_is_a_function_of_the_settings_that_say_so(name):
    data = datasets.load("heart_disease" if name == "natural" else "digits", "data")
    settings = Settings(dataset="heart_disease" if name == "natural" else "digits", partition=name)
    only = types.SimpleNamespace(**{each: getattr(settings, each) for each in partition.SPLIT_BY})
    for ours, theirs in zip(partition.split(data, only, 0), partition.split(data, settings, 0), strict=True):
        assert np.array_equal(ours.train, theirs.train) and np.array_equal(ours.test, theirs.test)
