"""Embeddings of augmented training images, computed once and cached on disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from chaindiff.data import augment
from chaindiff.data.items import Data
from chaindiff.encoders import Encoder
from chaindiff.io.digest import fingerprint
from chaindiff.io.errors import UserError
from chaindiff.io.shards import Shards
from chaindiff.specs.training import AugmentSpec

SHARD = 4096  # rows per file: the most that an interruption can lose


class EmbeddingCache(Shards):
    """`features` (before they are reduced and scaled) of `spec.variants` augmented variants of every image.

    Variant v of image i is the features of `apply(image, draw(spec, (spec.seed, name of i, v)))`, so that drawing with
    the same key reproduces the image that the embedding belongs to; it is row i * variants + v. Where the augmentation
    does nothing, there is one variant, which stands for all.
    """

    def __init__(self, folder: Path, encoder: Encoder, data: Data, spec: AugmentSpec, size: int):
        if augment.active(spec) and not spec.variants:
            raise ValueError("without variants every training step has new images: nothing to cache")
        self.encoder, self.data, self.spec, self.side = encoder, data, spec, size
        self.variants = spec.variants if augment.active(spec) else 1
        drawn = {**spec.model_dump(), "version": augment.VERSION} if augment.active(spec) else None
        key = fingerprint([encoder.features_identity, data.digest, drawn, size])
        rows = max(SHARD // getattr(encoder, "positions", 1), min(SHARD, 64))
        super().__init__(folder / f"{encoder.name}-{key[:16]}", key, len(data) * self.variants, rows)

    def build(self, batch: int = 128, mine: Sequence[range] | None = None) -> Iterator[tuple[int, int]]:
        """`fill`. Raises UserError for an image that cannot be read or whose embedding is not finite."""
        return self.fill(self._embed, batch, mine)

    def _embed(self, rows: range) -> dict[str, Tensor]:
        indices, variants = zip(*(divmod(row, self.variants) for row in rows), strict=True)
        images = self.data.pixels(indices, self.side)
        if augment.active(self.spec):
            keys = [(self.spec.seed, self.data.names[i], v) for i, v in zip(indices, variants, strict=True)]
            images = augment.apply(images, augment.draw(self.spec, keys))
        with torch.inference_mode():
            features = self.encoder.features(images).float().cpu()
        finite = features.flatten(1).isfinite().all(1)
        if not finite.all():
            name = self.data.names[indices[int((~finite).nonzero()[0])]]
            raise UserError(f"the embedding '{self.encoder.name}' of the image '{name}' is not finite")
        return {"features": features}
