"""Ground-truth values of a chain's variables, which replace a stage to measure what it costs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from chaindiff.data import open_data
from chaindiff.data.items import Data
from chaindiff.edm.random import generator
from chaindiff.encoders import FileVectors
from chaindiff.io.digest import digest
from chaindiff.io.errors import UserError
from chaindiff.io.progress import shown
from chaindiff.io.shards import Shards
from chaindiff.recipe.assembly import Assembly
from chaindiff.specs.recipe import DataSpec, FileSpec
from chaindiff.training.batches import Features

BATCH = 128


def split_of(assembly: Assembly, split: str | None) -> Data:
    """The recipe's data, or another split of it. Raises UserError if there is no such split."""
    spec = assembly.recipe.data
    if split is None or split == spec.split:
        return assembly.data
    if isinstance(spec, DataSpec):
        return open_data(spec.model_copy(update={"split": split}))
    if "split" not in spec.settings:
        raise UserError(f"the data are '{spec.kind}', whose settings name no split, so that there is no '{split}'")
    return open_data(spec.model_copy(update={"settings": {**spec.settings, "split": split}}), assembly.root.name)


class DataValues:
    """Values of variables for every image of a data set, without augmentation; computed once and cached in `folder`."""

    def __init__(self, assembly: Assembly, data: Data, folder: Path):
        self.assembly, self.data, self.folder = assembly, data, folder
        self._encoder = cache(lambda name: assembly.encoders[name].build())
        self._vectors = cache(self._read_vectors)

    def of(self, name: str, rows: Sequence[int]) -> Tensor:
        """A variable's values for some rows; encoders' outputs are cached, except images."""
        variable = self.assembly.variables[name]
        if variable.kind == "text":
            raise UserError(f"a text cannot be sampled from; ask for an encoding of '{name}'")
        if variable.kind == "image" or name not in self.assembly.encoders:
            return self._compute(name, rows)
        encoder = self.assembly.encoders[name]
        key = digest([variable.identity, encoder.digest, encoder.files, self.data.content, len(self.data)])
        store = Shards(self.folder / f"{name}-{key}", key, len(self.data))
        shown(f"encode {name}", store.fill(lambda some: {"values": self._compute(name, some)}, BATCH))
        return store["values"][rows]

    def _compute(self, name: str, rows: Sequence[int]) -> Any:
        """A tensor, or for a text the list of it."""
        assembly, spec = self.assembly, self.assembly.recipe.variables[name]
        if name == assembly.root.name:
            return self.data.pixels(list(rows), assembly.root.shape[-1])
        if isinstance(spec.encoder, FileSpec):
            return self._encoder(name).scale(self._vectors(name)[rows])
        if spec.reads is not None:
            with torch.no_grad():
                return self._encoder(name)(self._compute(spec.reads, rows))
        if spec.kind == "label":
            return torch.tensor(self.data.categories(assembly.columns[name].field)[1])[list(rows)]
        if spec.kind != "text":
            return self.data.column(assembly.columns[name].field)[list(rows)]
        return [self.data.field(assembly.columns[name].field)[row] for row in rows]

    def _read_vectors(self, name: str) -> Features:
        encoder = self._encoder(name)
        assert isinstance(encoder, FileVectors)
        with self.assembly.located():
            return encoder.rows_of(self.data.names)


def oracle(values: DataValues, names: Iterable[str], count: int, seed: int) -> dict[str, Tensor]:
    """The same `count` images' values of several variables; `oracle_rows` chooses the images."""
    rows = oracle_rows(len(values.data), count, seed).tolist()
    return {name: values.of(name, rows) for name in names}


def oracle_rows(total: int, count: int, seed: int) -> Int64[Tensor, " count"]:
    """The image, of `total`, that each sample is made for: whole passes over the data, each in its own order."""
    passes = [generator(seed, "oracle", number).permutation(total) for number in range(-(-count // total))]
    return torch.from_numpy(np.concatenate(passes)[:count])
