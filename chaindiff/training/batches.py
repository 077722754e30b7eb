"""Training batches of a chain: variables of augmented images, each sample a pure function of (seed, image number)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from chaindiff.chain.chain import Encoder
from chaindiff.chain.variable import Variable
from chaindiff.data import augment
from chaindiff.data.items import Data
from chaindiff.edm.random import Draws, generator
from chaindiff.io.errors import UserError
from chaindiff.io.progress import Bar
from chaindiff.specs.training import AugmentSpec

ENCODED_AT_ONCE = 128


@runtime_checkable
class Features(Protocol):
    """An encoder's features of the data, as rows of a tensor: one for each image, or all its variants in turn."""

    def __len__(self) -> int: ...
    def __getitem__(self, rows: Any, /) -> Tensor: ...
    def split(self, rows: int, /) -> Iterable[Tensor]: ...


class Batches:
    """Sample numbers -> the values of some variables, and the augmentation labels under "augment_labels".

    `root` is the image variable that the data holds, if any is wanted. `encoders` compute their variables from it, from
    whatever else they `read` of the data, or from their cached features in `caches`. Everything else is a column of the
    data, under its own name unless `fields` has another.
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
        read: Sequence[Variable] = (),
    ):
        self.data, self.root, self.encoders, self.caches = data, root, encoders, caches
        self.kept: dict[str, Tensor] = {}
        self.wanted, self.spec, self.seed = list(wanted), spec, seed
        self.columns: dict[str, Tensor | list[str]] = {}
        fixed = [v.name for v in self.wanted if v.kind == "map" and (v.name not in encoders or not encoders[v.name].of)]
        if root is not None and fixed and augment.active(spec):
            message = (
                f"the map '{fixed[0]}' does not follow the augmentation of '{root.name}': it is not computed from it"
            )
            raise UserError(message, hint="train without augmentation: augment: {flip: false}")
        texts = {v.name for v in read if v.kind == "text"}
        for v in [*self.wanted, *read]:
            if v.name not in {*encoders, *self.columns, root and root.name}:
                field = fields.get(v.name, v.name)
                self.columns[v.name] = data.field(field) if v.name in texts else _column(data, v, field)
        order = lru_cache(2)  # safe between threads
        self._order = order(lambda epoch: generator(seed, "order", epoch).permutation(len(data)))

    def keep(self, names: Iterable[str]) -> None:
        """Compute these encoders' outputs for every row and hold them in memory: augmentation must not change them."""
        for name in names:
            with Bar(f"encode {name}", len(self.data)) as bar:
                parts: list[Tensor] = []
                for first in range(0, len(self.data), ENCODED_AT_ONCE):
                    rows = range(first, min(first + ENCODED_AT_ONCE, len(self.data)))
                    parts.append(self.values([name], rows)[name].cpu())
                    bar.update(rows.stop)
            self.kept[name] = torch.cat(parts)

    def rows(self, samples: Iterable[int]) -> list[int]:
        """Rows of the data: a new order every epoch, a function of (seed, epoch)."""
        rows = []
        for sample in samples:
            epoch, place = divmod(sample, len(self.data))
            rows.append(int(self._order(epoch)[place]))
        return rows

    def __call__(self, samples: list[int]) -> dict[str, Tensor]:
        rows = self.rows(samples)
        if self.spec.variants:
            variants = Draws(samples, self.seed, "variant").integers(below=self.spec.variants).tolist()
            keys = [(self.spec.seed, self.data.names[row], v) for row, v in zip(rows, variants, strict=True)]
        else:
            variants, keys = [0] * len(rows), [(self.seed, "augment", sample) for sample in samples]
        drawn = augment.draw(self.spec, keys)
        batch = self.values([v.name for v in self.wanted], rows, variants, drawn)
        if drawn.label.shape[1]:
            batch["augment_labels"] = drawn.label
        return batch

    @torch.no_grad()
    def values(
        self, names: Iterable[str], rows: Sequence[int], variants: Sequence[int] = (), drawn: augment.Draw | None = None
    ) -> dict[str, Tensor]:
        """Variables for rows of the data, in these variants of the rows, with their images augmented if they are."""
        variants = variants or [0] * len(rows)

        @cache
        def value(name: str) -> Any:
            if (column := self.columns.get(name)) is not None:
                return column[list(rows)] if isinstance(column, Tensor) else [column[row] for row in rows]
            if self.root is not None and name == self.root.name:
                images = self.data.pixels(rows, self.root.shape[-1], self.root.shape[0])
                return images if drawn is None else augment.apply(images, drawn)
            if name in self.kept:
                return self.kept[name][list(rows)]
            encoder: Any = self.encoders[name]
            if name in self.caches:
                features = self.caches[name]
                each = len(features) // len(self.data)
                return encoder.scale(features[[r * each + v % each for r, v in zip(rows, variants, strict=True)]])
            return encoder(value(encoder.of))

        return {name: value(name) for name in names}


def pictures(variable: Variable) -> bool:
    """Whether a variable is an RGB image, as image data holds them; other images are columns of numbers."""
    return variable.kind == "image" and variable.shape[0] == 3


def _column(data: Data, variable: Variable, field: str) -> Tensor:
    """A variable's value in every row of the data."""
    if variable.kind == "label":
        values = torch.tensor(data.categories(field, variable.shape[0])[1])
        if (most := int(values.max())) >= variable.shape[0]:
            message = f"label '{variable.name}' has {variable.shape[0]} classes, but the data has labels up to {most}"
            raise UserError(message, hint=f"set its shape to [{most + 1}] or more: classes count from 0")
        return values
    if pictures(variable) or variable.kind == "text":
        raise UserError(f"'{variable.name}' is not the data's own image, and no encoder makes it")
    values = data.column(field)
    if tuple(values.shape[1:]) != variable.shape:
        shape = list(values.shape[1:])
        raise UserError(
            f"'{field}' of the data has shape {shape}, but variable '{variable.name}' {list(variable.shape)}"
        )
    if variable.kind == "image" and not bool((values.abs() <= 1).all()):
        raise UserError(f"'{field}' of the data holds numbers outside [-1, 1], the range of images")
    return values
