"""Load the embedded image-text model (or any folder laid out like it) by open_clip's own factory, offline.

open_clip resolves the weights, the tokenizer and the configuration of `local-dir:FOLDER` inside FOLDER, but hands
`hf_model_name` to transformers as it stands, where "." means the current directory. The one thing done here is to
hand the factory the same `text_cfg` with the folder in its place, so that the folder can lie anywhere.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import torch

CLIP_EMOJI = Path(__file__).parents[1] / "assets" / "clip_emoji"


def text_config(folder: Path) -> dict[str, Any]:
    """The folder's `text_cfg` with `hf_model_name` resolved; no weights but the folder's are looked for."""
    cfg = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]
    return {**cfg, "hf_model_name": str(folder), "hf_model_pretrained": False}


def open_clip_folder(folder: str | Path = CLIP_EMOJI, **options: Any) -> torch.nn.Module:
    """The model of a local folder, in eval mode; `options` are those of `open_clip.create_model`."""
    folder = Path(folder).resolve()
    model = open_clip.create_model(f"local-dir:{folder}", text_cfg=text_config(folder), **options)
    return model.eval()


def open_clip_tokenizer(folder: str | Path = CLIP_EMOJI) -> Any:
    """The tokenizer of a local folder: texts -> ids [n, context length]."""
    return open_clip.get_tokenizer(f"local-dir:{Path(folder).resolve()}")
