"""Find the files of an open_clip model: by name and tag, by name and weights file, in a local folder or on the hub."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chaindiff.encoders.clip_config import ClipConfig, PreprocessConfig
from chaindiff.io.digest import file_digest, fingerprint
from chaindiff.io.errors import UserError, did_you_mean
from chaindiff.io.files import read_whole, user_path
from chaindiff.io.progress import say
from chaindiff.specs.clip_models import CONFIG, HUB, is_file, known_models, model_folder, placed_folder
from chaindiff.specs.recipe import OpenClipSpec
from chaindiff.specs.validate import validate
from chaindiff.specs.yaml import wrap

WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
PREPROCESSING = ("mean", "std", "interpolation")
HUB_FILES = ("*.json", "*.txt", "*.model")  # with the configuration: no code, and no pickles

# Files of a folder that a text tower depends on besides its weights.
TOKENIZER = ("config.json", "*token*.json", "vocab.*", "merges.txt", "*.model")


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
    folder, hub = model_folder(spec.model), spec.model.startswith(HUB)
    if folder is None and not hub:
        return _named(spec, where)
    if spec.pretrained is not None:
        raise UserError(
            f"the model {'' if hub else 'folder '}'{spec.model}' has its own weights; "
            f"`pretrained: {spec.pretrained}` is not used",
            f"{where}.pretrained",
            "remove `pretrained`",
        )
    return _folder(folder.resolve() if folder is not None else _fetch_model(spec.model, where), f"{where}.model")


def _folder(folder: Path, where: str) -> Files:
    try:
        content = json.loads(read_whole(folder / CONFIG))
        said = {name: content[name] for name in ClipConfig.model_fields if name in content}
        validate(ClipConfig, wrap(said, str(folder / CONFIG)))
    except FileNotFoundError as error:
        raise UserError(f"there is no {CONFIG} in {folder}", where, "expected a folder that open_clip wrote") from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError, UserError) as error:
        reason = error.message if isinstance(error, UserError) else repr(error)
        raise UserError(f"{folder / CONFIG} is not a model's configuration: {reason}", where) from error
    config, preprocessing = said["model_cfg"], said.get("preprocess_cfg", {})
    text: dict[str, Any] = config["text_cfg"]
    if odd := [path for path in sorted(folder.iterdir()) if path.exists() and not (path.is_file() or path.is_dir())]:
        raise UserError(f"{odd[0]} is not a regular file", where, "open_clip would read it: remove it")
    if (weights := _weights(folder)) is None:
        raise UserError(f"there are no weights in {folder}", where, f"expected {' or '.join(WEIGHTS)}")

    def create() -> Any:
        import open_clip

        from chaindiff.encoders.clip_emoji import open_clip_folder

        with _without_code(where):
            named = "hf_model_name" in text
            return open_clip_folder(folder) if named else open_clip.create_model(f"local-dir:{folder}")

    def tokenizer() -> Any:
        return _load_tokenizer(f"local-dir:{folder}", text, where)

    return Files(config, _preprocessing(preprocessing), weights, create, tokenizer, _tokenizer(folder))


def placed(spec: OpenClipSpec, text: bool) -> dict[str, str]:
    """Digests of the files of a model that a recipe gives by path, where they exist; of a text tower's tokenizer too.

    Embedded models and open_clip's tags are identified by name: nothing is loaded or downloaded here.
    """
    if (folder := placed_folder(spec.model)) is None:
        file = user_path(spec.pretrained or "")
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
    file = user_path(spec.pretrained, f"{where}.pretrained")
    tag: dict[str, Any] = {}
    if spec.pretrained in tags:
        tag = open_clip.get_pretrained_cfg(spec.model, spec.pretrained)
        file = _fetch(spec, tag, where)
    elif not file.is_file():
        message = f"'{spec.pretrained}' is neither a weights file nor a tag of '{spec.model}'"
        raise UserError(message + did_you_mean(spec.pretrained, tags), f"{where}.pretrained")
    text = config["text_cfg"]

    def announce(part: str) -> None:
        if (name := text.get(f"hf_{part}_name")) and cached(name) is None:
            say(f"downloading the text {part} of '{spec.model}' from {_address(name)}")

    def create() -> Any:
        announce("model")
        with _without_code(f"{where}.model"):
            return open_clip.create_model(spec.model, pretrained=str(file), force_quick_gelu=quick)

    def tokenizer() -> Any:
        announce("tokenizer")
        return _load_tokenizer(spec.model, text, f"{where}.model")

    # OpenAI's models were trained with a faster approximation of GELU: the tag implies it, the model's name may not.
    quick = bool(tag.get("quick_gelu", config.get("quick_gelu", False)))
    return Files({**config, "quick_gelu": quick}, _preprocessing(tag), file, create, tokenizer)


@contextmanager
def _without_code(where: str) -> Iterator[None]:
    """What is loaded runs no Python of the model's own, nor does transformers ask at the terminal whether it may."""
    from transformers import dynamic_module_utils as remote

    patience, remote.TIME_OUT_REMOTE_CODE = remote.TIME_OUT_REMOTE_CODE, 0
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        hint = "use a model whose configuration has no `auto_map`"
        raise UserError("the model comes with Python code to run, which chaindiff never does", where, hint) from error
    finally:
        remote.TIME_OUT_REMOTE_CODE = patience


