"""Files as bytes, guided by coverage: a message or success, soon and in bounded memory, and nothing else.

Run by hand, one kind at a time (`pip install atheris`); the folder that follows holds examples to begin with:

    python tests/attack/fuzz_bytes.py recipe -max_total_time=120 -timeout=30 -rss_limit_mb=3000
"""

from __future__ import annotations

import io
import json
import pickle
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import atheris  # type: ignore[import-not-found]  # of no extra: it compiles for minutes where there is no wheel

with atheris.instrument_imports(include=["chaindiff", "yaml", "zipfile", "safetensors"]):
    import numpy as np
    import torch
    from PIL import Image
    from safetensors.torch import save

    from chaindiff.data import open_data
    from chaindiff.encoders.clip_files import find
    from chaindiff.interop.snapshots import read_snapshot
    from chaindiff.io import tensorfile
    from chaindiff.io.errors import UserError
    from chaindiff.io.metadata import about
    from chaindiff.specs.load import load_recipe
    from chaindiff.specs.recipe import OpenClipSpec

ROOT = Path(__file__).parents[2]
CLIP = ROOT / "chaindiff/assets/clip_emoji/open_clip_config.json"


def weights(path: Path) -> None:
    tensors, kept = tensorfile.load(path)
    about(kept, path)
    _ = [tensor.sum() for tensor in tensors.values()]


def images(path: Path) -> None:
    data = open_data(str(path))
    data.pixels(range(min(2, len(data))), 8)
    _ = [data.field(name) for name in ("group", "caption")]


def config(path: Path) -> None:
    path.rename(path.parent / "open_clip_config.json")
    find(OpenClipSpec(kind="open_clip", of="x", model=str(path.parent)), "encoder")


def _zip() -> bytes:
    held, picture = io.BytesIO(), io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(picture, "PNG")
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.png", picture.getvalue())
        archive.writestr("metadata.jsonl", json.dumps({"file_name": "0.png", "group": "a"}))
    return held.getvalue()


KINDS: dict[str, tuple[str, Callable[[Path], object], Callable[[], list[bytes]]]] = {
    "recipe": ("x.yaml", load_recipe, lambda: [p.read_bytes() for p in sorted((ROOT / "recipes").glob("*.yaml"))]),
    "weights": (
        "x.safetensors",
        weights,
        lambda: [save({"a": torch.zeros(2, 2)}, {"format": "chaindiff-stage/1", "images": "3", "stage": "{}"})],
    ),
    "snapshot": ("x.pkl", read_snapshot, lambda: [pickle.dumps({"ema": [1, "x", (2.0, None)]}, p) for p in (0, 2, 4)]),
    "zip": ("x.zip", images, lambda: [_zip()]),
    "config": ("x.json", config, lambda: [CLIP.read_bytes()]),
}


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in KINDS:
        sys.exit(f"usage: fuzz_bytes.py {'|'.join(KINDS)} [options of libFuzzer]")
    name, read, examples = KINDS[sys.argv.pop(1)]
    with tempfile.TemporaryDirectory() as folder:
        for number, example in enumerate(examples()):
            (Path(folder) / f"{number}").write_bytes(example)

        def one(content: bytes) -> None:
            with tempfile.TemporaryDirectory() as place:
                path = Path(place) / name
                path.write_bytes(content)
                try:
                    read(path)
                except UserError as error:
                    str(error).encode()

        atheris.Setup([*sys.argv, folder], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
