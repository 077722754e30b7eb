"""The configuration of an open_clip folder, which anybody may have written: checked before open_clip builds of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Len
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from chaindiff.io.errors import UserError
from chaindiff.io.files import regular

Size = Annotated[int, Field(gt=0, le=65_536)]
Numbers = Annotated[list[float], Len(3, 3)]
Positive = Annotated[list[Annotated[float, Field(gt=0)]], Len(3, 3)]


class _Checked(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class _Tower(_Checked):
    layers: Annotated[int, Field(gt=0, le=1000)] | list[Annotated[int, Field(gt=0, le=1000)]] = 12
    width: Size = 512


class _Vision(_Tower):
    image_size: Size | Annotated[list[Size], Len(2, 2)] = 224


class _Model(_Checked):
    embed_dim: Size
    vision_cfg: _Vision
    text_cfg: _Tower


class _Preprocessing(_Checked):
    mean: Numbers = [0.0, 0.0, 0.0]
    std: Positive = [1.0, 1.0, 1.0]
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"


class _Config(_Checked):
    model_cfg: _Model
    preprocess_cfg: _Preprocessing = _Preprocessing()


def read_config(path: Path, where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a folder says of its model and of the preprocessing of images, as it says it.

    Raises UserError naming the entry that is not what it should be.
    """
    try:
        text = regular(path).read_bytes()
        _Config.model_validate_json(text)
    except FileNotFoundError as error:
        hint = "expected a folder that open_clip wrote"
        raise UserError(f"there is no {path.name} in {path.parent}", where, hint) from error
    except (OSError, ValidationError) as error:
        problem = str(getattr(error, "strerror", error))
        if isinstance(error, ValidationError):
            wrong = error.errors(include_url=False)[0]
            problem = ": ".join(filter(None, (".".join(map(str, wrong["loc"])), wrong["msg"])))
        hint = "mend the entry, or copy the folder again"
        raise UserError(f"{path} is not a model's configuration: {problem}", where, hint) from error
    content = from_json(text)
    return content["model_cfg"], content.get("preprocess_cfg", {})
