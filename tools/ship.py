"""Ship the finished stages and fitted encoders of a run with the package, in half precision.

python -m tools.ship RUN
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch

from chaindiff.assets.registry import SHIPPED, file_name
from chaindiff.io import tensorfile


def ship(run: Path) -> list[Path]:
    """Copy a run's finished weights into the package; statistics of encoders stay in full precision."""
    written = []
    for path in sorted(run.glob("stages/*/weights.safetensors")):
        tensors, metadata = tensorfile.load(path)
        halves = {k: v.half() if v.dtype == torch.float32 else v for k, v in tensors.items()}
        written.append(SHIPPED / file_name(path.parent.name, metadata["identity"]))
        tensorfile.save(written[-1], halves, metadata)
    for path in sorted(run.glob("encoders/*.safetensors")):
        if re.fullmatch(r"\w+-[0-9a-f]{16}\.safetensors", path.name):
            written.append(SHIPPED / path.name)
            tensorfile.save(written[-1], *tensorfile.load(path))
    return written


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m tools.ship RUN")
    for shipped_file in ship(Path(sys.argv[1])):
        print(f"{shipped_file.name}: {shipped_file.stat().st_size / 1e6:.2f} MB")
