"""What a stage's file says of itself: weights, snapshot, state. Anybody may have written it. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, Json, PositiveFloat, ValidationError

from chaindiff.io.errors import UserError

DAMAGED = "copy or download it again; if a run wrote it, delete it to retrain that stage"
Count = Annotated[int, Field(ge=0, le=2**53)]


class Trained(BaseModel):
    """A variable that a stage was trained on, and the digest of what was fitted for it."""

    identity: str
    fitted: str = ""


class Settings(BaseModel):
    """What of a stage's settings is asked of its file."""

    network: dict[str, Any] | None = None
    kind: str = "diffusion"
    given: list[dict[str, Any]] = []
    precondition: dict[str, Any] | None = None
    init: str | None = None


class Data(BaseModel):
    path: str | None = None
    kind: str = "images"


class About(BaseModel):
    """The entries that are read, as what they are; a file of bare tensors has none of them."""

    model_config = ConfigDict(allow_inf_nan=False)

    identity: str | None = None
    images: Count = 0
    total: Count = 0
    stage: Json[Settings] | None = None
    variables: Json[dict[str, Trained]] = {}
    data: Json[Data] = Data()
    precondition: Json[dict[str, Any] | None] = None  # of a network that was imported
    sigma_data: PositiveFloat | None = None
    sigma_rel: PositiveFloat | None = None  # of a snapshot
    profile_error: str | None = None
    imported: str | None = None
    rows: Count = 0  # of an encoder's statistics


def about(kept: Mapping[str, str], path: str | Path) -> About:
    """The metadata of the file at a path. Raises UserError naming the entry that is not what it should be."""
    try:
        return About.model_validate(kept)
    except ValidationError as error:
        wrong = error.errors(include_url=False)[0]
        entry, problem = ".".join(map(str, wrong["loc"])), wrong["msg"]
        value = f" ({wrong['input']!r:.60})" if wrong["type"] != "missing" else ""
        message = f"the metadata of {path} is damaged: {entry}: {problem[:1].lower()}{problem[1:]}{value}"
        raise UserError(message, hint=DAMAGED) from error
