"""What there is to build with: recipes, stage cards, encoders, networks and weights, a line each. Imports no torch."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chaindiff.assets.registry import SHIPPED
from chaindiff.specs.fields import kinds
from chaindiff.specs.load import What, available, summary
from chaindiff.specs.recipe import Encoder, Reducer
from chaindiff.specs.stage import Network

JUDGES = {  # the names that `chaindiff.evaluation.features.extractor` knows
    "pixels": "the image itself, at `pixels:SIDE`",
    "judge_conv": "a small convolutional classifier of emoji",
    "judge_vit": "a small vision transformer, classifier of emoji",
    "efficientnet_lite0": "an ImageNet classifier, from a package",
    "inception_2015": "the network of FID, from a local file",
    "open_clip": "an image tower: `open_clip:MODEL` or `open_clip:MODEL:TAG`",
    "dinov2": "a self-supervised transformer: `dinov2:small`, `base`, `large` or `giant`",
}
HEADER = 100_000_000  # bytes; the format allows no more


@dataclass(frozen=True)
class Entry:
    """A thing that a recipe or the command line can name. `path` is its file, if it is one."""

    name: str
    description: str
    path: Path | None = None

    def plain(self) -> dict[str, Any]:
        return {"name": self.name, "description": self.description, "path": str(self.path) if self.path else None}


def _files(what: What) -> list[Entry]:
    return [Entry(name, summary(path), path) for name, path in available(what).items()]


def _kinds(union: Any) -> list[Entry]:
    """The members of a union of specs, by their `kind`, with the first sentence of what each says of itself."""
    found = [(kind, model.__doc__ or "") for kind, model in kinds(union).items()]
    return [Entry(kind, " ".join(doc.split("\n\n")[0].split())) for kind, doc in found]


def _weights() -> list[Entry]:
    """Shipped files, and those of the runs in this directory."""
    runs = sorted(Path("runs").glob("*/stages/*/weights.safetensors"))
    shipped = [Entry(path.stem, _trained(path), path) for path in sorted(SHIPPED.glob("*.safetensors"))]
    return shipped + [Entry(str(path), _trained(path), path) for path in runs]


def _trained(path: Path) -> str:
    """What a weights file says of itself, or what is wrong with it."""
    try:
        # The format's header: its length in eight bytes, then JSON.
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            metadata = json.loads(file.read(min(length, HEADER)))["__metadata__"]
        size = f"{path.stat().st_size / 1e6:.2f} MB"
        if "stage" not in metadata:
            return f"statistics of an encoder, fitted on {int(metadata['rows']):,} rows; {size}"
        made, *given = json.loads(metadata["variables"])  # the generated one is written first
        stage, data = json.loads(metadata["stage"]), json.loads(metadata["data"])
        kind, data = (stage["network"] or stage)["kind"], data.get("path") or data["kind"]
        images = int(metadata["images"])
    except (OSError, ValueError, KeyError, TypeError, struct.error):
        return "(not a complete weights file)"
    return f"{kind}: {made}{' given ' * bool(given)}{', '.join(given)}; {images:,} images of {data}; {size}"


GROUPS: dict[str, Callable[[], list[Entry]]] = {
    "recipes": lambda: _files("recipe"),
    "cards": lambda: _files("card"),
    "encoders": lambda: _kinds(Encoder),
    "reducers": lambda: _kinds(Reducer),
    "networks": lambda: _kinds(Network),
    "judges": lambda: [Entry(name, description) for name, description in JUDGES.items()],
    "weights": _weights,
}
TITLES = {"cards": "stage cards"}
