"""Embeddings by the towers of an open_clip model, reduced and standardised as the recipe says."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from chaindiff.encoders.base import Encoder
from chaindiff.encoders.clip_files import find
from chaindiff.encoders.kmeans import nearest
from chaindiff.encoders.resize import resize
from chaindiff.encoders.statistics import Statistics
from chaindiff.specs.errors import UserError
from chaindiff.specs.recipe import KMeansSpec, OpenClipSpec, PcaSpec

BATCH = 256  # inputs embedded at once


class OpenClip(Encoder):
    """One tower of an open_clip model. The model loads when it is first used; its identity needs its files alone."""

    tower: str
    cached = True

    def __init__(
        self,
        name: str,
        spec: OpenClipSpec,
        source: Sequence[int],
        shape: Sequence[int],
        sigma_data: float,
        kind: str = "vector",
        device: str | torch.device | None = None,
    ):
        """`kind` is that of the variable: a vector, or a label, whose classes are clusters of embeddings."""
        self.name, self.of, self.spec, self.source, self.sigma_data = name, spec.of, spec, source, sigma_data
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.files = find(spec, f"variables.{name}.encoder")
        self.statistics: Statistics | None = None
        self.labels = kind == "label"
        if isinstance(spec.reduce, PcaSpec):
            width, made = spec.reduce.k, "the embedding reduced to {} numbers"
        elif self.labels and isinstance(spec.reduce, KMeansSpec):
            width, made = spec.reduce.k, "its embeddings have {} clusters"
        else:
            width, made = self.files.width, "the embedding of the model has {} numbers"
        if list(shape) != [width]:
            raise UserError(
                f"variable '{name}' has shape {list(shape)}, but {made.format(width)}",
                f"variables.{name}.shape",
                f"set shape: [{width}]",
            )

    @cached_property
    def model(self) -> Any:
        """The open_clip model, in float32 and eval mode, without gradients for its weights."""
        try:
            model = self.files.create()
        except UserError:
            raise
        except Exception as error:  # open_clip raises many kinds for files that do not fit a model
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"open_clip cannot load '{self.spec.model}' from {self.files.weights}: {reason}",
                f"variables.{self.name}.encoder",
                "the weights may belong to another model, or the file may be incomplete",
            ) from error
        return model.float().eval().requires_grad_(False).to(self.device)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """The model's own, but for the resizing filter if the recipe names one."""
        named = {"interpolation": self.spec.interpolation} if self.spec.interpolation else {}
        return {**self.files.preprocessing, **named}

    # -- values

    @property
    def fitted(self) -> bool:
        return self.statistics is not None or (self.spec.reduce is None and self.spec.scaling == "raw")

    def scale(self, features: Float[Tensor, "n width"]) -> Float[Tensor, "n k"] | Int64[Tensor, " n"]:
        """Reduced as the recipe says: principal components, the nearest centroid, or for a label its number.

        Then every number has deviation `sigma_data` unless `raw`.
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

    def unscale(self, values: Float[Tensor, "n k"] | Int64[Tensor, " n"]) -> Float[Tensor, "n width"]:
        """Features with these values: the inverse of `scale`, up to what the reducer left out."""
        if self.statistics is None:
            return values
        if self.labels and self.statistics.centroids is not None:
            return self.statistics.centroids.to(values.device)[values]
        fitted = {name: tensor.to(values) for name, tensor in self.statistics.tensors().items()}
        if self.spec.scaling != "raw":
            values = values * (fitted["std"] / self.sigma_data)
        if "components" in fitted:
            values = values @ fitted["components"]
        return values + fitted["mean"]

    # -- identity

    @cached_property
    def features_identity(self) -> dict[str, Any]:
        return {
            "kind": "open_clip",
            "tower": self.tower,
            "model": self.files.config,
            "weights": self.files.digest,
            "preprocessing": self.preprocessing,
            "input": list(self.source),
        }

    @property
    def reduction(self) -> dict[str, Any]:
        """What is fitted: the reducer and whether the result is standardised."""
        return {"reduce": self.spec.reduce and self.spec.reduce.model_dump(), "scaling": self.spec.scaling}

    @property
    def identity(self) -> dict[str, Any]:
        fitted = self.statistics and self.statistics.digest
        return {**self.features_identity, **self.reduction, "sigma_data": self.sigma_data, "fitted": fitted}


class OpenClipImage(OpenClip):
    """image in [-1, 1] -> embedding, as `encode_image` gives it: not normalised."""

    tower = "image"

    def preprocess(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 side side"]:
        """What the model's own transforms make of an image file, but for their rounding to whole levels."""
        size = self.model.visual.image_size
        side = size if isinstance(size, int) else size[0]
        own = self.preprocessing
        mean, std = (torch.tensor(own[name], device=images.device)[:, None, None] for name in ("mean", "std"))
        return ((resize(images, side, own["interpolation"]) + 1) / 2 - mean) / std

    def features(self, x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n width"]:
        out = [self.model.encode_image(self.preprocess(part.to(self.device))) for part in x.float().split(BATCH)]
        return torch.cat(out).to(x.device)


class OpenClipText(OpenClip):
    """text -> embedding, as `encode_text` gives it: not normalised."""

    tower = "text"

    @cached_property
    def tokenizer(self) -> Any:
        return self.files.tokenizer()

    def features(self, x: Sequence[str]) -> Float[Tensor, "n width"]:
        parts = [list(x[start : start + BATCH]) for start in range(0, len(x), BATCH)]
        return torch.cat([self.model.encode_text(self.tokenizer(part).to(self.device)) for part in parts]).cpu()
