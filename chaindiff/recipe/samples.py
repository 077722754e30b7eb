"""Sampling to disk: makes the missing samples of a request, and names their files in a run's directory."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chaindiff.chain.chain import Chain
from chaindiff.chain.variable import Variable
from chaindiff.data.images import open_image
from chaindiff.io.errors import UserError
from chaindiff.io.shards import Shards
from chaindiff.show.images import grid, save_png, to_image, to_uint8

GRID = 64  # samples shown in a grid
OURS = re.compile(r"\d{6,}\.(png|safetensors)|grid\.png")  # in the folder of a variable


def draw(chain: Chain, store: Shards, mine: Sequence[range] | None = None, **asked: Any) -> Iterator[tuple[int, int]]:
    """Sample what is missing in a store, or this process's share of it; yields (samples done, samples in all).

    The request, with `asked` as for `Chain.sample`, is planned once; a batch does not depend on the process that makes
    it. Images are rounded to 8 bits, as image files are (EDM's practice). `seconds` is each sample's share of its
    batch's time.
    """
    request = chain.request(len(store), **asked)

    def make(rows: range) -> dict[str, Tensor]:
        began = time.perf_counter()
        values = chain.part(request, rows.start)
        kept = {n: to_uint8(v) if chain.variables[n].kind == "image" else v for n, v in values.items()}
        return {**kept, "seconds": torch.full((len(rows),), (time.perf_counter() - began) / len(rows))}

    return store.fill(make, request.size, mine)


class Samples(Shards):
    """The folder `samples/` of a run, for `count` samples in batches of `batch`.

    Images are 000000.png and so on; other variables are one safetensors file a batch, named after its first sample.
    """

    def __init__(
        self, folder: Path, variables: Sequence[Variable], count: int, batch: int, captions: Sequence[str] = ()
    ):
        super().__init__(folder, "", count, batch)
        self.variables, self.captions = variables, captions  # captions: of the samples, where texts are given
        self.images = [folder / v.name for v in variables if v.kind == "image"]
        others = [v for v in variables if v.kind != "image"]
        self.others = [Shards(folder / v.name, v.identity, count, batch, v.version) for v in others]

    def holds(self, rows: range) -> bool:
        images = all(_png(folder, number).exists() for folder in self.images for number in rows)
        return images and all(store.holds(rows) for store in self.others)

    def write(self, first: int, tensors: Mapping[str, Tensor]) -> None:
        for folder in self.images:
            folder.mkdir(parents=True, exist_ok=True)
            for number, image in enumerate(tensors[folder.name], first):
                if not (path := _png(folder, number)).exists():
                    save_png(to_image(image), path)
        for store in self.others:  # what is finished stays: rows of a shorter request come first
            name = store.folder.name
            kept = (store._read(range(first, first)) or tensors)[name]
            if kept is tensors[name] or len(kept) < len(tensors[name]):
                store.write(first, {name: torch.cat([kept, tensors[name][len(kept) :]])})

    @property
    def grids(self) -> list[Path]:
        return [folder / "grid.png" for folder in self.images]

    @property
    def complete(self) -> bool:
        return not self.missing() and all(path.exists() for path in self.grids)

    @property
    def files(self) -> list[Path]:
        """The samples and grids in the folder, of any variables and settings: files of the names that we write."""
        return [path for path in self.folder.glob("*/*") if OURS.fullmatch(path.name) and not path.is_dir()]

    def clear(self) -> None:
        """Delete all samples and grids, and no other file.

        Raises UserError if that fails: what stayed would pass for samples of the new settings.
        """
        try:
            for path in (files := self.files):
                path.unlink()
            for folder in {path.parent for path in files}:
                with suppress(OSError):  # other files are in it
                    folder.rmdir()
        except OSError as error:
            hint = "delete it by hand, or choose another folder with --out"
            raise UserError(f"cannot be deleted: {error.strerror or error}", str(self.folder), hint) from error

    def write_grids(self) -> None:
        """A grid of the first samples of every image variable, from the files."""
        shown = min(self.count, GRID)
        columns = 8 if self.captions else math.ceil(math.sqrt(shown))  # captions are easier to read in rows
        for folder, path in zip(self.images, self.grids, strict=True):
            images = torch.stack([read_image(_png(folder, number)) for number in range(shown)])
            save_png(grid(images, columns=columns, captions=self.captions[:shown]), path)


def read_image(path: Path) -> Tensor:
    """An image file as [channels, height, width] in [-1, 1]. Raises UserError if it cannot be read."""
    try:
        with open_image(path) as image:
            pixels = torch.from_numpy(np.array(image.convert("RGB")))
    except Exception as error:  # PIL raises many kinds of errors for truncated or other files
        raise UserError(
            f"not a readable image: {error}", str(path), "delete it, and the same command makes it again"
        ) from error
    return pixels.permute(2, 0, 1).float() / 127.5 - 1


def _png(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.png"
