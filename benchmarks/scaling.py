"""How the cost of a round grows: with clients, with the model, and with trials at once.

    python benchmarks/scaling.py --data_dir DIR

Times are medians of the server's round_seconds over the rounds of one trial; memory is the server's peak. A client trains on
13 samples, so that the times are mostly overhead.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

PROJECT = pathlib.Path(__file__).resolve().parent.parent


def trials(*options):
    """Run a sweep of one set. Returns its wall time and the results of its trials."""
    with tempfile.TemporaryDirectory() as output_dir:
        command = [sys.executable, PROJECT / "sweep.py", "launch", "--skip_confirmation", "--output_dir", output_dir]
        start = time.perf_counter()
        subprocess.run([*command, "--num_hparams", "1", *map(str, options)], check=True, capture_output=True)
        seconds = time.perf_counter() - start
        results = [json.loads(path.read_text()) for path in pathlib.Path(output_dir).rglob("results.json")]
    return seconds, results


def row(*cells):
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def header(*cells):
    row(*cells)
    row(*["---"] * len(cells))


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="fashion_mnist", help="needs 14 samples for each of 1,000 clients")
    parser.add_argument("--data_dir", default="data")
    args = parser.parse_args(argv)
    one = ("--num_trials", 1, "--client_processes", 2, "--dataset", args.dataset, "--data_dir", args.data_dir)
    one += ("--samples_per_client", 14)
    header("clients", "trained a round", "model", "ms a round", "ms a client", "server's peak MB")
    for model, rounds in (("mlp", 30), ("resnet18", 3)):
        for clients, participation in ((2, 1.0), (10, 1.0), (100, 0.1), (100, 1.0), (1000, 0.01), (1000, 0.1)):
            if model == "resnet18" and clients * participation > 10:
                continue
            options = ("--num_clients", clients, "--participation", participation, "--rounds", rounds, "--eval_every", rounds)
            _, results = trials(*one, *options, "--model_arch", model, "--optimizer_state", "reset")
            times = [1000 * seconds for seconds in results[0]["curves"]["round_seconds"]][1:]
            trained = round(clients * participation)
            peak = results[0]["provenance"]["server_peak_bytes"] / 1e6
            time_a_round = statistics.median(times)
            row(clients, trained, model, f"{time_a_round:.1f}", f"{time_a_round / trained:.2f}", f"{peak:.0f}")
    print()
    header("trials at once", "trials", "seconds", "trials a minute")
    for jobs in (1, 2, 4):
        seconds, results = trials("--num_trials", 12, "--rounds", 50, "--jobs", jobs, "--client_processes", 1)
        row(jobs, len(results), f"{seconds:.1f}", f"{60 * len(results) / seconds:.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
