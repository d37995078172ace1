"""Trials an hour of the sweep, of Flower, and of the original's way, in one run. See run.sh."""

import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from overhead import sweep  # noqa: E402
from work import WORK  # noqa: E402


def peer(script, work, data_dir, count):
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as elsewhere:
        command = [sys.executable, HERE / script, work, data_dir, str(count)]
        output = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=elsewhere
        )
    return time.perf_counter() - start, json.loads(output.stdout.splitlines()[-1])


def main(work, data_dir="data"):
    data_dir = str(pathlib.Path(data_dir).resolve())
    sets, trials = (5, 3) if work == "digits" else (1, 2)
    peer_trials = 5 if work == "digits" else 2  # a trial of each set: theirs cost the same each
    rates = {}
    ways = {
        "this sweep": lambda: sweep(WORK[work], sets, trials, data_dir)[:2],
        "Flower": lambda: peer("flower_trials.py", work, data_dir, peer_trials),
        "the original's way": lambda: peer("original_trials.py", work, data_dir, peer_trials),
    }
    for name, run in ways.items():
        seconds, accuracies = run()
        rates[name] = 3600 * len(accuracies) / seconds
        ratio = rates["this sweep"] / rates[name]
        line = f"{name:<19} {len(accuracies):>2} trials in {seconds:6.1f} s  {rates[name]:7.0f} trials an hour  {ratio:5.1f}x"
        print(f"{line}  mean final test accuracy {statistics.mean(accuracies):.4f}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
