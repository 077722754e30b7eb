"""Find the files of an open_clip model: by name and tag, by name and weights file, or in a local folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chaindiff.io.digest import file_digest, fingerprint
from chaindiff.io.errors import UserError, did_you_mean
from chaindiff.specs.clip_models import CONFIG, is_file, known_models, model_folder, placed_folder
from chaindiff.specs.recipe import OpenClipSpec

WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")

# Files of a folder that a text tower depends on besides its weights.
TOKENIZER = ("config.json", "*token*.json", "vocab.*", "merges.txt", "*.model")

# open_clip's preprocessing of images where a model does not specify its own (the values of OpenAI's CLIP).
PREPROCESSING = {
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
    "interpolation": "bicubic",
}


@dataclass(frozen=True)
class Files:
    """A model's configuration, preprocessing and weights; `create` and `tokenizer` load them through open_clip."""

    config: dict[str, Any]
    preprocessing: dict[str, Any]
    weights: Path
    create: Callable[[], Any]
    tokenizer: Callable[[], Any]
    texts: str = ""  # digest of the tokenizer in a local folder

    @property
    def width(self) -> int:
        return self.config["embed_dim"]

    @property
    def digest(self) -> str:
        """sha256 of the weights file."""
        return file_digest(self.weights)


def find(spec: OpenClipSpec, where: str) -> Files:
    """The files of the model that a recipe names.

    Raises UserError for unknown names, folders without a model, and weights that are neither on this machine nor can be
    downloaded.
    """
    if (folder := model_folder(spec.model)) is not None:
        if spec.pretrained is not None:
            raise UserError(
                f"the model folder '{spec.model}' has its own weights; `pretrained: {spec.pretrained}` is not used",
                f"{where}.pretrained",
                "remove `pretrained`",
            )
        return _folder(folder.resolve(), f"{where}.model")
    return _named(spec, where)


def _folder(folder: Path, where: str) -> Files:
    try:
        content = json.loads((folder / CONFIG).read_text("utf-8"))
        config, preprocessing = content["model_cfg"], content.get("preprocess_cfg", {})
        text: dict[str, Any] = config["text_cfg"]
    except FileNotFoundError as error:
        raise UserError(f"there is no {CONFIG} in {folder}", where, "expected a folder that open_clip wrote") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / CONFIG} is not a model's configuration: {error!r}", where) from error
    if (weights := _weights(folder)) is None:
        raise UserError(f"there are no weights in {folder}", where, f"expected {' or '.join(WEIGHTS)}")

    def create() -> Any:
        import open_clip

        if "hf_model_name" in text:
            from chaindiff.encoders.clip_emoji import open_clip_folder

            return open_clip_folder(folder)
        return open_clip.create_model(f"local-dir:{folder}")

    def tokenizer() -> Any:
        import open_clip

        return open_clip.get_tokenizer(f"local-dir:{folder}")

    return Files(config, _preprocessing(preprocessing), weights, create, tokenizer, _tokenizer(folder))


def placed(spec: OpenClipSpec, text: bool) -> dict[str, str]:
    """Digests of the files of a model that a recipe gives by path, where they exist; of a text tower's tokenizer too.

    Embedded models and open_clip's tags are identified by name: nothing is loaded or downloaded here.
    """
    if (folder := placed_folder(spec.model)) is None:
        file = Path(spec.pretrained or "").expanduser()
        return {"weights": file_digest(file)} if is_file(spec.pretrained or "") and file.is_file() else {}
    if (weights := _weights(folder)) is None or not (folder / CONFIG).is_file():
        return {}
    found = {"weights": file_digest(weights), "configuration": file_digest(folder / CONFIG)}
    return {**found, "tokenizer": _tokenizer(folder)} if text else found


def _weights(folder: Path) -> Path | None:
    return next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)


def _tokenizer(folder: Path) -> str:
    files = {path for pattern in TOKENIZER for path in folder.glob(pattern) if path.is_file()}
    return fingerprint({path.name: file_digest(path) for path in files})


def _named(spec: OpenClipSpec, where: str) -> Files:
    import open_clip

    config, tags = open_clip.get_model_config(spec.model), open_clip.list_pretrained_tags_by_model(spec.model)
    if config is None:
        tail = did_you_mean(spec.model, known_models())
        raise UserError(f"there is no open_clip model '{spec.model}'{tail}", f"{where}.model")
    if spec.pretrained is None:
        known = f"known: {', '.join(tags)}; " if tags else ""
        hint = f"set pretrained to a tag ({known}downloaded from the hub) or to a weights file"
        raise UserError(f"the open_clip model '{spec.model}' needs weights", f"{where}.pretrained", hint)
    file = Path(spec.pretrained).expanduser()
    tag: dict[str, Any] = {}
    if spec.pretrained in tags:
        tag = open_clip.get_pretrained_cfg(spec.model, spec.pretrained)
        file = _fetch(spec, tag, where)
    elif not file.is_file():
        message = f"'{spec.pretrained}' is neither a weights file nor a tag of '{spec.model}'"
        raise UserError(message + did_you_mean(spec.pretrained, tags), f"{where}.pretrained")
    # OpenAI's models were trained with a faster approximation of GELU: the tag implies it, the model's name may not.
    quick = bool(tag.get("quick_gelu", config.get("quick_gelu", False)))
    return Files(
        {**config, "quick_gelu": quick},
        _preprocessing(tag),
        file,
        lambda: open_clip.create_model(spec.model, pretrained=str(file), force_quick_gelu=quick),
        lambda: open_clip.get_tokenizer(spec.model),
    )


def _fetch(spec: OpenClipSpec, tag: dict[str, Any], where: str) -> Path:
    from open_clip import download_pretrained

    try:
        return Path(download_pretrained(tag))
    except Exception as error:  # the hub's client raises many types when there is no network
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"the weights '{spec.pretrained}' of '{spec.model}' are not here and cannot be downloaded: {reason}",
            f"{where}.pretrained",
            "download them where there is a network and set pretrained to the file, or use a local model: "
            "a folder with open_clip_config.json, or clip_emoji (embedded)",
        ) from error


def _preprocessing(own: dict[str, Any]) -> dict[str, Any]:
    return {name: own.get(name, default) for name, default in PREPROCESSING.items()}
