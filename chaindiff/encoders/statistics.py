"""Statistics of an encoder's features, stored in a file: principal components or clusters, and standardisation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Float64, Int64
from safetensors import SafetensorError, safe_open
from torch import Tensor

from chaindiff.encoders.kmeans import Chunks, cluster
from chaindiff.encoders.moments import Moments
from chaindiff.io.digest import fingerprint
from chaindiff.io.errors import UserError
from chaindiff.io.files import regular_path

if TYPE_CHECKING:
    import chaindiff.encoders.embedding

FORMAT = "chaindiff-fitted/1"


@dataclass(frozen=True)
class Statistics:
    """Mean of the features, their reducer, and the standard deviation of the result.

    A reducer is principal components (orthonormal rows), or the centroids of clusters with the number of training rows
    in each; with clusters, mean and deviation are those of the centroids in place of the features.
    A dimension that never varies has deviation 1 here: its value is 0 whatever the divisor.
    """

    mean: Float[Tensor, " width"]
    std: Float[Tensor, " k"]
    components: Float[Tensor, "k width"] | None = None
    centroids: Float[Tensor, "clusters width"] | None = None
    counts: Int64[Tensor, " clusters"] | None = None

    @classmethod
    def fit(cls, chunks: Iterable[Tensor], k: int | None) -> tuple[Statistics, float]:
        """Statistics of the rows of all chunks [rows, width], and the share of the variance that k components explain.

        In float64, from the mean and the covariance, so that memory holds one chunk. The components have the sign that
        makes their largest entry positive. Raises UserError for fewer rows or dimensions than components.
        """
        moments = Moments.over(chunks)
        rows, mean, covariance = moments.count, moments.mean, moments.scatter / max(moments.count, 1)
        if k is None:
            return cls(mean.float(), _nonzero(covariance.diagonal().sqrt())), 1.0
        if k > min(covariance.shape[-1], rows - 1):
            raise UserError(
                f"{k} principal components cannot be fitted to {rows} embeddings of {covariance.shape[-1]} numbers",
                hint="choose a smaller k, or none: reduce: null",
            )
        _, variance, vectors = torch.linalg.svd(covariance)  # in descending order, directions as rows
        vectors = vectors * vectors.gather(1, vectors.abs().argmax(1, keepdim=True)).sign()
        share = (variance[:k].sum() / variance.sum()).item() if variance.sum() > 0 else 1.0
        return cls(mean.float(), _nonzero(variance[:k].sqrt()), vectors[:k].float().contiguous()), share

    @classmethod
    def fit_clusters(cls, chunks: Chunks, k: int, seed: int) -> tuple[Statistics, float]:
        """Statistics of k clusters of all rows, and the share of the variance that lies between them.

        Raises UserError for fewer distinct rows than clusters.
        """
        found = cluster(chunks, k, seed)
        rows, centroids = found.counts.sum(), found.centroids.double()
        mean = found.counts.double() @ centroids / rows
        variance = found.counts.double() @ (centroids - mean).square() / rows
        within = found.inertia / rows.item()
        share = variance.sum().item() / (variance.sum().item() + within) if variance.sum() > 0 else 1.0
        fitted = cls(mean.float(), _nonzero(variance.sqrt()), centroids=found.centroids, counts=found.counts)
        return fitted, share

    def tensors(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    @property
    def digest(self) -> str:
        """sha256 of the numbers."""
        hashed = hashlib.sha256()
        for name, tensor in sorted(self.tensors().items()):
            hashed.update(f"{name}{list(tensor.shape)}".encode() + tensor.cpu().numpy().tobytes())
        return hashed.hexdigest()

    @staticmethod
    def belongs_to(encoder: chaindiff.encoders.embedding.Embedding) -> str:
        """What a file must agree on with an encoder: the features, the reducer and the scaling."""
        return fingerprint([encoder.features_identity, encoder.reduction])

    @classmethod
    def load(cls, path: Path, encoder: chaindiff.encoders.embedding.Embedding) -> Statistics:
        """Read a file that was fitted for this encoder. Raises UserError if it is missing, damaged or mismatched."""
        hint = f"fit it again: remove the file and train a stage that uses '{encoder.name}'"
        try:
            with safe_open(regular_path(path), "pt") as file:
                metadata = file.metadata() or {}
                statistics = cls(**{name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except FileNotFoundError as error:
            raise UserError(
                f"variable '{encoder.name}' needs statistics of its embeddings, and there is no {path}",
                f"variables.{encoder.name}.encoder",
                "training a stage that uses it fits them",
            ) from error
        except (SafetensorError, OSError, TypeError) as error:
            raise UserError(f"not a complete file of fitted statistics: {error}", str(path), hint) from error
        if metadata.get("format") != FORMAT or metadata.get("encoder") != cls.belongs_to(encoder):
            message = f"these statistics were not fitted for the encoder of '{encoder.name}'"
            differs = "its model, weights, preprocessing, reducer or scaling differs"
            raise UserError(message, str(path), f"{differs}; {hint}")
        if metadata.get("digest") != statistics.digest:
            raise UserError("the statistics are damaged: their digest does not match", str(path), hint)
        return statistics


def _nonzero(std: Float64[Tensor, " k"]) -> Float[Tensor, " k"]:
    return torch.where(std > 1e-7 * std.max(), std, torch.ones_like(std)).float()
