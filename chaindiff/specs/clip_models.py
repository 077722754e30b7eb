"""Names of image-text models, known without importing open_clip, which imports torch."""

from __future__ import annotations

import re
import sys
from importlib.util import find_spec
from pathlib import Path

from chaindiff.io.files import user_path

EMBEDDED = Path(__file__).parents[1] / "assets"
CONFIG = "open_clip_config.json"
HUB = "hf-hub:"  # before a repository of the hub, `org/name` or `org/name@revision`
REPOSITORY = re.compile(rf"{HUB}[\w.-]+/[\w.-]+(@[\w./-]+)?")


def plain(model: str) -> str:
    """open_clip's `local-dir:FOLDER` as the path of a folder."""
    folder = model.removeprefix("local-dir:")
    return folder if folder == model or "/" in folder else f"./{folder}"


def model_folder(model: str) -> Path | None:
    """The folder that a recipe's `model` refers to, there or not; None for a name of open_clip's or the hub's."""
    if model.startswith(HUB):
        return None
    if "/" not in model and (EMBEDDED / model / CONFIG).is_file():
        return EMBEDDED / model
    folder = user_path(model)
    return folder if "/" in model or folder.is_dir() else None


def placed_folder(model: str) -> Path | None:
    """The folder of a `model` that a recipe gives by path; None for embedded models and names."""
    folder = model_folder(model)
    return folder if folder is not None and ("/" in model or folder.parent != EMBEDDED) else None


def is_file(pretrained: str) -> bool:
    """Whether `pretrained` is a path: open_clip's tags contain neither dots nor slashes."""
    return "/" in pretrained or "." in pretrained


def known_models() -> list[str]:
    """All models that a recipe can name: embedded ones, then open_clip's, with those that a program has registered."""
    embedded = sorted(path.parent.name for path in EMBEDDED.glob(f"*/{CONFIG}"))
    if (loaded := sys.modules.get("open_clip")) is not None:
        return embedded + loaded.list_models()
    found = find_spec("open_clip")
    assert found is not None and found.origin is not None  # chaindiff depends on it
    return embedded + sorted(path.stem for path in (Path(found.origin).parent / "model_configs").glob("*.json"))
