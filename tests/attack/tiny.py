"""The beginning of a recipe of tiny images, a folder with it and its data, and what a folder holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from chaindiff.io.digest import file_digest

HEAD = """
name: tiny
data: {path: data}
variables:
  photo: {kind: image, shape: [3, 16, 16]}
  image: {kind: image, shape: [3, 8, 8], encoder: {kind: resize, of: photo}}
"""
Command = Callable[..., tuple[int, str, str]]


def prepared(folder: Path, recipe: str, images: int) -> Path:
    """The folder with tiny.yaml and its images in data/."""
    rng = np.random.default_rng(0)
    (folder / "data").mkdir(parents=True)
    for index in range(images):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"data/{index}.png")
    (folder / "tiny.yaml").write_text(recipe)
    return folder


def state(folder: str | Path) -> dict[str, tuple[int, str]]:
    """When each file below a folder was written, and its digest."""
    paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, file_digest(path)) for path in paths}
