"""What this process may use of the machine: under a batch system, taskset or a container that is not all of it."""

import os
import pathlib

CGROUPS = pathlib.Path("/sys/fs/cgroup")


def cores() -> int:
    """Cores by affinity, by the cgroup's quota and by Slurm's grant, at least 1."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for limit in _limits("cpu.max"):
        quota, period = limit.split()
        if quota != "max":
            count = min(count, int(quota) // int(period))
    return max(1, min(count, _slurms("SLURM_CPUS_ON_NODE", count)))


def memory() -> int:
    """Bytes of memory that are free for use, by the system, by the cgroup's limit and by Slurm's grant."""
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        fields = dict(line.split(":") for line in pathlib.Path("/proc/meminfo").read_text().splitlines())
        size = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # not Linux
        pass
    limits = [int(limit) for limit in _limits("memory.max") if limit != "max"]
    return min([size, *limits, _slurms("SLURM_MEM_PER_NODE", size >> 20) << 20 or size])


def oom_kills() -> int:
    """How many processes the system has killed for want of memory since it started."""
    try:
        counters = pathlib.Path("/proc/vmstat").read_text().split()
        return int(counters[counters.index("oom_kill") + 1])
    except (OSError, ValueError):  # not Linux
        return 0


def gpus() -> list[str]:
    """The ids of the GPUs this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if not any(pathlib.Path(path).exists() for path in ("/dev/nvidiactl", "/dev/kfd")):
        return []  # without the second that torch takes to import
    import torch

    count = torch.cuda.device_count()
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return visible[:count] or [str(number) for number in range(count)]


def _slurms(name, default) -> int:
    """What Slurm has granted on this node to the job that this process is in: not every cluster enforces it."""
    return int(os.environ.get(name, default))


def _limits(name):
    """The values of a cgroup setting (version 2) that apply: of this process's group and all above it."""
    try:
        group = pathlib.Path("/proc/self/cgroup").read_text().split("0::", 1)[1].splitlines()[0]
    except (OSError, IndexError):
        return
    directory = CGROUPS / group.lstrip("/")
    for each in (directory, *directory.parents):
        if each.is_relative_to(CGROUPS) and (each / name).is_file():
            yield (each / name).read_text().strip()
