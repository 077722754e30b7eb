"""A small recipe as text, to be spoiled in one place, and what is said of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from chaindiff.io.errors import UserError
from chaindiff.specs.load import load_recipe

FIXTURES = Path(__file__).parent / "fixtures"
RECIPE = FIXTURES / "recipes" / "vcdm_emoji.yaml"

# A recipe with every sort of variable and stage, whose lines the messages below count on.
LINES = """\
name: small
data: {path: emoji64}
variables:
  image: {kind: image, shape: [3, 32, 32]}
  clip:
    kind: vector
    shape: [128]
    encoder: {kind: open_clip, model: clip_emoji, of: image}
  image16: {kind: image, shape: [3, 16, 16], encoder: {kind: resize, of: image}}
  category: {kind: label, shape: [9]}
stages:
  clip:
    given: [category]
    network: {kind: prior, width: 64}
    train: {images: 1000}
  image:
    given: [clip]
    network:
      kind: unet
      channels: 32
      mult: [1, 2]
      attention: [16]
    train: {images: 1000}
    sample: {steps: 18}
sample: {want: [image]}
"""


def changed(old: str, new: str) -> str:
    """The recipe with one passage in place of another, which it must hold once."""
    assert LINES.count(old) == 1, old
    return LINES.replace(old, new)


def write(folder: Path, text: str, name: str = "r.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def message(source, **options) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(source, **options)
    return str(caught.value)
