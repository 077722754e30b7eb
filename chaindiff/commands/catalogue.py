"""The catalogue: recipes, stage cards, encoders, networks, weights and runs, one line each. Imports no torch."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from chaindiff.assets.registry import SHIPPED
from chaindiff.io.errors import UserError
from chaindiff.io.files import regular
from chaindiff.io.metadata import about
from chaindiff.specs.fields import kinds
from chaindiff.specs.load import LOCK, What, available, load_recipe, summary
from chaindiff.specs.network import Network
from chaindiff.specs.recipe import Encoder, Reducer

JUDGES = {  # the names that `chaindiff.evaluation.features.extractor` knows
    "pixels": "the image itself, at `pixels:SIDE`",
    "judge_conv": "a small convolutional classifier of emoji",
    "judge_vit": "a small vision transformer, classifier of emoji",
    "efficientnet_lite0": "an ImageNet classifier, from a package",
    "efficientnet_lite2": "a larger one, likewise",
    "inception_2015": "the network of FID, from a local file",
    "open_clip": "an image tower: `open_clip:MODEL` or `open_clip:MODEL:TAG`",
    "dinov2": "a self-supervised transformer: `dinov2:small`, `base`, `large` or `giant`",
}
HEADER = 100_000_000  # bytes; the format allows no more


@dataclass(frozen=True)
class Entry:
    """Something that a recipe or the command line can name. `path` is its file, if it is one."""

    name: str
    description: str
    path: str | None = None


def _files(what: What) -> list[Entry]:
    return [Entry(name, summary(path), str(path)) for name, path in available(what).items()]


def _kinds(union: Any) -> list[Entry]:
    """The members of a union of specs, by their `kind`, with the first paragraph of each docstring."""
    found = [(kind, model.__doc__ or "") for kind, model in kinds(union).items()]
    return [Entry(kind, " ".join(doc.split("\n\n")[0].split())) for kind, doc in found]


def _weights() -> list[Entry]:
    """Shipped files, and those of the runs in this directory."""
    runs = sorted(Path("runs").glob("*/stages/*/weights.safetensors"))
    shipped = [Entry(path.stem, _trained(path), str(path)) for path in sorted(SHIPPED.glob("*.safetensors"))]
    return shipped + [Entry(str(path), _trained(path), str(path)) for path in runs]


def _header(path: Path) -> dict[str, Any]:
    """Of a safetensors file: its length in eight bytes, then JSON."""
    with regular(path) as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return from_json(file.read(min(length, HEADER)))


def runs() -> dict[str, Path]:
    """The runs in this directory by name: the folders of `runs` with a locked recipe."""
    return {path.parent.name: path.parent for path in sorted(Path("runs").glob(f"*/{LOCK}"))}


def _run(path: Path) -> str:
    """What a run holds, or what is wrong with it."""
    try:
        asked = load_recipe(path).recipe.sample.count
        made: dict[str, list[str]] = {}
        for folder in sorted(path.glob("samples/*/")):
            made.setdefault(_counted(folder, asked), []).append(folder.name)
        trained = sorted(file.parent.name for file in path.glob("stages/*/weights.safetensors"))
    except (UserError, OSError, ValueError, KeyError, TypeError, struct.error) as error:
        return f"(broken: {error.message if isinstance(error, UserError) else 'a file of samples is not complete'})"
    held = [f"{count} samples of {', '.join(names)}" for count, names in made.items()] or ["no samples"]
    held += ["evaluated" if (path / "metrics.json").exists() else "not evaluated"]
    return "; ".join([*held, *([f"trained {', '.join(trained)}"] if trained else [])])


def _counted(folder: Path, asked: int) -> str:
    """The samples of one variable: one file per image, or per batch of other values, named after its first."""
    count = sum(1 for file in folder.glob("*.png") if file.stem.isdecimal())
    for file in folder.glob("*.safetensors"):
        count += _header(file)[folder.name]["shape"][0]
    return f"{count}" if count >= asked else f"{count} of {asked}"


def _trained(path: Path) -> str:
    """A weights file's contents by its metadata, or what is wrong with it."""
    try:
        metadata = _header(path)["__metadata__"]
        size = f"{path.stat().st_size / 1e6:.2f} MB"
        found = about(metadata, path)
        if found.stage is None:
            return f"statistics of an encoder, fitted on {found.rows:,} rows; {size}"
        made, *given = found.variables  # the generated one is written first
    except (UserError, OSError, ValueError, KeyError, TypeError, struct.error):
        return "(not a complete weights file)"
    kind = (found.stage.network or {}).get("kind", found.stage.kind)
    seen = f"{found.images:,} images of {found.data.path or found.data.kind}"
    return f"{kind}: {made}{' given ' * bool(given)}{', '.join(given)}; {seen}; {size}"


GROUPS: dict[str, Callable[[], list[Entry]]] = {
    "recipes": lambda: _files("recipe"),
    "cards": lambda: _files("card"),
    "encoders": lambda: _kinds(Encoder),
    "reducers": lambda: _kinds(Reducer),
    "networks": lambda: _kinds(Network),
    "judges": lambda: [Entry(name, description) for name, description in JUDGES.items()],
    "weights": _weights,
    "runs": lambda: [Entry(name, _run(path), str(path)) for name, path in runs().items()],
}
TITLES = {"cards": "stage cards", "runs": "runs, in the folder runs"}
