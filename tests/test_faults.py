"""Whatever happens to a trial's processes, the trial ends with a named cause and the others go on.

What compares the cause of a SIGKILL stands in this file, which one worker of pytest-xdist runs: a launcher blames the system's
want of memory if the machine counts more such kills meanwhile.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from helpers import (
    ENDLESS,
    PROJECT,
    STATEFUL,
    TINY,
    Sweep,
    both_launchers,
    descendants,
    failure,
    is_alive,
    kill_after,
    parent_of,
    results,
    trial_of,
    wait_until,
    wait_until_dead,
)

from federated import lock as locks
from federated.trial import hparams_hash
from hparams_registry import default_hparams

pytestmark = pytest.mark.process
KILLED = "was killed by SIGKILL (by a user, or because of a limit of memory or time)"


@both_launchers
@pytest.mark.usefixtures("leaves_nothing")
def test_a_death_is_named_and_the_other_trials_go_on(tmp_path, launcher):
    """All trials are endless; each loses a process, so that the one after it shows that the sweep went on."""
    victims = ("server", "client_process_0", "client_process_1", "server")
    sweep = Sweep(tmp_path / "out", *ENDLESS, "--num_trials", str(len(victims)), "--command_launcher", launcher)
    for number, victim in enumerate(victims):
        roles = sweep.pids(f"trial_{number}")
        assert roles.keys() == {"server", "client_process_0", "client_process_1"}
        os.kill(roles[victim], signal.SIGKILL)
        wait_until_dead(roles.values())
    code, output = sweep.wait()
    assert code == 1
    for number, victim in enumerate(victims):
        assert failure(tmp_path / "out", f"trial_{number}").items() >= {"role": victim, "reason": KILLED}.items()
        assert f"trial_{number} failed: {victim} was killed by SIGKILL" in output
    assert "4 of 4 trials failed." in output


@pytest.mark.slow
def test_retries_go_on_and_their_history_stays(launch_here, tmp_path):
    out = tmp_path / "out"
    options = (*STATEFUL, "--rounds", "300")
    sweep = Sweep(out, *options, "--retries", "2")
    for _ in range(2):
        while "client_process_1" not in (pids := sweep.pids()):  # it may find the log of the attempt before
            time.sleep(0.01)
        os.kill(pids["client_process_1"], signal.SIGKILL)
        wait_until_dead(pids.values())
    code, output = sweep.wait()
    assert code == 0, output
    provenance = json.loads((trial_of(out) / "results.json").read_text())["provenance"]
    assert [(each["role"], each["reason"]) for each in provenance["failures"]] == [("client_process_1", KILLED)] * 2
    assert len(provenance["runs"]) <= 3
    assert not (trial_of(out) / "failed.json").exists()
    assert launch_here(tmp_path / "undisturbed", *options, "--checkpoint_seconds", 10).returncode == 0
    assert results(out) == results(tmp_path / "undisturbed")


@pytest.mark.usefixtures("leaves_nothing")
def test_failed_trials_do_not_keep_others_from_being_done(launch_here, call, tmp_path):
    """A learning rate without bound diverges; the defaults do not."""
    options = ("--local_optimizer", "sgd", "--num_hparams", 1)
    failed = launch_here(tmp_path / "out", *options, "--hparams", '{"learning_rate": 1e30}', "--num_trials", 2)
    told = "2 of 2 trials failed, 2 of them because they diverged: tables leave out their settings."
    assert failed.returncode == 1 and told in failed.stderr
    assert "diverged" in failure(tmp_path / "out", "trial_1")["log"][-1]
    assert launch_here(tmp_path / "out", *options).returncode == 0
    table = call("collect_results.py", "--output_dir", tmp_path / "out")
    assert table.returncode == 0 and "Ignored: 2 trials that are not done, 2 of them diverged." in table.stderr


def test_a_trial_that_diverged_is_not_run_again_unless_asked(launch_here, call, tmp_path):
    out, options = tmp_path / "out", ("--local_optimizer", "sgd", "--num_hparams", 1, "--hparams", '{"learning_rate": 1e30}')
    assert launch_here(out, *options).returncode == 1
    shown = call("sweep.py", "status", "--output_dir", out).stdout
    assert "Failed: " in shown and "trial_0 failed: server diverged" in shown and "1 failed" in shown
    (trial,) = json.loads(call("sweep.py", "status", "--json", "--output_dir", out).stdout)[-1]["trials"]
    assert trial["state"] == "Failed" and "diverged" in trial["failures"][-1]["reason"]
    before = (trial_of(out) / "failed.json").read_bytes()
    launched = launch_here(out, *options)
    assert launched.returncode == 0 and "1 trials failed and would fail again: --again runs them anyway." in launched.stderr
    assert "Nothing to launch!" in launched.stderr and (trial_of(out) / "failed.json").read_bytes() == before
    assert launch_here(out, *options, "--again").returncode == 1
    assert len(json.loads((trial_of(out) / "failed.json").read_text())["earlier"]) == 1
    assert "Deleted 1 jobs!" in call("sweep.py", "delete_incomplete", "--output_dir", out, "--skip_confirmation").stderr
    assert not list(out.iterdir())


@pytest.mark.usefixtures("leaves_nothing")
def test_a_client_that_never_joins_is_named(call, tmp_path):
    result = call("server_benchmark.py", "--output_dir", tmp_path / "trial", "--client_processes", 2, "--timeout", 1)
    assert result.returncode != 0
    assert result.stderr.splitlines()[-1] == "client process 0, 1 did not join within 1 s"
    assert (
        json.loads((tmp_path / "trial" / "failed.json").read_text())["reason"] == "client process 0, 1 did not join within 1 s"
    )


@pytest.mark.slow
@pytest.mark.usefixtures("leaves_nothing")
def test_a_silent_process_is_named(tmp_path):
    """In one trial the server, in another one beside it a client process."""
    sweep = Sweep(tmp_path / "out", *ENDLESS, "--num_trials", "2", "--jobs", "2", "--timeout", "4")
    for trial, victim in (("trial_0", "server"), ("trial_1", "client_process_1")):
        os.kill(sweep.pids(trial)[victim], signal.SIGSTOP)
    code, _ = sweep.wait()
    assert code == 1
    assert failure(tmp_path / "out", "trial_0")["reason"] == "was silent for 4 s"
    assert failure(tmp_path / "out", "trial_1")["log"][-1] == "client process 1 was silent for 4 s"


@pytest.mark.slow
@pytest.mark.usefixtures("leaves_nothing")
def test_a_long_round_is_not_silence(tmp_path):
    """A round of several seconds under a timeout of two: what counts is that steps are made."""
    options = (
        "--timeout",
        "2",
        "--rounds",
        "1",
        "--local_epochs",
        "2000",
        "--num_hparams",
        "1",
        "--hparams",
        '{"batch_size": 8}',
    )
    sweep = Sweep(tmp_path / "out", *options)
    code, output = sweep.wait()
    assert code == 0, output
    (path,) = tmp_path.rglob("results.json")
    assert json.loads(path.read_text())["curves"]["round_seconds"][0] > 4  # or else it shows nothing


@both_launchers
@pytest.mark.parametrize("own_session", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.usefixtures("leaves_nothing")
def test_no_process_outlives_a_killed_sweep(tmp_path, launcher, own_session):
    out = tmp_path / "out"
    command = [sys.executable, PROJECT / "sweep.py", "launch", "--skip_confirmation", "--output_dir", out, *TINY, *ENDLESS]
    sweep = Sweep(out, command=["setsid"] * own_session + [*command, "--command_launcher", launcher])
    roles = sweep.pids()
    os.kill(sweep.process.pid, signal.SIGKILL)
    wait_until_dead(roles.values())
    sweep.wait()


@both_launchers
@pytest.mark.parametrize("seconds", [1.5, *(pytest.param(each, marks=pytest.mark.slow) for each in (0.5, 1.0, 2.0, 2.5))])
@pytest.mark.usefixtures("leaves_nothing")
def test_no_process_outlives_a_sweep_killed_during_start_up(tmp_path, launcher, seconds):
    sweep = Sweep(tmp_path / "out", *ENDLESS, "--command_launcher", launcher)
    time.sleep(seconds)
    below = descendants(sweep.process.pid)
    os.kill(sweep.process.pid, signal.SIGKILL)
    wait_until_dead(below)
    sweep.wait()
    for name in ("lock", "*.tmp"):  # at this age the server may not have taken over the lock: the next command does
        for path in tmp_path.rglob(name):
            path.unlink()


@pytest.mark.parametrize(
    ("signum", "code"),
    [
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow),
        (signal.SIGHUP, 129),  # the tests below send the others
    ],
)
@pytest.mark.usefixtures("leaves_nothing")
def test_a_signal_ends_the_sweep_and_its_trials(tmp_path, signum, code):
    sweep = Sweep(tmp_path / "out", *ENDLESS)
    sweep.pids()
    sweep.process.send_signal(signum)
    ended, output = sweep.wait()
    assert ended == code
    assert "Traceback" not in output and signum.name in output


@pytest.mark.usefixtures("leaves_nothing")
def test_a_signal_that_is_ignored_at_the_start_stays_ignored(tmp_path):
    """As `nohup` has it. SIGTERM, which comes last, is the one that ends the sweep."""
    ignored = (signal.SIGHUP, signal.SIGINT)
    options = ["launch", "--skip_confirmation", "--output_dir", tmp_path / "out", *TINY, *ENDLESS]
    with contextlib.ExitStack() as stack:
        for each in ignored:
            stack.callback(signal.signal, each, signal.signal(each, signal.SIG_IGN))
        sweep = Sweep(tmp_path / "out", command=[sys.executable, PROJECT / "sweep.py", *options])
    sweep.pids()
    for each in (*ignored, signal.SIGTERM):
        sweep.process.send_signal(each)
    code, output = sweep.wait()
    assert code == 143 and "SIGHUP" not in output and "SIGINT" not in output, output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first_of_container", "signum", "code"),
    [
        (False, signal.SIGINT, 130),
        (False, signal.SIGTERM, 143),
        (True, signal.SIGINT, 130),
        (True, signal.SIGTERM, 143),
    ],
)
@pytest.mark.usefixtures("leaves_nothing")
def test_the_script_passes_on_the_signal_that_it_gets(tmp_path, first_of_container, signum, code):
    """The first process of a container only gets signals that it handles."""
    contain = ["unshare", "--pid", "--fork", "--mount-proc"] if first_of_container else []
    if contain and subprocess.run([*contain, "true"], capture_output=True, check=False).returncode:
        pytest.skip("process namespaces need root")
    script = ["bash", PROJECT / "run_sweep.sh", "--output_dir", tmp_path / "out", *TINY, *ENDLESS]
    sweep = Sweep(tmp_path / "out", command=[*contain, *script])
    roles = sweep.pids()
    shell = sweep.process.pid
    if contain:
        shell = descendants(shell)[0]  # unshare only waits for it
    os.kill(shell, signum)
    ended, output = sweep.wait()
    assert ended == code and signum.name in output, output
    wait_until_dead(roles.values())


@pytest.mark.slow
@pytest.mark.usefixtures("leaves_nothing")
def test_ctrl_c_again_and_again_ends_at_once_and_leaves_nothing(tmp_path):
    sweep = Sweep(tmp_path / "out", *ENDLESS)
    roles = sweep.pids()

    def ended():
        sweep.process.send_signal(signal.SIGINT)
        return sweep.process.poll() is not None

    wait_until(ended, every=0.001)
    code, output = sweep.wait()
    assert code == 130 and output.count("SIGINT: ending; ") == 1 and "Traceback" not in output
    wait_until_dead(roles.values())


@pytest.mark.slow
@pytest.mark.usefixtures("leaves_nothing")
def test_all_killed_at_once_is_cleaned_up_by_the_next_launch(launch_here, tmp_path):
    out, options = tmp_path / "out", ("--rounds", "300", "--num_hparams", "1")
    sweep = Sweep(out, *options)
    pids = [*sweep.pids().values(), sweep.process.pid]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    sweep.wait()
    result = launch_here(out, *options)
    assert result.returncode == 0, result.stderr


@pytest.fixture
def small_disk(tmp_path):
    """small_disk(options) mounts a file system of a megabyte, or mounts it anew with other options."""
    path = tmp_path / "small"
    path.mkdir()

    def mount(options):
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", path]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting a small file system needs root")
        return path

    yield mount
    while os.path.ismount(path):
        subprocess.run(["umount", "-l", path], check=True)


@both_launchers
@pytest.mark.usefixtures("leaves_nothing")
def test_a_full_disk_is_named_and_nothing_is_lost(launch_here, small_disk, tmp_path, launcher):
    """One checkpoint fits on it, a second one does not."""
    options = ("--rounds", "60", "--num_hparams", "1", "--checkpoint_seconds", "0", "--client_processes", "1")
    out = small_disk("size=1m") / "out"
    full = launch_here(out, *options, "--command_launcher", launcher)
    assert full.returncode == 1 and "Traceback" not in full.stderr, full.stderr
    assert "server ended with the system's error 'No space left on device'" in full.stderr
    small_disk("size=16m,remount")
    freed = launch_here(out, *options, "--command_launcher", launcher)
    assert freed.returncode == 0, freed.stderr
    (log,) = out.rglob("server.log")
    assert "resumes after round " in log.read_text()
    assert launch_here(tmp_path / "roomy", *options).returncode == 0
    assert results(out) == results(tmp_path / "roomy")


@pytest.mark.usefixtures("leaves_nothing")
def test_a_disk_without_room_for_anything_is_named(launch_here, small_disk):
    out = small_disk("size=64k")
    with open(out / "filler", "wb") as file, contextlib.suppress(OSError):
        file.write(bytes(1 << 20))
    full = launch_here(out / "out")
    assert full.returncode in (1, 2) and "Traceback" not in full.stderr
    assert "No space left on device" in full.stderr


def test_few_inodes_are_named_and_what_fits_is_done(launch_here, small_disk):
    """Two of three trials fit."""
    out = small_disk("size=32m,nr_inodes=20") / "out"
    full = launch_here(out, "--num_hparams", 1, "--num_trials", 3, "--client_processes", 1, "--jobs", 1)
    assert full.returncode == 1 and "Traceback" not in full.stderr, full.stderr
    assert "1 of 3 trials failed." in full.stderr and "see `df -h` and `df -i`" in full.stderr
    assert len(list(out.glob("*/*/*/done"))) == 2


@pytest.mark.slow
@pytest.mark.usefixtures("leaves_nothing")
def test_a_vanished_directory_is_named_and_the_other_trials_go_on(tmp_path):
    options = ("--rounds", "400", "--num_hparams", "1", "--num_trials", "2", "--jobs", "1")
    sweep = Sweep(tmp_path / "out", *options, "--checkpoint_seconds", "1000")  # to write one would be to miss the directory too
    sweep.pids()
    (trial,) = (tmp_path / "out").glob("*/*/trial_0")
    shutil.rmtree(trial)
    code, output = sweep.wait()
    assert code == 1 and "Traceback" not in output
    assert "trial_0 failed: server lost its directory (No such file or directory)" in output
    assert "trial_1 done" in output


@pytest.fixture
def memory_group():
    """memory_group(pid) puts a process into a control group that has no memory left."""
    for root, limit in ((Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"), (Path("/sys/fs/cgroup"), "memory.max")):
        group = root / f"federated-test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        if (group / limit).exists():
            break
        group.rmdir()
    else:
        pytest.skip("needs a memory control group of its own, which takes root")

    def move(pid):
        (group / limit).write_text("65536")
        (group / "cgroup.procs").write_text(str(pid))

    yield move
    group.rmdir()


@pytest.mark.slow
@pytest.mark.usefixtures("leaves_nothing")
def test_an_out_of_memory_kill_is_named(tmp_path, memory_group):
    sweep = Sweep(tmp_path / "out", *ENDLESS, "--model_arch", "resnet18")
    memory_group(sweep.pids()["client_process_1"])
    code, output = sweep.wait()
    assert code == 1
    assert "client_process_1 was killed by SIGKILL, as the system ran out of memory" in output


def test_a_lock_of_another_host_is_only_taken_over_when_told_to(launch_here, call, finished_copy):
    out = finished_copy
    trial = out / "mlp_digits_Fedavg,samples_per_client=40" / hparams_hash(default_hparams("Fedavg", "digits")) / "trial_0"
    (trial / "done").unlink()
    (trial / "lock").write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": "7"}))
    size = ("--output_dir", out, "--num_hparams", 1, "--num_trials", 1)
    assert call("sweep.py", "status", *size).stdout.startswith("Running: ")
    left = launch_here(out, "--num_hparams", 1)
    assert left.returncode == 3
    told = (
        "trial_0 is run by process 1 on elsewhere, which cannot be seen from here: if you know that it is dead, use --take_over"
    )
    assert told in left.stdout
    kept = call("sweep.py", "delete_all", "--skip_confirmation", *size)
    assert kept.stderr.startswith("Not deleted, it is running: ") and (trial / "lock").exists()
    (out / ".slurm").mkdir()
    shutil.copy(trial / "lock", out / ".slurm" / "lock")  # of a launch that submitted jobs
    assert launch_here(out, "--num_hparams", 1, "--take_over").returncode == 0
    assert not (out / ".slurm" / "lock").exists()
    assert not (trial / "lock").exists() and call("sweep.py", "status", *size).stdout.startswith("Done: ")


@pytest.mark.slow
def test_who_lost_its_trial_to_another_host_lets_go_of_it(tmp_path):
    """Such as a node that Slurm had given up."""
    sweep = Sweep(tmp_path / "out", *ENDLESS, "--checkpoint_seconds", "0")
    roles = sweep.pids()
    (trial,) = sweep.output_dir.glob("*/*/trial_0")
    theirs = {trial / "lock": json.dumps({"host": "elsewhere", "pid": 1, "started": "7"}), trial / ".results.json.0.tmp": "{"}
    for path, content in theirs.items():
        path.write_text(content)
    code, output = sweep.wait()
    assert code == 3 and "is left to the sweep that runs it" in output, output
    assert "was taken over by process 1 on elsewhere" in (trial / "server.log").read_text()
    assert not any(map(is_alive, roles.values()))
    assert all(path.read_text() == content for path, content in theirs.items())


def test_a_running_trial_is_neither_run_twice_nor_deleted(call, launch_here, tmp_path):
    out = tmp_path / "out"
    sweep = Sweep(out, *ENDLESS)
    roles = sweep.pids()
    try:
        states = call("sweep.py", "status", "--output_dir", out, "--num_hparams", 1, "--num_trials", 1).stdout
        assert states.startswith("Running: ") and "1 running" in states
        again = launch_here(out, *ENDLESS)
        assert again.returncode == 3 and "or another sweep runs them" in again.stderr
        for command in ("delete_all", "delete_incomplete"):
            deleted = call(
                "sweep.py", command, "--output_dir", out, "--num_hparams", 1, "--num_trials", 1, "--skip_confirmation"
            )
            assert deleted.stderr.startswith("Not deleted, it is running: ")
            assert deleted.stderr.endswith("About to delete 0 jobs.\n")
        assert all(map(is_alive, roles.values()))
    finally:
        sweep.process.terminate()
        sweep.wait()


@pytest.mark.slow
@pytest.mark.usefixtures("leaves_nothing")
def test_waiting_for_a_slower_process_is_not_silence(call, tmp_path):
    """Process 1 trains two small clients and waits with the second update, while process 0 trains client 0 for seconds."""
    from federated.data import datasets
    from federated.data.partition import split
    from federated.settings import Settings

    data, quantity = datasets.load("digits", "data"), {"num_clients": 4, "partition": "quantity", "rounds": 1}
    alphas = (number / 1000 for number in range(200, 1000))
    alpha = next(a for a in alphas if len(split(data, Settings(**quantity, partition_alpha=a), 0)[0].train) > 1000)
    options = [part for name, value in quantity.items() for part in (f"--{name}", value)]
    options += ["--partition_alpha", alpha, "--local_epochs", 100, "--hparams", '{"batch_size": 8}', "--client_processes", 2]
    size = ("--num_hparams", 1, "--num_trials", 1, "--timeout", 5, "--skip_confirmation", "--output_dir", tmp_path / "out")
    launched = call("sweep.py", "launch", *size, *options)
    assert launched.returncode == 0, launched.stderr
    (path,) = tmp_path.rglob("results.json")
    assert json.loads(path.read_text())["curves"]["round_seconds"][0] > 6  # or else it shows nothing


@pytest.mark.slow
@both_launchers
@pytest.mark.usefixtures("leaves_nothing")
def test_two_sweeps_share_the_work(call, tmp_path, launcher):
    """Both have the same trials; each is run by one of them, and none is harmed by the other."""
    out = tmp_path / "out"
    trials = 4 if launcher == "local_parallel" else 2
    options = ("--num_trials", str(trials), "--rounds", "40", "--command_launcher", launcher, "--client_processes", "1")
    sweeps = [Sweep(out, *options) for _ in range(2)]
    ended = [sweep.wait() for sweep in sweeps]
    outputs = "".join(output for _, output in ended)
    assert {code for code, _ in ended} <= {0, 3} and " failed: " not in outputs, outputs
    assert "2 done" in call("sweep.py", "status", "--output_dir", out, "--num_hparams", 2, "--num_trials", trials).stdout
    logs = [path.read_text() for path in out.rglob("server.log")]
    assert len(logs) == 2 * trials
    assert all(log.count("waiting for") == 1 and "round 40/40" in log for log in logs)


def unshared(*options, host):
    """The start of a command that runs what follows in a container of its own, called `host`, which kills it as it ends."""
    command = ["unshare", "--mount", "--uts", *options, "bash", "-c", f'hostname {host} && exec "$@"', "-"]
    if subprocess.run([*command, "true"], capture_output=True, check=False).returncode:
        pytest.skip("a container needs root")
    return command


PID_NAMESPACE = ("--pid", "--fork", "--kill-child", "--mount-proc")


def launch_command(out, *options):
    return [sys.executable, PROJECT / "sweep.py", "launch", "--skip_confirmation", "--output_dir", out, *TINY, *options]


@pytest.mark.slow
def test_containers_with_one_tmp_and_the_same_paths_do_not_meet(launch_here, tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    bind = ["bash", "-c", f'mount --bind "$1" {inside} && shift && exec "$@"', "-"]
    sweeps, options = [], {}
    for batch_size in (16, 64):
        out = tmp_path / str(batch_size)
        out.mkdir()
        options[out] = ["--num_hparams", "1", "--num_trials", "2", "--hparams", json.dumps({"batch_size": batch_size})]
        command = launch_command(inside, *options[out], "--command_launcher", "local_sequential", "--client_processes", "1")
        sweeps.append(Sweep(out, command=[*unshared(host="same"), *bind, out, *command]))
    for sweep in sweeps:
        code, output = sweep.wait()
        assert code == 0, output
    for out in options:
        assert launch_here(tmp_path / "alone" / out.name, *options[out]).returncode == 0
        assert results(out) == results(tmp_path / "alone" / out.name)


@pytest.mark.slow
def test_a_live_trial_is_left_alone_by_another_container_with_the_same_host_name(call, launch_here, tmp_path):
    """Its process ids mean other processes, or none, elsewhere."""
    out, host = tmp_path / "out", socket.gethostname()
    sweep = Sweep(out, command=[*unshared(*PID_NAMESPACE, host=host), *launch_command(out, *ENDLESS)])
    roles = sweep.pids()
    assert launch_here(out, *ENDLESS, "--take_over").returncode == 3
    status = call("sweep.py", "status", "--output_dir", out, "--num_hparams", 1, "--num_trials", 1).stdout
    assert status.startswith("Running: ") and "  trial_0 is run by process " in status and f" on {host} since 2" in status
    deleted = call("sweep.py", "delete_all", "--skip_confirmation", "--output_dir", out, "--num_hparams", 1, "--num_trials", 1)
    assert deleted.stderr.startswith("Not deleted, it is running: ")
    assert all(map(is_alive, roles.values()))
    sweep.process.kill()
    sweep.wait()


@pytest.mark.slow
def test_a_trial_of_a_killed_container_is_resumed_from_one_with_another_host_name(launch_here, tmp_path):
    out, options = tmp_path / "out", (*STATEFUL, "--rounds", "150")
    command = launch_command(out, *options)
    sweep = Sweep(out, command=[*unshared(*PID_NAMESPACE, host="first"), *command])
    kill_after(sweep, round=5)
    code, output = Sweep(out, command=[*unshared(*PID_NAMESPACE, host="second"), *command]).wait()
    assert code == 0, output
    assert "resumes after round " in (trial_of(out) / "server.log").read_text()
    assert launch_here(tmp_path / "undisturbed", *options).returncode == 0
    assert results(out) == results(tmp_path / "undisturbed")


def test_a_lock_from_before_this_host_was_booted_is_void_and_one_of_its_namesake_is_not(tmp_path, monkeypatch):
    """The second lies on a file system that several hosts may mount."""
    lock = {"host": socket.gethostname(), "pid": 1, "boot": "another", "device": 1, "since": "yesterday", "id": "x"}
    (tmp_path / "lock").write_text(json.dumps(lock))
    for types, is_void in (({"nfs"}, False), (locks._ONE_KERNEL | {"tmpfs"}, True)):
        monkeypatch.setattr(locks, "_ONE_KERNEL", types)
        assert locks.is_held(tmp_path) == (not is_void)
    monkeypatch.setattr(locks, "_ONE_KERNEL", {"nfs"})
    told = r"run by process 1 on \S+ since yesterday, which cannot be seen from here: .*--take_over"
    with pytest.raises(locks.LockedError, match=told):
        locks.Lock(tmp_path)
    locks.take_over(tmp_path)
    locks.Lock(tmp_path).release()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_outlives_its_launcher_with_who_inherited_it(tmp_path):
    lock = locks.Lock(tmp_path)
    inherited = locks.Lock(tmp_path, os.dup(lock.fileno()))
    lock._file.close()  # as the kernel does for a process that was killed
    with pytest.raises(locks.LockedError):
        locks.Lock(tmp_path)
    inherited._file.close()
    locks.Lock(tmp_path).release()


@pytest.mark.slow
@both_launchers
def test_a_swept_directory_for_temporary_files_stops_no_trial(tmp_path, monkeypatch, launcher):
    with tempfile.TemporaryDirectory(prefix="t-") as temporary:
        monkeypatch.setenv("TMPDIR", temporary)
        options = ("--num_trials", "2", "--num_hparams", "1", "--jobs", "1", "--rounds", "60", "--client_processes", "1")
        sweep = Sweep(tmp_path / "out", *options, "--command_launcher", launcher)
        sweep.pids()
        for path in Path(temporary).iterdir():
            shutil.rmtree(path)
        code, output = sweep.wait()
        assert code == 0, output


@pytest.mark.slow
@both_launchers
def test_a_long_path_of_the_directory_for_temporary_files(launch, tmp_path, launcher):
    temporary = tmp_path / ("t" * 92)
    temporary.mkdir()
    options = ("--num_hparams", 1, "--client_processes", 1, "--command_launcher", launcher)
    launched = launch(tmp_path / "out", *options, env={**os.environ, "TMPDIR": str(temporary)})
    assert launched.returncode == 0, launched.stderr


@pytest.mark.slow
def test_the_clock_of_a_file_server_is_no_silence(tmp_path):
    """It is an hour behind: a log that changes is a server that lives, whatever time it says."""
    sweep = Sweep(tmp_path / "out", *ENDLESS, "--timeout", "4")
    sweep.pids()
    log, end = trial_of(tmp_path / "out") / "server.log", time.monotonic() + 4
    while time.monotonic() < end:
        os.utime(log, (hour_ago := time.time() - 3600, hour_ago))
        time.sleep(0.001)
    assert sweep.process.poll() is None
    sweep.process.terminate()
    assert sweep.wait()[0] == 143


@pytest.mark.slow
def test_a_pause_of_a_whole_sweep_is_nobodys_silence(tmp_path):
    sweep = Sweep(tmp_path / "out", *ENDLESS, "--timeout", "4")
    family = [*sweep.pids().values(), sweep.process.pid]
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for pid in family:
            os.kill(pid, number)
        time.sleep(6)  # longer than the timeout
    assert sweep.process.poll() is None
    sweep.process.terminate()
    assert sweep.wait()[0] == 143


@pytest.mark.slow
@pytest.mark.usefixtures("leaves_nothing")
def test_the_death_of_what_trials_are_forked_from_stops_none(tmp_path):
    """The trial that runs goes on, and the next one is forked from another. If that dies with a process whose end it would
    report, this is an accident."""
    options = ("--num_trials", "2", "--num_hparams", "1", "--jobs", "1", "--rounds", "200", "--client_processes", "2")
    sweep = Sweep(tmp_path / "out", *options, "--retries", "1")
    fork_servers = set()
    for trial, victims in (("trial_0", ()), ("trial_1", ("client_process_1",))):
        roles = sweep.pids(trial)
        (fork_server,) = {parent_of(pid) for pid in roles.values()}
        fork_servers.add(fork_server)
        for pid in (fork_server, *(roles[role] for role in victims)):
            os.kill(pid, signal.SIGKILL)
        wait_until_dead([fork_server])
        if victims:
            wait_until_dead(roles.values())
        else:
            assert all(map(is_alive, roles.values()))
    assert len(fork_servers - {sweep.process.pid}) == 2
    code, output = sweep.wait()
    assert code == 0 and "Traceback" not in output, output
    undisturbed, disturbed = ((trial_of(tmp_path / "out").with_name(f"trial_{number}")) for number in range(2))
    assert "resumes" not in (undisturbed / "server.log").read_text()
    provenance = json.loads((disturbed / "results.json").read_text())["provenance"]
    (reason,) = [each["reason"] for each in provenance["failures"]]
    assert reason == "ended for an unknown reason: the process that knew it, from which it was forked, has ended, too"
