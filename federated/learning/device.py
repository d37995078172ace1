"""The device that a process computes on."""

import ctypes
import os

import torch

from federated.options import UsageError
from federated.settings import Settings


def resolve_device(settings: Settings) -> torch.device:
    """Prepare torch for reproducible work and return the device of `settings`. Raises UsageError if this machine lacks it or
    its precision."""
    name = settings.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    elif name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no CUDA device here")
    if settings.precision == "bf16":
        if name == "cuda":
            supported = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            supported = torch.cpu._is_avx512_bf16_supported()
        if not supported:
            raise UsageError(f"--precision bf16: this {name} has no bf16 arithmetic; use fp32")
    torch.set_num_threads(settings.threads)
    if name == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs it to give the same bits each time
        torch.set_deterministic_debug_mode("warn")  # logs each operation that has no deterministic algorithm
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return torch.device(name)


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def keep_freed_memory() -> None:
    """Have glibc's malloc keep freed blocks for the next layer instead of returning large ones to the system, which has to
    fault them in again: the McMahan CNN evaluates in two thirds of the time, at the same peak. No effect without glibc."""
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
