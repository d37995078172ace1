"""One launch of a study against a launch for each of its sweeps, in one run, and whether their results are the same.

    python benchmarks/study.py [--rounds 3]

36 sweeps of digits: 3 algorithms x 3 ways to split x 2 numbers of clients x 2 participations, one hyper-parameter set of one
trial each.
"""

import argparse
import itertools
import json
import pathlib
import subprocess
import sys
import tempfile
import time

PROJECT = pathlib.Path(__file__).resolve().parent.parent

AXES = {
    "algorithm": ("Fedavg", "Fedprox", "Scaffold"),
    "partition": ("iid", "dirichlet"),
    "partition_alpha": ("0.1", "0.5"),
    "num_clients": ("10", "20"),
    "participation": ("0.2", "1.0"),
}
FIXED = ("--local_optimizer", "sgd", "--num_hparams", "1", "--num_trials", "1")


def launch(output_dir: pathlib.Path, rounds: int, values: dict[str, tuple[str, ...]]) -> float:
    """Seconds from start to exit."""
    options = [word for name, chosen in values.items() for word in (f"--{name}", *chosen)]
    command = [sys.executable, str(PROJECT / "sweep.py"), "launch", "--skip_confirmation", "--output_dir", str(output_dir)]
    start = time.perf_counter()
    subprocess.run([*command, *FIXED, "--rounds", str(rounds), *options], check=True, capture_output=True)
    return time.perf_counter() - start


def one_by_one() -> list[dict[str, tuple[str, ...]]]:
    combinations = [dict(zip(AXES, ((value,) for value in values))) for values in itertools.product(*AXES.values())]
    for each in combinations:
        if each["partition"] == ("iid",):  # which has no alpha
            del each["partition_alpha"]
    return [each for number, each in enumerate(combinations) if each not in combinations[:number]]


def curves(output_dir: pathlib.Path) -> dict[str, dict]:
    """{the trial's path: what it learned} of all trials."""
    found = output_dir.rglob("results.json")
    return {str(path.parent.relative_to(output_dir)): json.loads(path.read_text())["curves"] for path in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    sweeps = one_by_one()
    with tempfile.TemporaryDirectory() as scratch:
        study, apart = pathlib.Path(scratch, "study"), pathlib.Path(scratch, "apart")
        before = launch(study, rounds, AXES)
        singly = sum(launch(apart, rounds, each) for each in sweeps)
        again = launch(pathlib.Path(scratch, "again"), rounds, AXES)
        learned = [
            {path: {k: v for k, v in each.items() if k != "round_seconds"} for path, each in curves(out).items()}
            for out in (study, apart)
        ]
    print(f"{len(sweeps)} sweeps of {rounds} rounds in one launch: {before:.1f} s before and {again:.1f} s after")
    print(f"in {len(sweeps)} launches, one by one: {singly:.1f} s, {2 * singly / (before + again):.1f} times as long")
    print(f"results: {'the same' if learned[0] == learned[1] and len(learned[0]) == len(sweeps) else 'they DIFFER'}")


if __name__ == "__main__":
    main()
