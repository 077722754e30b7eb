"""All pairs of rows of two sets, a block at a time: metrics of large sets take bounded memory."""

from __future__ import annotations

from collections.abc import Iterator

from jaxtyping import Float64
from torch import Tensor

from chaindiff.io.shards import Vectors

BLOCK = 512  # rows of a block; what is made of a pair of blocks takes 2 MiB in float64

Block = tuple[slice, slice, Float64[Tensor, "n width"], Float64[Tensor, "m width"]]


def blocks(a: Vectors, b: Vectors) -> Iterator[Block]:
    """Some rows of a and some of b at a time: where they stand in either, and themselves in float64."""
    for i in range(0, len(a), BLOCK):
        rows = a[i : i + BLOCK].double()
        for j in range(0, len(b), BLOCK):
            others = b[j : j + BLOCK].double()
            yield slice(i, i + len(rows)), slice(j, j + len(others)), rows, others
