"""How long collect_results.py takes for 10,000 trials of two clients and 50 rounds on digits.

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

from federated.metrics import over_clients
from federated.reporting.collect import collect
from federated.settings import Settings, write_sweep_file
from federated.trial import CLIENTS, DONE, RESULTS, Trial, hparams_hash, trial_path
from hparams_registry import default_hparams, random_hparams

SETS, TRIALS = 1000, 10
TRAIN_SAMPLES, VAL_SAMPLES, TEST_SAMPLES = 647, 72, 180  # of a client


def make_tree(output_dir):
    """Write the files of a sweep, with random numbers as metrics. Returns the number of trials."""
    settings = Settings()
    write_sweep_file(output_dir / settings.name, settings)
    rng = np.random.default_rng(0)
    samples = np.repeat([[TRAIN_SAMPLES], [VAL_SAMPLES], [TEST_SAMPLES]], 2, axis=1)
    runs = [{"round": 0, "code": "0" * 16, "git_revision": "0" * 40, "time": time.strftime("%FT%T%z")}]
    known = {"personal": False, "has_global_model": True, "provenance": {"argv": ["server_benchmark.py"] * 60, "runs": runs}}
    made = 0
    for hparams_seed in range(SETS):
        algorithm, dataset, optimizer = settings.hparams_key
        hparams = default_hparams(*settings.hparams_key)
        if hparams_seed:
            hparams = random_hparams(algorithm, dataset, hparams_seed, optimizer)
        for seed in range(TRIALS):
            directory = trial_path(output_dir / settings.name / hparams_hash(hparams), seed)
            trial = Trial(settings, hparams, hparams_seed, seed, directory)
            metrics = rng.random((3, 2, 2, settings.rounds), dtype=np.float32)
            curves = over_clients(*metrics[:2], rng.random((2, settings.rounds)), metrics[2], samples, personal=False)
            curves |= {"round_seconds": rng.random(settings.rounds), "bytes_sent": np.full(settings.rounds, 417_952)}
            results = trial.description() | known | {"curves": {name: values.tolist() for name, values in curves.items()}}
            names = ("train", "val", "local")
            clients = {f"{name}_samples": sizes for name, sizes in zip(names, samples)}
            for name, values in zip(names, metrics):
                clients |= {
                    f"{name}_loss": np.ascontiguousarray(values[:, 0]),
                    f"{name}_acc": np.ascontiguousarray(values[:, 1]),
                }
            directory.mkdir(parents=True)
            (directory / RESULTS).write_text(json.dumps(results))  # without fsync, which would take minutes
            np.savez_compressed(directory / CLIENTS, **clients)
            (directory / DONE).write_text("")
            made += 1
    return made


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        trials = make_tree(pathlib.Path(directory))
        start = time.perf_counter()
        rounds = collect([pathlib.Path(directory)]).rounds
        reading = time.perf_counter() - start
        command = [sys.executable, pathlib.Path(__file__).resolve().parent.parent / "collect_results.py"]
        start = time.perf_counter()
        subprocess.run([*command, "--output_dir", directory], check=True, stdout=subprocess.DEVNULL)
        whole = time.perf_counter() - start
    print(f"{trials} trials, {len(rounds)} rows: {reading:.1f} s to read, {whole:.1f} s the whole command")
