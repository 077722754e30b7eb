"""A figure with all that it depends on, so that only like is compared with like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from chaindiff.io.errors import UserError
from chaindiff.io.files import read_whole


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
        """From a number, or from an `Interval` with its ends, whose module imports torch, and is not imported."""
        if hasattr(value, "low"):
            return cls(metric=metric, value=value.value, low=value.low, high=value.high, **about)
        return cls(metric=metric, value=value, **about)


class Line(Figure):
    """A figure in metrics.json: of which row and variable it is, and what else stands beside it."""

    model_config = ConfigDict(extra="allow")

    row: str
    variable: str = Field(alias="of")


class Part(BaseModel):
    """A part of an evaluation as the page shows it."""

    title: str
    note: str
    table: list[list[str]]
    pictures: dict[str, str]


class Evaluation(BaseModel):
    parts: list[Part] = []
    figures: list[Line]


def read_evaluation(path: Path) -> Evaluation | None:
    """What an evaluation left in metrics.json; None if there was none. Raises UserError for anything else there."""
    try:
        return Evaluation.model_validate_json(read_whole(path))
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        hint = "delete it and evaluate the run again"
        raise UserError("is not the output of an evaluation", str(path), hint) from error


LIKE = ("metric", "reference", "split", "count", "encoder", "encoder_identity", "resize")


def check_alike(a: Figure, b: Figure) -> None:
    """Raises UserError for figures that were not measured in the same way, naming the first field that differs.

    Seeds may differ.
    """
    for name in LIKE:
        ours, theirs = getattr(a, name), getattr(b, name)
        if ours != theirs:
            raise UserError(
                f"these figures cannot be compared: {name} is {ours!r} in one and {theirs!r} in the other",
                hint=f"measure both with the same {name}",
            )
