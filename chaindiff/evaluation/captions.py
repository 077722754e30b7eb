"""Captions of the data, embedded beside images, to measure whether a sample matches its caption."""

from __future__ import annotations

from collections.abc import Sequence

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
    """Every image's caption, from the recipe's text variable or else from a field with a usual name.

    Images without one have an empty text; None if all do.
    """
    declared = [assembly.columns[name].field for name, spec in assembly.recipe.variables.items() if spec.kind == "text"]
    field = next((name for name in (*declared, *FIELDS) if name in data.fields), None)
    texts = data.field(field) if field is not None else []
    return texts if any(texts) else None


class TextTower:
    """The text tower of the judge `open_clip:MODEL`, which embeds into the same space.

    Raises UserError if the model is not there.
    """

    def __init__(self, judge: str):
        spec, label = clip_spec(judge, of="text"), f"text of '{judge}'"
        self.name, self.width = f"{judge}-text", find(spec, label).width
        self.encoder = OpenClipText(label, spec, (), [self.width], 1.0)
        self.identity = fingerprint(self.encoder.features_identity)

    def __call__(self, texts: Sequence[str], /) -> Float[Tensor, "n width"]:
        with torch.inference_mode():
            return self.encoder.features(texts).float()
