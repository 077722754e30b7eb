"""The fields of a link: how a stage receives a given variable. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt

from chaindiff.specs.base import Name, NonNegative, Probability, Problems, Spec


def largest_grid(shapes: Mapping[str, Sequence[int]]) -> str | None:
    """The name of the image or map, [channels, height, width], with the most pixels, the first of equal ones.

    What a stage is given in the form of channels is concatenated with this one of the variables that it generates.
    """
    grids = {name: shape[1] * shape[2] for name, shape in shapes.items() if len(shape) == 3}
    return max(grids, key=grids.__getitem__, default=None)


def no_channels(name: str, shape: Sequence[int], target: str, size: Sequence[int]) -> str | None:
    """Why a given map cannot be channels of the generated variable, if it cannot; an image is resized."""
    if [*shape[1:]] == [*size[1:]]:
        return None
    (_, height, width), grid = shape, " x ".join(map(str, size[1:])) or "no grid at all"
    return (
        f"the map '{name}' has a grid of {height} x {width}, and '{target}' {grid}: a given map becomes channels of "
        "what is generated, which needs the same size; maps are not resized"
    )


class LinkSpec(Spec):
    """How a stage receives one given variable, and what training does to it."""

    variable: Name
    dropout: Probability = Field(default=0.0, description="probability of absence in training")
    null: Literal["zeros", "learned"] = Field(default="zeros", description="what replaces an absent value")
    presence: bool = Field(
        default=True, description="give the network an indicator of absence where needed; false: as in EDM's format"
    )
    noise: NonNegative = Field(
        default=0.0,
        description="largest level of noise-conditioning augmentation in training (0: none), given to the network",
    )
    keep: list[NonNegativeInt] = Field(
        default=[],
        description="train on the first k entries, k drawn from this list and given to the network; none: all",
    )

    @property
    def can_be_absent(self) -> bool:
        """Whether training includes samples without the value."""
        return self.dropout > 0 or 0 in self.keep

    def problems(self) -> Problems:
        if self.keep and not max(self.keep):
            yield "keep", "with 0 alone the value is never given; leave the link out"


Link = Annotated[
    LinkSpec,
    BeforeValidator(
        lambda said: {"variable": said} if isinstance(said, str) else said, json_schema_input_type=Name | LinkSpec
    ),
]  # a bare name is short for {variable: name}
