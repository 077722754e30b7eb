"""Load the embedded image-text model (or any folder laid out like it) by open_clip's own factory, offline.

open_clip looks for the configuration, the weights and the tokenizer of `local-dir:FOLDER` inside FOLDER, but
passes `hf_model_name` to transformers unchanged, where "." means the current directory. This module only passes
the factory the same `text_cfg` with the folder in its place, so that the folder can be anywhere.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import torch

from chaindiff.io.files import read_whole

CLIP_EMOJI = Path(__file__).parents[1] / "assets" / "clip_emoji"


def local_options(folder: str | Path = CLIP_EMOJI) -> dict[str, Any]:
    """The arguments that make `open_clip.create_model` (or `create_model_and_transforms`) load the folder."""
    folder = Path(folder).resolve()
    text = json.loads(read_whole(folder / "open_clip_config.json"))["model_cfg"]["text_cfg"]
    text |= {"hf_model_name": str(folder), "hf_model_pretrained": False}
    return {"model_name": f"local-dir:{folder}", "text_cfg": text}


def open_clip_folder(folder: str | Path = CLIP_EMOJI, **options: Any) -> Any:
    """The model of a local folder, in eval mode; `options` are those of `open_clip.create_model`."""
    model = open_clip.create_model(**local_options(folder), **options).eval()
    return model.to(memory_format=torch.channels_last)  # twice as fast for depthwise convolutions on a CPU


def open_clip_tokenizer(folder: str | Path = CLIP_EMOJI) -> Any:
    """The tokenizer of a local folder: texts -> ids [n, context length]."""
    return open_clip.get_tokenizer(f"local-dir:{Path(folder).resolve()}")
