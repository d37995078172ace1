"""Where results come from: the machine, the packages, the command."""

import platform
import sys

import numpy as np
import torch

from federated import version


def describe() -> dict:
    """Describe this process and its machine."""
    return {
        "git_revision": version.git_revision(),
        "argv": sys.argv,
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
    }
