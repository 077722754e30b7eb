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

from chaindiff.chain.variable import Variable
from chaindiff.io import tensorfile
from chaindiff.io.errors import UserError
from chaindiff.show.images import grid, save_png, to_image

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
    captions: Sequence[str] = ()  # of the samples, where texts are given

    def path(self, variable: Variable, number: int) -> Path:
        suffix = "png" if variable.kind == "image" else "safetensors"
        return self.folder / variable.name / f"{number:06d}.{suffix}"

    def files(self, first: int, end: int) -> Iterable[Path]:
        for variable in self.variables:
            numbers = range(first, end) if variable.kind == "image" else (first,)
            yield from (self.path(variable, number) for number in numbers)

    def missing(self) -> list[range]:
        """The batches, as ranges of sample numbers, that are not wholly there."""
        starts = range(0, self.count, self.batch)
        batches = [range(first, min(first + self.batch, self.count)) for first in starts]
        return [batch for batch in batches if not all(path.exists() for path in self.files(batch.start, batch.stop))]

    @property
    def grids(self) -> list[Path]:
        return [self.folder / v.name / "grid.png" for v in self.variables if v.kind == "image"]

    @property
    def complete(self) -> bool:
        return not self.missing() and all(path.exists() for path in self.grids)

    def clear(self) -> None:
        """Delete all. Raises UserError if that fails: what stayed would pass for samples of the new settings."""
        try:
            shutil.rmtree(self.folder)
        except FileNotFoundError:
            pass
        except OSError as error:
            hint = "delete it by hand, or choose another folder with --out"
            raise UserError(f"cannot be deleted: {error.strerror or error}", str(self.folder), hint) from error

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
                tensorfile.save(self.path(variable, first), {variable.name: value}, {"identity": variable.identity})

    def write_grids(self) -> None:
        """A grid of the first samples of every image variable, from the files."""
        shown = min(self.count, GRID)
        for variable in self.variables:
            if variable.kind == "image":
                images = torch.stack([read_image(self.path(variable, n)) for n in range(shown)])
                columns = 8 if self.captions else math.ceil(math.sqrt(shown))  # captions are easier to read in rows
                picture = grid(images, columns=columns, captions=self.captions[:shown])
                save_png(picture, self.folder / variable.name / "grid.png")


def read_image(path: Path) -> Tensor:
    """An image file as [channels, height, width] in [-1, 1]. Raises UserError if it cannot be read."""
    try:
        with Image.open(path) as image:
            pixels = torch.from_numpy(np.array(image.convert("RGB")))
    except Exception as error:  # PIL raises many kinds for files that are cut short or something else
        raise UserError(
            f"not a readable image: {error}", str(path), "delete it, and the same command makes it again"
        ) from error
    return pixels.permute(2, 0, 1).float() / 127.5 - 1
