"""Fit an encoder's reducer and standardisation to the training data."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from chaindiff.encoders import Embedding, Statistics
from chaindiff.encoders.embedding import rows
from chaindiff.encoders.statistics import FORMAT
from chaindiff.io import tensorfile
from chaindiff.specs.recipe import KMeansSpec
from chaindiff.training.batches import Features

CHUNK = 4096  # rows in memory at once


def fit(encoder: Embedding, features: Features, path: Path) -> Path:
    """Fit the statistics on all features, write them to `path` and give them to the encoder.

    Raises UserError if the features are not complete, or too few for the reducer.
    """
    reduce = encoder.spec.reduce

    def chunks() -> Iterable[Tensor]:
        return map(rows, features.split(max(CHUNK // encoder.positions, 1)))

    if isinstance(reduce, KMeansSpec):
        statistics, explained = Statistics.fit_clusters(chunks, reduce.k, reduce.seed)
    else:
        statistics, explained = Statistics.fit(chunks(), reduce.k if reduce else None)
    metadata = {
        "format": FORMAT,
        "encoder": Statistics.belongs_to(encoder),
        "digest": statistics.digest,
        "identity": {**encoder.features_identity, **encoder.reduction},
        "rows": len(features),
        "explained": round(explained, 6),
    }
    tensorfile.save(path, statistics.tensors(), metadata)
    encoder.statistics = statistics
    return path
