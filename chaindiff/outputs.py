"""What sampling leaves in a run's directory: every variable's samples, whole files only, and a grid."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from chaindiff.pictures import grid, save_png, to_image
from chaindiff.training import checkpoint
from chaindiff.variables import Variable

GRID = 64  # samples shown in a grid


@dataclass(frozen=True)
class Samples:
    """The folder `samples/` of a run, for `count` samples in batches of `batch`.

    Images are 000000.png and on; other variables are one safetensors file a batch, named after its first sample.
    """

    folder: Path
    variables: Sequence[Variable]
    count: int
    batch: int

    def path(self, variable: Variable, number: int) -> Path:
        suffix = "png" if variable.kind == "image" else "safetensors"
        return self.folder / variable.name / f"{number:06d}.{suffix}"

    def files(self, first: int, end: int) -> Iterable[Path]:
        for variable in self.variables:
            numbers = range(first, end) if variable.kind == "image" else (first,)
            yield from (self.path(variable, number) for number in numbers)

    def done(self) -> int:
        """How many samples, in whole batches from the first, are already there."""
        for first in range(0, self.count, self.batch):
            if not all(path.exists() for path in self.files(first, min(first + self.batch, self.count))):
                return first
        return self.count

    @property
    def grids(self) -> list[Path]:
        return [self.folder / v.name / "grid.png" for v in self.variables if v.kind == "image"]

    @property
    def complete(self) -> bool:
        return self.done() == self.count and all(path.exists() for path in self.grids)

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def write(self, first: int, values: Mapping[str, Tensor]) -> None:
        """One batch of samples, starting at number `first`."""
        for variable in self.variables:
            value = values[variable.name]
            self.path(variable, 0).parent.mkdir(parents=True, exist_ok=True)
            if variable.kind == "image":
                for row, image in enumerate(value):
                    save_png(to_image(image), self.path(variable, first + row))
            else:
                # One entry of metadata: with more, the format's writer orders them at random.
                checkpoint.save(self.path(variable, first), {variable.name: value}, {"identity": variable.identity})

    def write_grids(self) -> None:
        """A grid of the first samples of every image variable, from the files."""
        shown = min(self.count, GRID)
        for variable in self.variables:
            if variable.kind == "image":
                images = torch.stack([read_image(self.path(variable, n)) for n in range(shown)])
                picture = grid(images, columns=math.ceil(math.sqrt(shown)))
                save_png(picture, self.folder / variable.name / "grid.png")


def read_image(path: Path) -> Tensor:
    """An image file as [channels, height, width] in [-1, 1]."""
    with Image.open(path) as image:
        pixels = torch.from_numpy(np.array(image.convert("RGB")))
    return pixels.permute(2, 0, 1).float() / 127.5 - 1
