"""What a natural federation of thousands of owners costs, on files of LEAF's form with samples drawn at random.

    python benchmarks/natural.py --owners 3500

Owners have unequal numbers of samples, as LEAF's have: log-normal. Ten train in a round. Times are medians over the rounds of
one trial; `no evaluation` and `evaluation` are those of the rounds in which the model is not and is evaluated.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

PROJECT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests")]

from leaf_files import write_leaf  # noqa: E402

from benchmarks.scaling import header, row  # noqa: E402


def sizes_of(owners, median):
    """(training, test samples) of each owner."""
    train = np.random.default_rng(0).lognormal(np.log(median), 1, owners).astype(int) + 2
    return [(int(each), max(1, int(each) // 9)) for each in train]


def timed(*words):
    """The seconds that a command of sweep.py took."""
    start = time.perf_counter()
    subprocess.run([sys.executable, PROJECT / "sweep.py", *map(str, words)], check=True, capture_output=True)
    return time.perf_counter() - start


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--owners", type=int, default=3500)
    parser.add_argument("--median", type=int, default=20, help="training samples of an owner")
    parser.add_argument("--rounds", type=int, default=12)
    args = parser.parse_args(argv)
    header(
        "data", "algorithm", "samples", "MB of JSON", "read s", "start s", "ms a round, no evaluation", "evaluation",
        "server's peak MB", "MB on disk a trial", "status s",
    )  # fmt: skip
    for name, model in (("femnist", "cnn_femnist"), ("shakespeare", "lstm")):
        with tempfile.TemporaryDirectory() as directory:
            data, out = pathlib.Path(directory) / "data", pathlib.Path(directory) / "out"
            sizes = sizes_of(args.owners, args.median)
            write_leaf(data, name, sizes, users_per_file=100)
            megabytes = sum(path.stat().st_size for path in data.rglob("*.json")) / 1e6
            options = ("--dataset", name, "--data_dir", data)
            reading = timed("show_partition", *options) - timed("show_partition", *options)
            common = (*options, "--model_arch", model, "--num_clients", args.owners, "--participation", 10 / args.owners)
            common += ("--local_optimizer", "sgd", "--hparams", '{"batch_size": 20}', "--rounds", args.rounds)
            common += ("--eval_every", args.rounds // 2, "--num_hparams", 1, "--num_trials", 1, "--client_processes", 2)
            for algorithm in ("Fedavg", "Scaffold"):
                choice = ("--algorithm", algorithm, "--output_dir", out, *common)
                timed("launch", "--skip_confirmation", *choice)
                status = timed("status", *choice[:4], "--dataset", name)
                (path,) = out.glob(f"*_{algorithm},*/*/*/results.json")
                results = json.loads(path.read_text())
                seconds = results["curves"]["round_seconds"]
                evaluated = [value is not None for value in results["curves"]["test_acc"]]
                plain = [each for each, had in zip(seconds[1:], evaluated) if not had]  # a round evaluates the one before
                tested = [each for each, had in zip(seconds[1:], evaluated) if had]
                disk = sum(each.stat().st_size for each in path.parent.iterdir()) / 1e6
                stages = results["provenance"]["seconds"]
                row(
                    name, algorithm, sum(map(sum, sizes)), f"{megabytes:.0f}", f"{reading:.1f}",
                    f"{stages['start'] + stages['join']:.1f}", f"{1000 * statistics.median(plain):.0f}",
                    f"{1000 * statistics.median(tested):.0f}", f"{results['provenance']['server_peak_bytes'] / 1e6:.0f}",
                    f"{disk:.2f}", f"{status:.1f}",
                )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
