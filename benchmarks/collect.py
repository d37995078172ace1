"""How long collect_results.py takes for 10,000 result files: 5,000 trials of two clients and 50 rounds on digits.

    python benchmarks/collect.py

makes the tree in a temporary directory and prints the seconds of the whole command, and of reading alone.
"""

import json
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from federated.results import collect
from federated.settings import Settings, write_sweep_file
from federated.trial import DONE, RESULTS, Trial, hparams_hash
from hparams_registry import default_hparams, random_hparams

SETS, TRIALS = 1000, 5
TRAIN_SAMPLES, VAL_SAMPLES, TEST_SAMPLES = 647, 72, 180  # of a client


def make_tree(output_dir):
    """What a sweep leaves, with random numbers for metrics. Returns the number of result files."""
    settings = Settings()
    write_sweep_file(output_dir / settings.name, settings)
    rng = np.random.default_rng(0)
    indices = rng.permutation(2 * TRAIN_SAMPLES).reshape(2, -1).tolist()
    runs = [{"round": 0, "code": "0" * 16, "git_revision": "0" * 40, "time": time.strftime("%FT%T%z")}]
    made = 0
    for hparams_seed in range(SETS):
        draw = ("Fedavg", "digits")
        hparams = random_hparams(*draw, hparams_seed) if hparams_seed else default_hparams(*draw)
        for seed in range(TRIALS):
            directory = output_dir / settings.name / hparams_hash(hparams) / f"trial_{seed}"
            this = Trial(settings, hparams, hparams_seed, seed, directory)
            test = rng.random((2, settings.rounds)).tolist()
            for client in range(2):
                names = ("train_loss", "train_acc", "val_loss", "val_acc", "local_test_loss", "local_test_acc", "step_time")
                metrics = dict(zip(names, rng.random((len(names), settings.rounds)).tolist()))
                results = {
                    "client_id": client, "node_id": client + 1, "train_indices": indices[client], **this.description(),
                    "test_loss": test[0], "test_acc": test[1], **metrics, "val_samples": VAL_SAMPLES,
                    "local_test_samples": TEST_SAMPLES, "bytes_sent": [417_952] * settings.rounds,
                    "provenance": {"argv": ["server_benchmark.py"] * 60, "runs": runs},
                }  # fmt: skip
                this.client_directory(client).mkdir(parents=True)
                (this.client_directory(client) / RESULTS).write_text(json.dumps(results))  # with no fsync, which takes minutes
                (this.client_directory(client) / DONE).write_text("")
                made += 1
    return made


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        files = make_tree(pathlib.Path(directory))
        start = time.perf_counter()
        rounds = collect([pathlib.Path(directory)]).rounds
        reading = time.perf_counter() - start
        command = [sys.executable, pathlib.Path(__file__).resolve().parent.parent / "collect_results.py"]
        start = time.perf_counter()
        subprocess.run([*command, "--output_dir", directory], check=True, stdout=subprocess.DEVNULL)
        whole = time.perf_counter() - start
    print(f"{files} result files, {len(rounds)} rows: {reading:.1f} s to read, {whole:.1f} s the whole command")
