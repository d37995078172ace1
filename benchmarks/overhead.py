"""The sweep's overhead: its efficiency against plain PyTorch loops over the same trials.

    python benchmarks/overhead.py digits            the default sweep
    python benchmarks/overhead.py fashion_mnist     cnn, 2 clients x 10,000 samples, 3 rounds, 2 trials; needs --data_dir
    python benchmarks/overhead.py cifar             resnet18 on random images of CIFAR's shape

The floor: one process a core, imports and data loading done, the same trials handed out one by one. The sweep: the whole of
`python sweep.py launch`, from start to exit. The two run in turn, --repeats times. Then one sweep runs with its time split
up, as measured by its own processes.
"""

import argparse
import json
import multiprocessing
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

PROJECT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from federated.data import datasets, decoded  # noqa: E402
from federated.running import resources  # noqa: E402
from federated.settings import Settings  # noqa: E402
from hparams_registry import default_hparams, random_hparams  # noqa: E402

# name: settings, hyper-parameter sets, trials
WORK = {
    "digits": (Settings(), 5, 3),
    "fashion_mnist": (Settings(model_arch="cnn", dataset="fashion_mnist", samples_per_client=10_000, rounds=3), 1, 2),
    "cifar": (Settings(model_arch="resnet18", dataset="cifar10", samples_per_client=600, rounds=2), 1, 2),
}


def plain_worker(settings, data_dir, trials, results):
    """Import and load, report that, then run trials until there are no more."""
    import torch

    from benchmarks.plain import fedavg

    torch.set_num_threads(1)
    data = datasets.load(settings.dataset, data_dir)
    fedavg(Settings(rounds=1), default_hparams("Fedavg", "digits"), 0, datasets.load("digits", data_dir))  # warm up
    results.put(None)
    while (trial := trials.get()) is not None:
        hparams, seed = trial
        _, history = fedavg(settings, hparams, seed, data)
        results.put((json.dumps(hparams), seed, history[-1][0]))


def floor(settings, sets, num_trials, data_dir):
    """Seconds of the plain loops, and their final test accuracies."""
    context = multiprocessing.get_context("spawn")
    trials, results = context.Queue(), context.Queue()
    work = [(hparams, seed) for hparams in sets for seed in range(num_trials)]
    workers = [
        context.Process(target=plain_worker, args=(settings, data_dir, trials, results)) for _ in range(resources.cores())
    ]
    for worker in workers:
        worker.start()
    for _ in workers:
        results.get()
    start = time.perf_counter()
    for trial in [*work, *[None] * len(workers)]:
        trials.put(trial)
    accuracies = [results.get()[2] for _ in work]
    seconds = time.perf_counter() - start
    for worker in workers:
        worker.join()
    return seconds, accuracies


def options_of(settings):
    """The options of a launch with these settings."""
    defaults = Settings()
    return [
        part for name, value in vars(settings).items() if value != getattr(defaults, name) for part in (f"--{name}", str(value))
    ]


def sweep(settings, num_hparams, num_trials, data_dir):
    """Seconds of the sweep from start to exit, its final test accuracies, and each trial's seconds by stage."""
    with tempfile.TemporaryDirectory() as output_dir:
        command = [sys.executable, str(PROJECT / "sweep.py"), "launch", "--skip_confirmation", "--output_dir", output_dir]
        command += ["--num_hparams", str(num_hparams), "--num_trials", str(num_trials), "--data_dir", data_dir]
        command += options_of(settings)
        command += ["--device", "cpu"]  # as the floor
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, cwd=output_dir)
        seconds = time.perf_counter() - start
        found = [json.loads(path.read_text()) for path in pathlib.Path(output_dir).rglob("results.json")]
    accuracies = [content["curves"]["test_acc"][-1] for content in found]
    return seconds, accuracies, [content["provenance"]["seconds"] for content in found]


def random_cifar(data_dir, train=2000, test=300):
    """Write random decoded arrays of CIFAR's shape. No files are needed, as times do not depend on the images."""
    import numpy as np

    rng = np.random.default_rng(0)
    arrays = {}
    for part, samples in (("train", train), ("test", test)):
        arrays[f"{part}_images"] = rng.integers(0, 256, (samples, 3, 32, 32), dtype=np.uint8)
        arrays[f"{part}_labels"] = rng.integers(0, 10, samples, dtype=np.uint8)
    directory = pathlib.Path(data_dir) / "decoded" / "cifar10"
    directory.mkdir(parents=True)
    decoded.write(arrays, directory, made_from={})


def spread(values):
    return f"{min(values):.2f} / {statistics.median(values):.2f} / {max(values):.2f}"


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=WORK)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--data_dir", default="data", help="where Fashion-MNIST lies")
    args = parser.parse_args(argv)
    settings, num_hparams, num_trials = WORK[args.work]
    sets = [default_hparams("Fedavg", "digits")] + [random_hparams("Fedavg", "digits", k) for k in range(1, num_hparams)]
    with tempfile.TemporaryDirectory() as scratch:
        data_dir = os.path.abspath(args.data_dir)
        if args.work == "cifar":
            data_dir = scratch
            random_cifar(scratch)
        datasets.load(settings.dataset, data_dir)
        floors, sweeps = [], []
        for repeat in range(args.repeats):
            plain_seconds, plain_accuracies = floor(settings, sets, num_trials, data_dir)
            sweep_seconds, accuracies, parts = sweep(settings, num_hparams, num_trials, data_dir)
            floors.append(plain_seconds)
            sweeps.append(sweep_seconds)
            print(
                f"{repeat + 1}: floor {plain_seconds:.2f} s, sweep {sweep_seconds:.2f} s, {plain_seconds / sweep_seconds:.2f}",
                flush=True,
            )
    size = f"{num_hparams} sets x {num_trials} trials x {settings.rounds} rounds on {resources.cores()} cores"
    print(f"\n{args.work}: {size}; min / median / max")
    print(f"floor       {spread(floors)} s")
    print(f"sweep       {spread(sweeps)} s")
    print(f"efficiency  {spread([a / b for a, b in zip(floors, sweeps)])}")
    print(f"mean final test accuracy: floor {statistics.mean(plain_accuracies):.4f}, sweep {statistics.mean(accuracies):.4f}")
    total = {name: sum(part[name] for part in parts) for name in parts[0]}
    transport = total["rounds"] - total["training"] - total["evaluation"]
    print(f"\nprocess seconds of the last sweep: {sweep_seconds * resources.cores():.2f}, of which")
    for name in ("training", "evaluation", "start", "join"):
        print(f"  {name:<11} {total[name]:.2f}")
    print(f"  {'transport':<11} {transport:.2f}  (messages, averaging, records and waiting)")
    other = sweep_seconds * resources.cores() - total["start"] - total["join"] - total["rounds"]
    print(f"  {'other':<11} {other:.2f}  (import, writing, idle cores)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
