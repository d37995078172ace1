"""Trials an hour of the sweep, of Flower, and of the original scripts, in one run. See run.sh."""

import contextlib
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from overhead import sweep  # noqa: E402
from work import WORK  # noqa: E402

LIMIT = 1800  # seconds, about ten times as long as the slowest on two cores


def peer(name, script, work, data_dir, count):
    """(seconds, final test accuracies) of a peer's trials. Exits if the peer fails or does not end within LIMIT."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as elsewhere, open(f"{elsewhere}/log", "w+") as log:
        command = [sys.executable, HERE / script, work, data_dir, str(count)]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=elsewhere, start_new_session=True
        )
        try:
            output, _ = process.communicate(timeout=LIMIT)
            failure = f"ended with exit code {process.returncode}" if process.returncode else None
        except subprocess.TimeoutExpired:
            failure = f"did not end within {LIMIT} s"
        with contextlib.suppress(ProcessLookupError):  # and the processes that it started
            os.killpg(process.pid, signal.SIGKILL)
        if failure:
            log.seek(0)
            sys.exit(f"{name} {failure}. The end of its log:\n{''.join(log.readlines()[-20:])}")
    return time.perf_counter() - start, json.loads(output.splitlines()[-1])


def main(work, data_dir="data"):
    data_dir = str(pathlib.Path(data_dir).resolve())
    sets, trials = (5, 3) if work == "digits" else (1, 2)
    peer_trials = 5 if work == "digits" else 2  # a trial of each set: theirs cost the same each
    rates = {}
    ways = {
        "this sweep": lambda: sweep(WORK[work], sets, trials, data_dir)[:2],
        "Flower": lambda: peer("Flower", "flower_trials.py", work, data_dir, peer_trials),
        "the original's way": lambda: peer("The original's way", "original_trials.py", work, data_dir, peer_trials),
    }
    for name, run in ways.items():
        seconds, accuracies = run()
        rates[name] = 3600 * len(accuracies) / seconds
        ratio = rates["this sweep"] / rates[name]
        line = f"{name:<19} {len(accuracies):>2} trials in {seconds:6.1f} s  {rates[name]:7.0f} trials an hour  {ratio:5.1f}x"
        print(f"{line}  mean final test accuracy {statistics.mean(accuracies):.4f}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
