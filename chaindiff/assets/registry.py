"""Shipped weights, found by what they are and not by what they are called.

`python -m chaindiff.assets.registry RUN` ships the finished stages and fitted encoders of a run, in half precision.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

SHIPPED = Path(__file__).parent / "weights"


def file_name(name: str, identity: str) -> str:
    """The name under which a stage's or encoder's file is shipped."""
    return f"{name}-{identity}.safetensors"


def shipped(identity: str) -> Path | None:
    """The shipped file of this identity, whatever its stage is called."""
    return next(iter(sorted(SHIPPED.glob(f"*-{identity}.safetensors"))), None)


def ship(run: Path) -> list[Path]:
    """Copy a run's finished weights into the package; statistics of encoders stay in full precision."""
    import torch

    from chaindiff.io import tensorfile

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
    for shipped_file in ship(Path(sys.argv[1])):
        print(f"{shipped_file.name}: {shipped_file.stat().st_size / 1e6:.2f} MB")
