"""One task in three domains: the digits of MNIST, USPS and SVHN as colour images of 32x32, each domain an owner."""

import dataclasses
import pathlib

import numpy as np

from federated.data import decoded
from federated.data.decoded import Files, Noted, Torchvision

SIZE = 32


@dataclasses.dataclass(frozen=True)
class Domains(Files):
    """What torchvision reads of several data sets."""

    origins: tuple[Torchvision, ...]

    @classmethod
    def of(cls, name: str, *origins: Torchvision) -> "Domains":
        return cls(name, origins[0].folder, tuple(pattern for each in origins for pattern in each.patterns), origins)

    def array_names(self) -> tuple[str, ...]:
        return tuple(f"{part}_{what}" for part in ("train", "test") for what in ("inputs", "labels", "owners"))

    def decode(self, data_dir: pathlib.Path, temporary: pathlib.Path) -> tuple[Noted, dict[str, np.ndarray]]:
        read = [decoded.read(each, str(data_dir)) for each in self.origins]
        noted = {name: decoded.note(path) for name, path in self.present(data_dir).items()}
        arrays = {}
        for part in ("train", "test"):
            lengths = [len(each[f"{part}_labels"]) for each in read]
            inputs: np.ndarray = np.empty((sum(lengths), 3, SIZE, SIZE), np.uint8)
            for each, place in zip(read, np.split(inputs, np.cumsum(lengths)[:-1])):
                place[:] = _in_colour(each[f"{part}_images"])
            arrays[f"{part}_inputs"] = inputs
            arrays[f"{part}_labels"] = np.concatenate([each[f"{part}_labels"] for each in read])
            arrays[f"{part}_owners"] = np.repeat(np.arange(len(read)), lengths)
        return noted, arrays


def _in_colour(images: np.ndarray) -> np.ndarray:
    """uint8 [samples, 3 or 1, SIZE, SIZE] of colour images of that size, or of grey ones [samples, height, width], which Pillow
    resizes by bilinear interpolation, as torchvision's Resize has it do."""
    if images.ndim == 4:
        return images
    from PIL import Image

    bilinear = Image.Resampling.BILINEAR
    return np.stack([np.asarray(Image.fromarray(image).resize((SIZE, SIZE), bilinear)) for image in images])[:, None]
