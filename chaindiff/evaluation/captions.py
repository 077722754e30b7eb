"""Captions of the data, embedded beside images: to see whether a sample shows what it was made for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from chaindiff.data.items import Data
from chaindiff.encoders.clip import OpenClipText
from chaindiff.encoders.clip_files import find
from chaindiff.evaluation.features import clip_spec
from chaindiff.io.digest import fingerprint
from chaindiff.recipe.assembly import Assembly

FIELDS = ("caption", "text")  # of the metadata, where the recipe declares no text


def captions(assembly: Assembly, data: Data) -> list[str] | None:
    """What is said of every image, by the recipe's text variable or else by a field of a usual name.

    Images of which nothing is said have an empty text; None if all are such.
    """
    declared = [assembly.columns[name].field for name, spec in assembly.recipe.variables.items() if spec.kind == "text"]
    field = next((name for name in (*declared, *FIELDS) if name in data.fields), None)
    texts = data.field(field) if field is not None else []
    return texts if any(texts) else None


@dataclass(frozen=True)
class TextTower:
    """The tower of an open_clip model that reads texts, into the space of the tower that is the judge."""

    name: str
    identity: str
    width: int
    encoder: OpenClipText

    @classmethod
    def of(cls, judge: str) -> TextTower:
        """Of the judge `open_clip:MODEL`. Raises UserError if the model is not there."""
        spec, name = clip_spec(judge, of="text"), f"text of '{judge}'"
        width = find(spec, name).width
        encoder = OpenClipText(name, spec, (), [width], 1.0)
        return cls(f"{judge}-text", fingerprint(encoder.features_identity), width, encoder)

    def __call__(self, texts: Sequence[str], /) -> Float[Tensor, "n width"]:
        with torch.inference_mode():
            return self.encoder.features(texts).float()
