"""A figure with all that it depends on, so that only like is compared with like."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

from chaindiff.io.errors import UserError


class Figure(BaseModel):
    """One number of an evaluation.

    `reference`: the data compared with (its digest or name), `split` of it. `count`: samples, which biases most
    metrics. `resize`: how images reached the encoder's resolution. `in_chain`: the encoder, or one of its family,
    conditions the chain, so that the figure flatters it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    metric: str
    value: float
    low: float | None = None
    high: float | None = None
    reference: str
    split: str | None = None
    count: int
    encoder: str | None = None
    encoder_identity: str | None = None
    resize: str | None = None
    seed: int
    in_chain: bool = False

    @classmethod
    def of(cls, metric: str, value: Any, **about) -> Figure:
        """From a number, or from an `Interval` with its ends, whose module this one does without: it imports torch."""
        if hasattr(value, "low"):
            return cls(metric=metric, value=value.value, low=value.low, high=value.high, **about)
        return cls(metric=metric, value=value, **about)


LIKE = ("metric", "reference", "split", "count", "encoder", "encoder_identity", "resize")


@dataclass(frozen=True)
class Difference:
    """`b` minus `a`. `apart`: their intervals do not meet (None if one has none). `flattered`: `a` or `b`, whose chain
    alone has the metric's encoder in it."""

    value: float
    apart: bool | None
    flattered: str | None


def compare(a: Figure, b: Figure) -> Difference:
    """How figure b differs from figure a, both measured in the same way; seeds may differ.

    Raises UserError for figures that are not alike, naming the first field that differs.
    """
    for name in LIKE:
        ours, theirs = getattr(a, name), getattr(b, name)
        if ours != theirs:
            raise UserError(
                f"these figures cannot be compared: {name} is {ours!r} in one and {theirs!r} in the other",
                hint=f"measure both with the same {name}",
            )
    apart = None
    if a.low is not None and a.high is not None and b.low is not None and b.high is not None:
        apart = a.high < b.low or b.high < a.low
    flattered = None if a.in_chain == b.in_chain else "a" if a.in_chain else "b"
    return Difference(b.value - a.value, apart, flattered)
