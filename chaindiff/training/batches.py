"""Training batches of a chain: variables of augmented images, each sample a pure function of (seed, image number)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from chaindiff.chain.variable import Variable
from chaindiff.data import augment
from chaindiff.data.items import Data
from chaindiff.edm.random import generator
from chaindiff.encoders import Encoder
from chaindiff.io.errors import UserError
from chaindiff.specs.stage import AugmentSpec


@runtime_checkable
class Features(Protocol):
    """An encoder's features of the data, as rows of a tensor: one for each image, or all its variants in turn."""

    def __len__(self) -> int: ...
    def __getitem__(self, rows: Any, /) -> Tensor: ...
    def split(self, rows: int, /) -> Iterable[Tensor]: ...


class Batches:
    """Sample numbers -> the values of some variables, and the augmentation labels under "augment_labels".

    `root` is the image variable that the data holds, if any is wanted; what `encoders` make comes of it, expensive ones
    through `caches`. Everything else is a column of the data: of its own name, unless `fields` says another.
    """

    def __init__(
        self,
        data: Data,
        root: Variable | None,
        wanted: Iterable[Variable],
        encoders: Mapping[str, Encoder],
        caches: Mapping[str, Features],
        fields: Mapping[str, str],
        spec: AugmentSpec,
        seed: int,
    ):
        self.data, self.root, self.encoders, self.caches = data, root, encoders, caches
        self.wanted, self.spec, self.seed = list(wanted), spec, seed
        self.columns = {
            v.name: _column(data, v, fields.get(v.name, v.name))
            for v in self.wanted
            if v.name not in encoders and v.name != (root and root.name)
        }
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def rows(self, samples: Iterable[int]) -> list[int]:
        """Rows of the data: a new order every epoch, a function of (seed, epoch)."""
        rows = []
        for sample in samples:
            epoch, place = divmod(sample, len(self.data))
            if epoch != self._epoch:
                self._epoch, self._order = epoch, generator(self.seed, "order", epoch).permutation(len(self.data))
            rows.append(int(self._order[place]))
        return rows

    def __call__(self, samples: list[int]) -> dict[str, Tensor]:
        rows = self.rows(samples)
        if self.spec.variants:
            variants = [int(generator(self.seed, "variant", s).integers(self.spec.variants)) for s in samples]
            keys = [(self.spec.seed, self.data.names[row], v) for row, v in zip(rows, variants, strict=True)]
        else:
            variants, keys = [0] * len(rows), [(self.seed, "augment", sample) for sample in samples]
        drawn = augment.draw(self.spec, keys)
        values: dict[str, Tensor] = {}

        def value(name: str) -> Tensor:
            if name not in values:
                values[name] = compute(name)
            return values[name]

        def compute(name: str) -> Tensor:
            if name in self.columns:
                return self.columns[name][rows]
            if self.root is not None and name == self.root.name:
                return augment.apply(self.data.pixels(rows, self.root.shape[-1]), drawn)
            encoder = self.encoders[name]
            if name in self.caches:
                features = self.caches[name]
                each = len(features) // len(self.data)
                return encoder.scale(features[[r * each + v % each for r, v in zip(rows, variants, strict=True)]])
            return encoder(value(encoder.of))

        batch = {v.name: value(v.name) for v in self.wanted}
        if drawn.label.shape[1]:
            batch["augment_labels"] = drawn.label
        return batch


def _column(data: Data, variable: Variable, field: str) -> Tensor:
    """A variable's value in every row of the data."""
    if variable.kind == "label":
        values = torch.tensor(data.categories(field)[1])
        if (most := int(values.max())) >= variable.shape[0]:
            message = f"label '{variable.name}' has {variable.shape[0]} classes, but its data counts up to {most}"
            raise UserError(message, hint=f"set its shape to [{most + 1}] or more: classes count from 0")
        return values
    if variable.kind not in ("vector", "tokens"):
        raise UserError(f"'{variable.name}' is no image that the data is about, and no encoder makes it")
    values = data.column(field)
    if tuple(values.shape[1:]) != variable.shape:
        shape = list(values.shape[1:])
        raise UserError(
            f"'{field}' of the data has shape {shape}, but variable '{variable.name}' {list(variable.shape)}"
        )
    return values