def _load_tokenizer(model: str, text: dict[str, Any], where: str) -> Any:
    import open_clip

    # open_clip's own tokenizer has no such option.
    options: dict[str, Any] = {"trust_remote_code": False} if text.get("hf_tokenizer_name") else {}
    with _without_code(where):
        return open_clip.get_tokenizer(model, **options)


# ------------------------------------------------------------ the hub


def _address(repository: str) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repository}"


def cached(repository: str, revision: str | None = None) -> Path | None:
    """The folder of a repository of the hub in this machine's cache, named after its commit; asks no network."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, revision=revision, local_files_only=True))
    except (OSError, ValueError):  # it is not there, or no name of a repository
        return None


def pinned(spec: OpenClipSpec) -> str | None:
    """The model with the commit that is used of it, `hf-hub:org/name@commit`; None if no commit is known offline."""
    repository, _, revision = spec.model.removeprefix(HUB).partition("@")
    folder = cached(repository, revision or None) if spec.model.startswith(HUB) else None
    return folder and f"{HUB}{repository}@{folder.name}"


def _fetch_model(model: str, where: str) -> Path:
    """The folder of `hf-hub:org/name@revision`: what the cache holds, else what the hub has."""
    from huggingface_hub import snapshot_download

    repository, _, revision = model.removeprefix(HUB).partition("@")
    folder = cached(repository, revision or None)
    if folder is not None and any((folder / name).is_file() for name in WEIGHTS):
        return folder
    say(f"downloading the model '{repository}'{f' at {revision}' * bool(revision)} from {_address(repository)}")
    with _fetching(f"the model '{model}' is", f"{where}.model"):
        for weights in ("*.safetensors", "*.bin"):
            wanted = [name for name in WEIGHTS if name.endswith(weights[1:])]
            patterns = [*HUB_FILES, *wanted]
            folder = Path(snapshot_download(repository, revision=revision or None, allow_patterns=patterns))
            if any((folder / name).is_file() for name in wanted):
                break
    assert folder is not None
    return folder


def _fetch(spec: OpenClipSpec, tag: dict[str, Any], where: str) -> Path:
    from open_clip import download_pretrained

    repository = "/".join(tag.get("hf_hub", "").split("/")[:2])
    if not repository or cached(repository) is None:
        source = _address(repository) if repository else tag.get("url", "its file")
        say(f"weights '{spec.pretrained}' of '{spec.model}': from {source}, unless they were downloaded before")
    with _fetching(f"the weights '{spec.pretrained}' of '{spec.model}' are", f"{where}.pretrained"):
        return Path(download_pretrained(tag))


@contextmanager
def _fetching(what: str, where: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the hub's client raises many types when there is no network
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{what} not here and cannot be downloaded: {reason}",
            where,
            "download them where there is a network and set pretrained to the file, or use a local model: "
            "a folder with open_clip_config.json, or clip_emoji (embedded)",
        ) from error


def _preprocessing(own: dict[str, Any]) -> dict[str, Any]:
    default = PreprocessConfig()
    return {name: own.get(name, getattr(default, name)) for name in PREPROCESSING}
