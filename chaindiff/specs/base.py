"""The base of config objects, each of which validates itself. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

Probability = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")]
Memory = Annotated[str, Field(pattern=r"^\d+(\.\d+)? ?[kMGT]?i?B$")]
# Larger values could not be built, or even planned, in reasonable time and memory.
UpToThousand = Annotated[int, Field(gt=0, le=1_000)]
UpToTenMillion = Annotated[int, Field(gt=0, le=10_000_000)]
UpToMillion = Annotated[int, Field(gt=0, le=1_000_000)]
Positive = Annotated[float, Field(gt=0, le=1e12)]  # whose square is a number in single precision too
NonNegative = Annotated[float, Field(ge=0, le=1e12)]

Problems = Iterator[tuple[str, str]]  # a field, dotted, and what is wrong with it
PROBLEM = "problem"  # pydantic's error type for our own messages


class Spec(BaseModel):
    """Base of every config object: frozen, unknown fields refused, defaults validated, fields checked together."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    def problems(self) -> Problems:
        """Inconsistencies within this object, beyond the types of its fields."""
        yield from ()

    @model_validator(mode="after")
    def _validated(self) -> Self:
        found = [
            InitErrorDetails(
                type=PydanticCustomError(PROBLEM, "{problem}", {"problem": problem}),
                loc=tuple(field.split(".")),
                input=getattr(self, field.partition(".")[0]),
            )
            for field, problem in self.problems()
        ]
        if found:
            raise ValidationError.from_exception_data(type(self).__name__, found)
        return self


def by_default(kind: str) -> BeforeValidator:
    """The default kind of a mapping."""
    return BeforeValidator(lambda said: {"kind": kind, **said} if isinstance(said, dict) else said)
