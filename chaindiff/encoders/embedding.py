"""What encoders of embeddings share: reduction and standardisation, with statistics fitted once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from einops import rearrange
from jaxtyping import Float, Int64
from torch import Tensor

from chaindiff.encoders.base import Encoder
from chaindiff.encoders.kmeans import nearest
from chaindiff.encoders.statistics import Statistics
from chaindiff.io.errors import UserError
from chaindiff.specs.recipe import FileSpec, KMeansSpec, OpenClipSpec, PcaSpec


class Embedding(Encoder):
    """Embeddings by row or by model; `kind` is the variable's: a vector, a map, or a label, whose classes are clusters.

    Of a map, what is fitted and applied is that of its channels: every position is a row.
    """

    def __init__(self, name: str, spec: OpenClipSpec | FileSpec, shape: Sequence[int], sigma_data: float, kind: str):
        self.name, self.spec, self.shape, self.sigma_data = name, spec, list(shape), sigma_data
        self.labels, self.maps = kind == "label", kind == "map"
        self.statistics: Statistics | None = None

    @property
    def positions(self) -> int:
        """Rows that one embedding counts as where statistics are fitted."""
        return math.prod(self.shape[1:])

    def check_shape(self, width: int, whose: str, grid: Sequence[int] = ()) -> None:
        """Raises UserError if the variable's shape does not fit embeddings of `width` numbers, on a grid for a map."""
        made = f"{whose} {{}} {'channels' if self.maps else 'numbers'}"
        if isinstance(self.spec.reduce, PcaSpec):
            width, made = self.spec.reduce.k, "the embedding reduced to {} numbers"
        elif self.labels and isinstance(self.spec.reduce, KMeansSpec):
            width, made = self.spec.reduce.k, "its embeddings have {} clusters"
        if self.shape != (fits := [width, *grid]):
            on = f" on a grid of {' x '.join(map(str, grid))}" if grid else ""
            raise UserError(
                f"variable '{self.name}' has shape {self.shape}, but {made.format(width)}{on}",
                f"variables.{self.name}.shape",
                f"set shape: {fits}",
            )

    @property
    def fitted(self) -> bool:
        return self.statistics is not None or (self.spec.reduce is None and self.spec.scaling == "raw")

    def scale(self, features: Float[Tensor, "n width *grid"]) -> Float[Tensor, "n k *grid"] | Int64[Tensor, " n"]:
        """Reduced as the recipe specifies: principal components, the nearest centroid, or for a label its index.

        Every entry then has standard deviation `sigma_data` unless `raw`.
        """
        if self.statistics is None:
            if not self.fitted:
                raise UserError(f"the statistics of variable '{self.name}' are not fitted yet")
            return features
        return on_rows(self._scaled, features)

    def _scaled(self, features: Float[Tensor, "n width"]) -> Float[Tensor, "n k"] | Int64[Tensor, " n"]:
        fitted = self._fitted(features)
        if "centroids" in fitted:
            classes = nearest(features, fitted["centroids"])
            if self.labels:
                return classes
            features = fitted["centroids"][classes]
        values = features - fitted["mean"]
        if "components" in fitted:
            values = values @ fitted["components"].T
        return values if self.spec.scaling == "raw" else values * (self.sigma_data / fitted["std"])

    def features_of(self, values: Float[Tensor, "n k *grid"]) -> Float[Tensor, "n width *grid"]:
        """The features that `scale` takes to these values, in the span of the components: what a decoder reads."""
        return values if self.statistics is None else on_rows(self._unscaled, values)

    def _unscaled(self, values: Float[Tensor, "n k"]) -> Float[Tensor, "n width"]:
        fitted = self._fitted(values)
        values = values if self.spec.scaling == "raw" else values * (fitted["std"] / self.sigma_data)
        return fitted["mean"] + (values @ fitted["components"] if "components" in fitted else values)

    def _fitted(self, like: Tensor) -> dict[str, Tensor]:
        assert self.statistics is not None
        return {name: tensor.to(like) for name, tensor in self.statistics.tensors().items()}

    @property
    def reduction(self) -> dict[str, Any]:
        """What is fitted: the reducer and whether the result is standardised."""
        return {"reduce": self.spec.reduce and self.spec.reduce.model_dump(), "scaling": self.spec.scaling}


def rows(features: Float[Tensor, "n width *grid"]) -> Float[Tensor, "m width"]:
    """Vectors as they are; of maps the channels at every position."""
    return rearrange(features, "n c h w -> (n h w) c") if features.ndim == 4 else features


def on_rows(change: Callable[[Tensor], Tensor], features: Float[Tensor, "n width *grid"]) -> Tensor:
    """A change of vectors, of maps at every position."""
    if features.ndim != 4:
        return change(features)
    return rearrange(change(rows(features)), "(n h w) c -> n c h w", h=features.shape[2], w=features.shape[3])
