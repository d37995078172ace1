"""The provenance of results: the machine, the packages, the command."""

import platform
import sys

import numpy as np
import torch

from federated import version


def processor() -> str:
    """The model of this machine's CPU, and which of its vector instructions torch uses."""
    try:
        with open("/proc/cpuinfo") as file:
            models = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        models = []
    return f"{models[0] if models else platform.processor() or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def describe() -> dict:
    """Describe this process and its machine."""
    return {
        "version": version.VERSION,
        "git_revision": version.git_revision(),
        "argv": sys.argv,
        "host": platform.node(),
        "platform": platform.platform(),
        "processor": processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
    }
