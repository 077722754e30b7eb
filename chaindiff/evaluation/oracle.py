"""Ground-truth values of a chain's variables, which replace a stage to measure what it costs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from chaindiff.data import open_data
from chaindiff.data.items import Data
from chaindiff.edm.random import generator
from chaindiff.encoders import Encoder, FileVectors
from chaindiff.io.digest import digest
from chaindiff.io.errors import UserError
from chaindiff.io.progress import shown
from chaindiff.io.shards import Shards
from chaindiff.recipe.assembly import Assembly
from chaindiff.specs.recipe import DataSpec
from chaindiff.specs.training import AugmentSpec
from chaindiff.training.batches import Batches, Features

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
        self._batches = cache(self._read)

    def of(self, name: str, rows: Sequence[int]) -> Tensor:
        """A variable's values for some rows; encoders' outputs are cached, except images."""
        variable, batches = self.assembly.variables[name], self._batches(name)
        if variable.kind == "image" or name not in self.assembly.encoders:
            return batches.values([name], rows)[name]
        encoder = self.assembly.encoders[name]
        key = digest([variable.identity, encoder.digest, encoder.files, self.data.content, len(self.data)])
        store = Shards(self.folder / f"{name}-{key}", key, len(self.data))
        shown(f"encode {name}", store.fill(lambda some: {"values": batches.values([name], some)[name]}, BATCH))
        return store["values"][rows]

    def _read(self, name: str) -> Batches:
        """What reads a variable from the data, through its encoders."""
        assembly, encoders, caches, at = self.assembly, dict[str, Encoder](), dict[str, Features](), name
        if assembly.variables[name].kind == "text":
            raise UserError(f"a text cannot be sampled from; ask for an encoding of '{name}'")
        while at is not None and at in assembly.encoders:
            encoders[at] = encoder = assembly.encoders[at].build()
            if isinstance(encoder, FileVectors):
                with assembly.located():
                    caches[at] = encoder.rows_of(self.data.names)
            at = assembly.recipe.variables[at].reads
        read = [] if at is None else [assembly.variables[at]]
        root = next((variable for variable in read if variable.kind == "image"), None)  # no encoder makes it
        fields = {name: column.field for name, column in assembly.columns.items()}
        wanted, plainly = [assembly.variables[name]], AugmentSpec(flip=False)
        return Batches(self.data, root, wanted, encoders, caches, fields, plainly, 0, read)


def oracle(values: DataValues, names: Iterable[str], count: int, seed: int) -> dict[str, Tensor]:
    """The same `count` images' values of several variables; `oracle_rows` chooses the images."""
    rows = oracle_rows(len(values.data), count, seed).tolist()
    return {name: values.of(name, rows) for name in names}


def oracle_rows(total: int, count: int, seed: int) -> Int64[Tensor, " count"]:
    """The image, of `total`, that each sample is made for: whole passes over the data, each in its own order."""
    passes = [generator(seed, "oracle", number).permutation(total) for number in range(-(-count // total))]
    return torch.from_numpy(np.concatenate(passes)[:count])
