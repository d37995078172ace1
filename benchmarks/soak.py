"""300 tiny trials for ten minutes, with a random fault every few seconds: no result may be lost and nothing be left behind.

    python benchmarks/soak.py [--seconds 600] [--trials 300]

The faults are SIGKILL of a client process, a server, a whole trial, or the sweep itself (which is then launched again), a
client process stopped for good, and a damaged checkpoint. Printed at the end: trials done, faults survived, results that
were lost or changed (must be 0), processes, locks, sockets and temporary files that were left (must be 0), and the
sweep's file descriptors and memory over time.
"""

import argparse
import contextlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))

from federated.trial import CHECKPOINT  # noqa: E402


def processes_of(out):
    """{trial directory: {role: pid}} of the processes that write the trials' logs."""
    found = {}
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            log = pathlib.Path(os.readlink(f"/proc/{pid}/fd/1"))
            if log.is_relative_to(out):
                found.setdefault(log.parent, {})[log.stem] = int(pid)
    return found


def size_of(pid):
    """File descriptors and resident MB of a process."""
    fields = pathlib.Path(f"/proc/{pid}/status").read_text().split()
    return len(os.listdir(f"/proc/{pid}/fd")), int(fields[fields.index("VmRSS:") + 1]) // 1024


def results(out):
    found = {}
    for path in out.rglob("results.json"):
        if (path.parent / "done").exists():
            content = json.loads(path.read_text())
            del content["curves"]["round_seconds"], content["provenance"]
            found[str(path.relative_to(out))] = content
    return found


def launch(out, trials, rounds, log):
    options = {
        "output_dir": out, "num_hparams": 1, "num_trials": trials, "rounds": rounds, "samples_per_client": 100,
        "retries": 10**6, "timeout": 5, "checkpoint_seconds": 0, "client_processes": 2, "optimizer_state": "keep",
        "num_clients": 4, "participation": 0.5,
    }  # fmt: skip
    command = [sys.executable, HERE / "sweep.py", "launch", "--skip_confirmation"]
    command += [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def fault(rng, sweep, out):
    """Cause one fault. Returns its name, None if no process ran."""
    running = processes_of(out)
    kind = rng.choice(["client", "server", "trial", "stop", "checkpoint"] * 3 + ["sweep"])
    if kind == "sweep":
        sweep.kill()
        return kind
    if not running:
        return None
    trial, roles = rng.choice(sorted(running.items()))
    clients = [pid for role, pid in roles.items() if role != "server"]
    victims = {"client": clients[:1], "server": [roles.get("server")], "trial": list(roles.values()), "stop": clients[-1:]}
    if kind == "checkpoint":
        path = trial / CHECKPOINT
        with contextlib.suppress(OSError):
            os.truncate(path, path.stat().st_size // 2)
        victims[kind] = list(roles.values())
    with contextlib.suppress(ProcessLookupError, TypeError):
        for pid in victims[kind]:
            os.kill(pid, signal.SIGSTOP if kind == "stop" else signal.SIGKILL)
        return kind
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=200)
    args = parser.parse_args()
    rng, faults, sizes, seen, lost = random.Random(0), {}, [], {}, 0
    with tempfile.TemporaryDirectory() as work:
        out, calm = pathlib.Path(work) / "soak", pathlib.Path(work) / "calm"
        with open(pathlib.Path(work) / "log", "w") as log:
            sweep, start = launch(out, args.trials, args.rounds, log), time.monotonic()
            while time.monotonic() < start + args.seconds and sweep.poll() is None:
                time.sleep(rng.uniform(1, 4))
                with contextlib.suppress(OSError, ValueError):
                    sizes.append((time.monotonic() - start, *size_of(sweep.pid)))
                kind = fault(rng, sweep, out)
                faults[kind] = faults.get(kind, 0) + (kind is not None)
                if kind == "sweep":
                    sweep.wait()
                    sweep = launch(out, args.trials, args.rounds, log)
                now = results(out)
                lost += sum(now.get(path) != content for path, content in seen.items())
                seen = now
            code = sweep.wait()
            undisturbed = launch(calm, args.trials, args.rounds, log).wait()
        time.sleep(5)
        ended, expected = results(out), results(calm)
        lost += sum(ended.get(path) != content for path, content in expected.items())
        orphans = sum(len(roles) for roles in processes_of(out).values())
        left = [*out.rglob("lock"), *out.rglob("*.tmp"), *out.rglob("checkpoint*")]
    faults.pop(None, None)
    print(f"exit codes: {code}, undisturbed {undisturbed}")
    print(f"trials done: {len(ended) // 4} of {args.trials} in {time.monotonic() - start:.0f} s")
    print(f"faults survived: {sum(faults.values())} ({', '.join(f'{n} {kind}' for kind, n in sorted(faults.items()))})")
    print(f"results lost or changed: {lost}")
    print(f"processes left: {orphans}; files left: {len(left)}")
    print("minutes  descriptors  MB")
    for minute in range(0, int(sizes[-1][0] // 60) + 1):
        window = np.array([size[1:] for size in sizes if size[0] // 60 == minute])
        if len(window):
            print(f"{minute:7d}  {np.median(window[:, 0]):11.0f}  {np.median(window[:, 1]):2.0f}")
    return 1 if lost or orphans or left or code or undisturbed else 0


if __name__ == "__main__":
    sys.exit(main())
