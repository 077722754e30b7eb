"""What encoders of embeddings share: reduction and standardisation, with statistics fitted once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float, Int64
from torch import Tensor

from chaindiff.encoders.base import Encoder
from chaindiff.encoders.kmeans import nearest
from chaindiff.encoders.statistics import Statistics
from chaindiff.io.errors import UserError
from chaindiff.specs.recipe import FileSpec, KMeansSpec, OpenClipSpec, PcaSpec


class Embedding(Encoder):
    """Embeddings by row or by model; `kind` is the variable's: a vector, or a label, whose classes are clusters."""

    def __init__(self, name: str, spec: OpenClipSpec | FileSpec, shape: Sequence[int], sigma_data: float, kind: str):
        self.name, self.spec, self.shape, self.sigma_data = name, spec, list(shape), sigma_data
        self.labels = kind == "label"
        self.statistics: Statistics | None = None

    def check_shape(self, width: int, whose: str) -> None:
        """Raises UserError if the variable's shape does not fit embeddings of `width` numbers."""
        made = f"{whose} {{}} numbers"
        if isinstance(self.spec.reduce, PcaSpec):
            width, made = self.spec.reduce.k, "the embedding reduced to {} numbers"
        elif self.labels and isinstance(self.spec.reduce, KMeansSpec):
            width, made = self.spec.reduce.k, "its embeddings have {} clusters"
        if self.shape != [width]:
            raise UserError(
                f"variable '{self.name}' has shape {self.shape}, but {made.format(width)}",
                f"variables.{self.name}.shape",
                f"set shape: [{width}]",
            )

    @property
    def fitted(self) -> bool:
        return self.statistics is not None or (self.spec.reduce is None and self.spec.scaling == "raw")

    def scale(self, features: Float[Tensor, "n width"]) -> Float[Tensor, "n k"] | Int64[Tensor, " n"]:
        """Reduced as the recipe specifies: principal components, the nearest centroid, or for a label its index.

        Every entry then has standard deviation `sigma_data` unless `raw`.
        """
        if self.statistics is None:
            if not self.fitted:
                raise UserError(f"the statistics of variable '{self.name}' are not fitted yet")
            return features
        fitted = {name: tensor.to(features) for name, tensor in self.statistics.tensors().items()}
        if "centroids" in fitted:
            classes = nearest(features, fitted["centroids"])
            if self.labels:
                return classes
            features = fitted["centroids"][classes]
        values = features - fitted["mean"]
        if "components" in fitted:
            values = values @ fitted["components"].T
        return values if self.spec.scaling == "raw" else values * (self.sigma_data / fitted["std"])

    @property
    def reduction(self) -> dict[str, Any]:
        """What is fitted: the reducer and whether the result is standardised."""
        return {"reduce": self.spec.reduce and self.spec.reduce.model_dump(), "scaling": self.spec.scaling}
