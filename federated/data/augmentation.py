"""Augmentation of training images, a whole batch at once and on its device."""

import typing
from collections.abc import Callable

from federated.data.datasets import Spec
from federated.extension import Registry
from federated.options import UsageError

if typing.TYPE_CHECKING:
    import torch

REGISTRY: Registry[Callable | None] = Registry("augmentation")
REGISTRY.add("none", None)
Augment = typing.TypeVar("Augment", bound=Callable)


def register(name: str) -> Callable[[Augment], Augment]:
    """Decorator that lets options name an augmentation: a function of raw images [samples, channels, height, width] and of the
    CPU's generator, from which it must draw. It returns images of the same shape and type. Raises UsageError if the name is
    taken."""

    def decorate(augment: Augment) -> Augment:
        REGISTRY.require(callable(augment), name, "a function of images and a generator")
        REGISTRY.add(name, augment)
        return augment

    return decorate


PADDING = 4  # pixels on each side, as in He et al. (CVPR 2016, section 4.2)


@register("crop_flip")
def crop_flip(images: "torch.Tensor", generator: "torch.Generator") -> "torch.Tensor":
    """A random crop of each image padded with zeros, mirrored left to right or not with equal chance.

    images [samples, channels, height, width] are raw, so that zeros are black. All draws come from the CPU's `generator`, so
    they are the same on every device. Returns images of the same shape and type.
    """
    import torch
    from torch.nn import functional

    samples, _, height, width = images.shape
    down, right = torch.randint(0, 2 * PADDING + 1, (2, samples, 1), generator=generator)
    mirrored = torch.rand(samples, 1, generator=generator) < 0.5
    rows = down + torch.arange(height)
    columns = right + torch.arange(width)
    columns = torch.where(mirrored, columns.flip(1), columns)
    padded = functional.pad(images, [PADDING] * 4)
    of_sample = torch.arange(samples)[:, None, None]
    where = tuple(index.to(images.device, non_blocking=True) for index in (of_sample, rows[:, :, None], columns[:, None, :]))
    return padded.permute(0, 2, 3, 1)[where].permute(0, 3, 1, 2)


def apply(name: str, images: "torch.Tensor", generator: "torch.Generator") -> "torch.Tensor":
    """Augment `images`. Raises UsageError if the result has another shape or type."""
    augment = REGISTRY[name]
    if augment is None:
        return images
    augmented = augment(images, generator)
    if (augmented.shape, augmented.dtype) != (images.shape, images.dtype):
        raise UsageError(
            f"--augmentation {name} returned {augmented.dtype} {list(augmented.shape)} of {images.dtype} {list(images.shape)}"
        )
    return augmented


def check(name: str, spec: Spec) -> None:
    """Raises UsageError if the augmentation `name` does not fit the data."""
    if REGISTRY[name] is not None and not spec.is_image:
        raise UsageError(f"--augmentation {name} does not fit {spec}: it takes images only")
