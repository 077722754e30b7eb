"""Embeddings by the towers of an open_clip model, reduced and standardised as the recipe specifies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from chaindiff.encoders.clip_files import find
from chaindiff.encoders.embedding import Embedding
from chaindiff.encoders.resize import resize
from chaindiff.io.errors import UserError
from chaindiff.specs.recipe import OpenClipSpec

BATCH = 256  # inputs embedded at once


class OpenClip(Embedding):
    """One tower of an open_clip model. The model loads on first use; its identity needs only its files."""

    spec: OpenClipSpec
    tower: str

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
        super().__init__(name, spec, shape, sigma_data, kind)
        self.of, self.source = spec.of, source
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.files = find(spec, f"variables.{name}.encoder")
        if not self.maps:  # of which nothing but the model says how many channels it has
            self.check_shape(self.files.width, "the embedding of the model has")

    @cached_property
    def model(self) -> Any:
        """The open_clip model, in float32 and eval mode, without gradients for its weights."""
        return self._loaded(self.files.create).float().eval().requires_grad_(False).to(self.device)

    def _loaded(self, load: Callable[[], Any]) -> Any:
        try:
            return load()
        except UserError:
            raise
        except Exception as error:  # open_clip raises many types for files that do not fit a model
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"open_clip cannot load '{self.spec.model}' from {self.files.weights}: {reason}",
                f"variables.{self.name}.encoder",
                "the weights may belong to another model, or the file may be incomplete",
            ) from error

    @property
    def preprocessing(self) -> dict[str, Any]:
        """The model's own, except for the resizing filter if the recipe names one."""
        named = {"interpolation": self.spec.interpolation} if self.spec.interpolation else {}
        return {**self.files.preprocessing, **named}

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
            **({"grid": self.shape[1:]} if self.maps else {}),
        }


class OpenClipImage(OpenClip):
    """image in [-1, 1] -> embedding, as `encode_image` gives it: not normalised; or the tower's last features."""

    tower = "image"

    def preprocess(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 side side"]:
        """The model's own transforms of an image file, without their rounding to 8 bits."""
        size = self.model.visual.image_size
        side = size if isinstance(size, int) else size[0]
        own = self.preprocessing
        mean, std = (torch.tensor(own[name], device=images.device)[:, None, None] for name in ("mean", "std"))
        return ((resize(images, side, own["interpolation"]) + 1) / 2 - mean) / std

    def features(self, x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n width *grid"]:
        encode = self._map if self.maps else self.model.encode_image
        out = [encode(self.preprocess(part.to(self.device))) for part in x.float().split(BATCH)]
        return torch.cat(out).to(x.device)

    def _map(self, images: Float[Tensor, "n 3 side side"]) -> Float[Tensor, "n width h w"]:
        """Patch tokens after the last norm, or a convolutional tower's last features, on the variable's grid."""
        if not hasattr(self.model.visual, "forward_intermediates"):
            message = f"open_clip gives no maps of features of the image tower of '{self.spec.model}'"
            raise UserError(message, f"variables.{self.name}.encoder.model", "choose a ViT or a tower of timm's")
        options = {"indices": 1, "normalize_intermediates": True, "intermediates_only": True, "output_fmt": "NCHW"}
        found = self.model.visual.forward_intermediates(images, **options)
        features, grid = found["image_intermediates"][-1], tuple(self.shape[1:])
        self.check_shape(features.shape[1], f"the last features of '{self.spec.model}' have", grid)
        if features.shape[2:] == grid:
            return features
        return F.interpolate(features, grid, mode="bilinear", antialias=True, align_corners=False)


class OpenClipText(OpenClip):
    """text -> embedding, as `encode_text` gives it: not normalised."""

    tower = "text"

    @cached_property
    def tokenizer(self) -> Any:
        return self._loaded(self.files.tokenizer)

    @cached_property
    def features_identity(self) -> dict[str, Any]:
        return {**super().features_identity, **({"tokenizer": self.files.texts} if self.files.texts else {})}

    def features(self, x: Sequence[str]) -> Float[Tensor, "n width"]:
        parts = [list(x[start : start + BATCH]) for start in range(0, len(x), BATCH)]
        return torch.cat([self.model.encode_text(self.tokenizer(part).to(self.device)) for part in parts]).cpu()
