"""Embeddings of augmented training images, computed once and kept in memory-mapped shards on disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from chaindiff.data import augment
from chaindiff.data.items import Data
from chaindiff.encoders import Encoder
from chaindiff.encoders.base import fingerprint
from chaindiff.io import tensorfile
from chaindiff.io.errors import UserError
from chaindiff.specs.stage import AugmentSpec

Numbers = Sequence[int] | np.ndarray

SHARD = 4096  # rows of a file: what an interruption can cost


class EmbeddingCache:
    """Features (before they are reduced and scaled) of `spec.variants` augmented variants of every image.

    Variant v of image i is the features of `apply(image, draw(spec, (spec.seed, name of i, v)))`, so that whoever
    draws with the same key sees the image that the embedding belongs to. Where the augmentation does nothing, there is
    one variant, which stands for all. The folder is named after all that the numbers depend on; the rows lie in
    files of 4,096, written under a temporary name and renamed.
    """

    def __init__(self, folder: Path, encoder: Encoder, data: Data, spec: AugmentSpec, size: int):
        if augment.active(spec) and not spec.variants:
            raise ValueError("without variants every training step has images of its own: nothing to cache")
        self.encoder, self.data, self.spec, self.size = encoder, data, spec, size
        self.variants = spec.variants if augment.active(spec) else 1
        drawn = {**spec.model_dump(), "version": augment.VERSION} if augment.active(spec) else None
        self.key = fingerprint([encoder.features_identity, data.digest, drawn, size])
        self.folder = Path(folder) / f"{encoder.name}-{self.key[:16]}"
        self._open: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.data) * self.variants

    @property
    def shards(self) -> range:
        return range(-(-len(self) // SHARD))

    @property
    def complete(self) -> bool:
        return all(self._shard(shard) is not None for shard in self.shards)

    def build(self, batch: int = 128, rank: int = 0, ranks: int = 1) -> Iterator[tuple[int, int]]:
        """Embed what is missing, and yield (rows done, rows in all) as it goes; ranks share the shards out.

        Raises UserError for an image that cannot be read or whose embedding is not finite.
        """
        mine = self.shards[rank::ranks]
        missing = [shard for shard in mine if self._shard(shard) is None]
        total = sum(len(self._rows(shard)) for shard in mine)
        done = total - sum(len(self._rows(shard)) for shard in missing)
        yield done, total
        for shard in missing:
            rows = self._rows(shard)
            parts = []
            for start in range(rows.start, rows.stop, batch):
                parts.append(self._embed(range(start, min(start + batch, rows.stop))))
                done += len(parts[-1])
                if start + batch >= rows.stop:  # rows count as done for good once their file is there
                    metadata = {"key": self.key, "encoder": self.encoder.features_identity}
                    tensorfile.save(self._path(shard), {"features": torch.cat(parts)}, metadata)
                yield done, total

    def rows(self, indices: Numbers, variants: Numbers) -> Float[Tensor, "n width"]:
        """Features of these variants of these images. Raises UserError if they are not built."""
        wanted = np.asarray(indices, np.int64) * self.variants + np.asarray(variants, np.int64) % self.variants
        out = torch.empty(len(wanted), self.width)
        for shard in np.unique(wanted // SHARD).tolist():
            here = torch.from_numpy(np.flatnonzero(wanted // SHARD == shard))
            out[here] = self._features(shard)[torch.from_numpy(wanted)[here] % SHARD]
        return out

    def chunks(self) -> Iterator[Tensor]:
        """All features [rows, width], a shard at a time."""
        return (self._features(shard) for shard in self.shards)

    @cached_property
    def width(self) -> int:
        return self._features(0).shape[1]

    def _embed(self, rows: range) -> Float[Tensor, "rows width"]:
        indices, variants = zip(*(divmod(row, self.variants) for row in rows), strict=True)
        images = self.data.pixels(indices, self.size)
        if augment.active(self.spec):
            keys = [(self.spec.seed, self.data.names[i], v) for i, v in zip(indices, variants, strict=True)]
            images = augment.apply(images, augment.draw(self.spec, keys))
        with torch.inference_mode():
            features = self.encoder.features(images).float().cpu()
        finite = features.isfinite().all(1)
        if not finite.all():
            name = self.data.names[indices[int((~finite).nonzero()[0])]]
            raise UserError(f"the embedding '{self.encoder.name}' of the image '{name}' is not finite")
        return features

    def _rows(self, shard: int) -> range:
        return range(shard * SHARD, min((shard + 1) * SHARD, len(self)))

    def _path(self, shard: int) -> Path:
        return self.folder / f"{shard:06d}.safetensors"

    def _features(self, shard: int) -> Tensor:
        features = self._shard(shard)
        if features is None:
            message = f"the embedding cache {self.folder} is not complete: shard {shard} is missing"
            raise UserError(message, hint="run the same training command again: it embeds what is missing")
        return features

    def _shard(self, shard: int) -> Tensor | None:
        """The features of a shard, mapped into memory; None if the file is missing, cut short or another's."""
        if shard not in self._open:
            try:
                with safe_open(self._path(shard), "pt") as file:
                    features = file.get_tensor("features")
                    if (file.metadata() or {}).get("key") != self.key or len(features) != len(self._rows(shard)):
                        return None
            except (SafetensorError, OSError):
                return None
            self._open[shard] = features
        return self._open[shard]
