"""The resources that this process may use. Under a batch system, taskset or a container they are a part of the machine's."""

import itertools
import os
import pathlib
import subprocess
import typing

CGROUPS = pathlib.Path("/sys/fs/cgroup")


def cores() -> int:
    """The least number of cores that the affinity, the cgroup's quota and Slurm's grant allow, at least 1."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for group in _groups("cpu"):
        quota, period = (_read(group / "cpu.max") or "max 0").split()
        if quota == "max":  # also under version 1, which writes -1 if there is no quota
            quota, period = _read(group / "cpu.cfs_quota_us") or "-1", _read(group / "cpu.cfs_period_us") or "0"
        if int(quota) > 0 and int(period) > 0:
            count = min(count, int(quota) // int(period))
    return max(1, min(count, _slurms("SLURM_CPUS_ON_NODE", count)))


def memory() -> int:
    """Bytes of memory: the least of those available on the system, the cgroup's limit and Slurm's grant."""
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        fields = dict(line.split(":") for line in pathlib.Path("/proc/meminfo").read_text().splitlines())
        size = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # not Linux
        pass
    values = [_read(group / name) for group in _groups("memory") for name in ("memory.max", "memory.limit_in_bytes")]
    limits = [int(value) for value in values if value not in (None, "max")]
    granted = _slurms("SLURM_MEM_PER_NODE", 0) or _slurms("SLURM_MEM_PER_CPU", 0) * _slurms("SLURM_CPUS_ON_NODE", 1)
    return min([size, *limits, granted << 20 or size])  # a grant of 0 means all memory of the node


def oom_kills() -> int:
    """How many processes the system has killed since it started because it ran out of memory."""
    try:
        counters = pathlib.Path("/proc/vmstat").read_text().split()
        return int(counters[counters.index("oom_kill") + 1])
    except (OSError, ValueError):  # not Linux
        return 0


def gpus() -> list[str]:
    """The ids of the GPUs that this process may use, or of parts of them (MIG), as CUDA_VISIBLE_DEVICES names them; Slurm sets
    it."""
    if not _has_gpu_driver():
        return []  # saves the second that importing torch takes
    import torch

    count, named = torch.cuda.device_count(), _named_gpus() or []
    if count and named and all(name.startswith("MIG-") for name in named):
        return named  # a process sees only the first one, so each trial gets one
    return named[:count] or [str(number) for number in range(count)]


def gpu_disagreement() -> str | None:
    """A warning of one line if torch finds another number of GPUs than are named or listed; else None."""
    if not _has_gpu_driver():
        return None
    import torch

    source, expected = "CUDA_VISIBLE_DEVICES names", _named_gpus()
    if expected is None:
        source, expected = "nvidia-smi lists", _listed_gpus()
    elif expected and expected[0].startswith("MIG-"):
        expected = expected[:1]
    found = torch.cuda.device_count()
    if expected is None or len(expected) == found:
        return None
    cuda = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    return f"{source} {len(expected)} GPUs, torch {torch.__version__}, built {cuda}, finds and uses {found}: see docs/gpu.md"


_DRIVER_FILES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # NVIDIA's, AMD's, Windows' (WSL)


def _has_gpu_driver() -> bool:
    return any(pathlib.Path(path).exists() for path in _DRIVER_FILES)


def _named_gpus() -> list[str] | None:
    """The GPUs in CUDA_VISIBLE_DEVICES, up to the first name that means none; None if it is not set."""
    if (value := os.environ.get("CUDA_VISIBLE_DEVICES")) is None:
        return None
    names = (name.strip() for name in value.split(","))
    return list(itertools.takewhile(lambda name: name not in ("", "-1", "NoDevFiles"), names))


def _listed_gpus() -> list[str] | None:
    """The lines in which nvidia-smi lists GPUs; None if it cannot be asked."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return [line for line in listed.stdout.splitlines() if line.startswith("GPU ")]


def _slurms(name, default) -> int:
    """Slurm's grant on this node to the job of this process. Not every cluster enforces it."""
    return int(os.environ.get(name, default))


def _groups(controller: str) -> typing.Iterator[pathlib.Path]:
    """The directories of the cgroups that limit this process in what `controller` controls: its own and all above it. Version 2
    has one tree of groups, version 1 one for each controller."""
    try:
        lines = pathlib.Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        number, controllers, group = line.split(":", 2)
        if number == "0" and not controllers:
            root = CGROUPS
        elif controller in controllers.split(","):
            root = CGROUPS / controller
        else:
            continue
        directory = root / group.lstrip("/")
        yield from (each for each in (directory, *directory.parents) if each.is_relative_to(root))


def _read(path: pathlib.Path) -> str | None:
    """The value in a cgroup's file; None if there is no such file, as in a container that does not show all groups."""
    try:
        return path.read_text().strip()
    except OSError:
        return None
