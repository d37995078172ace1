"""Measure a GPU, in parts that can be named. A part that fails or takes too long does not affect the others.

tests     the tests that need a GPU: against the CPU, the same bits twice, a kill and a resume, bf16, several trials at once
steps     time, launches and memory of a training step: a plain PyTorch loop, this code, and this code with captured graphs
at_once   trials an hour by how many run at once on the device
pfl       the workload on which pfl-research compared frameworks (NeurIPS 2024): this sweep, a plain loop, pfl itself
headline  resnet18, 2 clients x 10,000 samples, 50 rounds, 3 sets x 3 trials: projected from a few rounds
"""

import argparse
import contextlib
import importlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

# part: (module beside this one, seconds that it may take)
PARTS = {
    "tests": ("gpu_tests", 100),
    "steps": ("steps", 75),
    "at_once": ("at_once", 125),
    "pfl": ("comparison", 110),
    "headline": ("headline", 65),
}


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; default: all")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a size that only shows whether the parts work")
    parser.add_argument("--output", type=pathlib.Path, default="gpu_results.jsonl", metavar="FILE", help="default: %(default)s")
    parser.add_argument("--measure", choices=PARTS, help=argparse.SUPPRESS)  # in a process of its own
    args = parser.parse_args(argv)
    if unknown := set(args.parts) - PARTS.keys():
        parser.error(f"unknown part {min(unknown)!r}: the parts are {', '.join(PARTS)}")
    return args


def table(rows) -> str:
    """Rows as aligned columns, in the order in which names first come."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([_text(row.get(name)) for name in names] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def _text(value) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def measure(part, device, tiny, output) -> None:
    """Append each row of a part to `output` as it is measured."""
    for row in importlib.import_module(PARTS[part][0]).rows(device, tiny):
        with open(output, "a") as file:
            file.write(json.dumps({"part": part, **row}) + "\n")


def run_part(part, args) -> bool:
    """Run a part in a process of its own, within its time, and print its table and decisions. Returns whether it worked."""
    limit = PARTS[part][1] * (20 if args.tiny else 1)  # a tiny one is no measurement, and may run on a busy machine
    before = args.output.stat().st_size if args.output.exists() else 0
    command = [sys.executable, __file__, "--measure", part, "--device", args.device, "--output", args.output]
    start = time.monotonic()
    print(f"\n{part}, at most {limit} s", flush=True)
    process = subprocess.Popen([*map(str, command), *["--tiny"] * args.tiny], start_new_session=True)
    failure = f"did not end within {limit} s"
    try:
        code = process.wait(limit)
        failure = f"failed with exit code {code}" if code else None
    except subprocess.TimeoutExpired:
        pass
    finally:
        with contextlib.suppress(ProcessLookupError):  # and the processes that it started
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    rows = []
    if args.output.exists():
        with open(args.output) as file:
            file.seek(before)
            rows = [json.loads(line) for line in file]
    if rows:
        print(table([{name: value for name, value in row.items() if name != "part"} for row in rows]))
        if args.tiny:
            print("(tiny: the figures and what would follow from them mean nothing)")
        for line in importlib.import_module(PARTS[part][0]).decisions(rows):
            print(f"-> {line}")
    print(f"{part}: {failure or 'done'}, {time.monotonic() - start:.0f} s", flush=True)
    return not failure


def card(device) -> str:
    import torch

    if device == "cpu":
        return "cpu"
    if not torch.cuda.is_available():
        sys.exit("gpu.sh: torch finds no CUDA device here; --device cpu --tiny runs the same code without")
    free, total = torch.cuda.mem_get_info()
    return f"{torch.cuda.get_device_name()}, {total >> 30} GiB of which {free >> 30} are free, CUDA {torch.version.cuda}"


def main(argv=None) -> int:
    args = parse(argv)
    sys.path.insert(0, str(HERE))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if args.device == "cuda":  # one of several
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if args.measure:
        measure(args.measure, args.device, args.tiny, args.output)
        return 0
    args.output = args.output.absolute()
    import torch

    print(f"{card(args.device)}; torch {torch.__version__}, Python {sys.version.split()[0]}, {os.cpu_count()} cores")
    worked = [run_part(part, args) for part in args.parts or PARTS]
    print(f"\n{sum(worked)} of {len(worked)} parts worked; measurements are in {args.output}")
    return 0 if all(worked) else 1


if __name__ == "__main__":
    sys.exit(main())
