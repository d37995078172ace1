"""What arrives of a client's update, and how long its encoded message is."""

import math

import torch
from torch.nn import functional

from federated import algorithms
from federated.learning.flat import Flat
from federated.settings import Settings

BUCKET = 512  # entries that share a scale
SCALE_BITS = VALUE_BITS = 32


def topk(update: torch.Tensor, ratio: float) -> torch.Tensor:
    """`update` [size] with zeros in place of all but the largest of its entries by magnitude, of which `ratio` are left
    (Stich et al., NeurIPS 2018)."""
    places = update.abs().topk(_count(len(update), ratio), sorted=False).indices
    return torch.zeros_like(update).index_copy_(0, places, update[places])


def _count(size: int, ratio: float) -> int:
    return max(1, round(size * ratio))


def quantize(update: torch.Tensor, bits: int, chance: torch.Tensor) -> torch.Tensor:
    """`update` [size] with each entry at the level above or below it, by `chance` [size], uniform in [0, 1), so that its
    expectation stays (QSGD: Alistarh et al., NeurIPS 2017, section 3.1). The 2^bits - 1 levels lie evenly between minus and
    plus the largest magnitude in a bucket of entries: with the bucket's norm in its place, which is the other form there, the
    variance is larger."""
    levels = 2 ** (bits - 1) - 1
    size = len(update)
    buckets, chance = (functional.pad(each, (0, -size % BUCKET)).view(-1, BUCKET) for each in (update, chance))
    scales = buckets.abs().amax(1, keepdim=True).clamp_min(torch.finfo(update.dtype).tiny)
    rounded = (buckets / scales * levels).add_(chance).floor_().clamp_(-levels, levels)
    return rounded.mul_(scales).div_(levels).flatten()[:size]


def is_lossy(settings: Settings) -> bool:
    """Whether less than the update arrives: not with all entries or all bits, nor if there are no clients to send any."""
    is_part = settings.compression_ratio != 1 and settings.bits != VALUE_BITS
    return settings.compression != "none" and is_part and not algorithms.load(settings.algorithm).pooled


def memory_size(settings: Settings, num_parameters: int) -> int:
    """How many numbers a client's memory of what it has not sent yet has. Rounding needs none: its error is zero in
    expectation, and with few bits it is larger than the update, so that a memory would grow without bound."""
    return num_parameters if is_lossy(settings) and settings.compression == "topk" else 0


def compress(update: torch.Tensor, memory: torch.Tensor, settings: Settings, generator: torch.Generator) -> None:
    """Make `update` [num_parameters] what arrives of it, and `memory` [memory_size] what is left for the next one (error
    feedback: Stich et al., NeurIPS 2018, Algorithm 1)."""
    if settings.compression == "quantize":
        update.copy_(quantize(update, settings.bits, torch.rand(len(update), generator=generator)))
        return
    memory.add_(update)
    update.copy_(topk(memory, settings.compression_ratio))
    memory.sub_(update)


def message_bytes(settings: Settings, flat: Flat) -> int:
    """The length of a vector that a client sends. topk: 32 bits for each value and as many for its index as tell all entries
    apart; quantize: `bits` an entry and 32 for each bucket; no more than 32 bits an entry. BatchNorm's statistics go as they
    are."""
    size = flat.num_parameters
    whole = bits = VALUE_BITS * size
    if is_lossy(settings) and settings.compression == "topk":
        bits = _count(size, settings.compression_ratio) * (VALUE_BITS + (size - 1).bit_length())
    elif is_lossy(settings):
        bits = settings.bits * size + SCALE_BITS * math.ceil(size / BUCKET)
    return math.ceil(min(bits, whole) / 8) + 4 * (flat.size - size)
