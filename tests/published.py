"""Snapshots in the published layouts, made for tests: what `torch_utils.persistence`, `dnnlib` and VCDM pickle.

The modules that snapshots name exist only while one is written.
"""

from __future__ import annotations

import copy
import io
import pickle
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch
from einops.layers.torch import Rearrange
from torch import Tensor, nn

SOURCE = "raise SystemExit('the source text of a snapshot was executed')"
BUFFERS = {"resample_filter", "freqs", "phases", "u"}
CONTAINERS = {"enc", "dec"}


def reconstruct(meta: dict[str, Any]) -> Any:
    raise AssertionError("a snapshot was executed")


class EasyDict(dict):
    pass


reconstruct.__module__, reconstruct.__name__ = "torch_utils.persistence", "_reconstruct_persistent_obj"
reconstruct.__qualname__ = reconstruct.__name__
EasyDict.__module__ = "dnnlib.util"


def stand_in(module: str, name: str, base: type = nn.Module) -> type:
    return type(name, (base,), {"__module__": module})


DALLE2 = {
    name: stand_in("training.networks.dalle2", name)
    for name in (
        *("DALLE2CLIPModel", "CausalTransformer", "Attention", "LayerNorm", "SwiGLU", "RelPosBias", "MLP"),
        "SinusoidalPosEmb",
    )
}
ROTARY = "rotary_embedding_torch.rotary_embedding_torch"
Rotary = stand_in(ROTARY, "RotaryEmbedding")
Structure, StructuredArgument = (stand_in("training.structure", n, object) for n in ("Structure", "StructuredArgument"))


@contextmanager
def published_modules() -> Iterator[None]:
    contents = {
        "training": {},
        "training.structure": {"Structure": Structure, "StructuredArgument": StructuredArgument},
        "training.networks": {},
        "training.networks.dalle2": DALLE2,
        "rotary_embedding_torch": {},
        ROTARY: {"RotaryEmbedding": Rotary},
        "torch_utils": {},
        "torch_utils.persistence": {"_reconstruct_persistent_obj": reconstruct},
        "dnnlib": {},
        "dnnlib.util": {"EasyDict": EasyDict},
    }
    for name, content in contents.items():
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(content)
    try:
        yield
    finally:
        for name in contents:
            del sys.modules[name]


class Persistent:
    """An object of a class under `@persistence.persistent_class`."""

    def __init__(self, class_name: str, *args: Any, **kwargs: Any):
        super().__init__()
        self.__dict__["_name"] = class_name
        self._init_args, self._init_kwargs = copy.deepcopy(args), copy.deepcopy(kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        state = {k: v for k, v in self.__dict__.items() if k != "_name"}
        meta = {"type": "class", "version": 6, "module_src": SOURCE, "class_name": self._name, "state": state}
        return reconstruct, (meta,), None


class PersistentModule(Persistent, nn.Module):
    pass


def module(class_name: str, kwargs: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> PersistentModule:
    """A module with these tensors by full name; inner ones are persistent too, but for the dictionaries of layers."""
    made = PersistentModule(class_name, **kwargs)
    fill(made, tensors)
    return made


def fill(parent: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    inner: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        first, dot, rest = name.partition(".")
        if dot:
            inner.setdefault(first, {})[rest] = value
        elif first in BUFFERS:
            parent.register_buffer(first, value)
        else:
            parent.register_parameter(first, nn.Parameter(value, requires_grad=False))
    for name, part in inner.items():
        child = nn.ModuleDict() if name in CONTAINERS else PersistentModule("Layer")
        fill(child, part)
        parent.add_module(name, child)


def vcdm(model: nn.Module, shapes: list[list[int]], generated: int, **attributes: Any) -> PersistentModule:
    """VCDM's EDMPrecond around a model."""
    made = PersistentModule("EDMPrecond", structure(shapes, generated), use_fp16=False)
    made.__dict__ |= {"structure": structure(shapes, generated), "use_fp16": False, "sigma_min": 0, "sigma_data": 0.5}
    made.__dict__ |= {"sigma_max": float("inf"), "pred_x0": (int(generated == 1),), "noise_mult": 1, **attributes}
    made.add_module("model", model)
    return made


def structure(shapes: list[list[int]], generated: int) -> Any:
    latent = np.array([index == generated for index in range(len(shapes))], dtype=np.uint8)
    made = Structure()
    made.shapes = [torch.Size(shape) for shape in shapes]
    made.exist, made.latent, made.observed = np.ones_like(latent), latent, 1 - latent
    made.is_onehot, made.names = [False] * len(shapes), [str(index) for index in range(len(shapes))]
    example = StructuredArgument()
    example.arg, example.structure = tuple(torch.zeros(1, *shape) for shape in shapes), made
    made.example = example
    return made


# The modules of VCDM's auxiliary network by the ends of their names; layers with weights are torch's own.
AUXILIARY = {"causal_transformer": "CausalTransformer", "rel_pos_bias": "RelPosBias", "norm": "LayerNorm"}


def auxiliary(tensors: Mapping[str, Tensor]) -> nn.Module:
    """VCDM's auxiliary network: plain modules, whose layers share a rotary embedding."""
    rotary = Rotary()
    rotary.register_buffer("cached", torch.zeros(3), persistent=False)

    def made(path: tuple[str, ...]) -> nn.Module:
        prefix = "".join(f"{part}." for part in path)
        inner = [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]
        values = {name: tensors[prefix + name] for name in inner if "." not in name}
        children = [*dict.fromkeys(name.split(".")[0] for name in inner if "." in name)]
        last = path[-1] if path else ""
        if last == "rotary_emb":
            result = rotary
        elif "weight" in values:
            rows, columns = values["weight"].shape
            linear = nn.Linear(columns, rows, "bias" in values)
            result = nn.Embedding(rows, columns) if "attention_bias" in last else linear
        elif "to_q" in children:
            result = DALLE2["Attention"]()
        elif children and all(child.isdigit() for child in children):
            result = nn.ModuleList() if last in ("layers", "net") else nn.Sequential()
        else:
            kind = "DALLE2CLIPModel" if not path else "LayerNorm" if "g" in values else "MLP"
            result = DALLE2[AUXILIARY.get(last, kind)]()
        for name, value in values.items():
            parameter = nn.Parameter(value, requires_grad=False)
            result.register_buffer(name, value) if name == "freqs" else result.register_parameter(name, parameter)
        for child in children:
            result.add_module(child, made((*path, child)))
        return result

    model = made(())
    model.rearrange, model.activation = Rearrange("b (n d) -> b n d", n=1), nn.SiLU()  # without weights
    model.gate, model.drop, model.sinusoids = DALLE2["SwiGLU"](), nn.Dropout(0.1), DALLE2["SinusoidalPosEmb"]()
    return model


def plain(class_name: str, **state: Any) -> Persistent:
    made = Persistent(class_name)
    made.__dict__.update(state)
    return made


def snapshot(ema: Any, protocol: int = 4, **others: Any) -> bytes:
    """The bytes of {ema, loss_fn, augment_pipe, dataset_kwargs}."""
    content = {
        "ema": ema,
        "loss_fn": plain("EDMLoss", P_mean=-1.2, P_std=1.2, sigma_data=0.5),
        "augment_pipe": plain("AugmentPipe", p=0.15, xflip=1e8, yflip=1, scale=1, rotate_frac=1, aniso=1),
        "dataset_kwargs": EasyDict(class_name="training.dataset.ImageFolderDataset", path="x.zip", use_labels=False),
        **others,
    }
    with published_modules():
        file = io.BytesIO()
        pickle.dump(content, file, protocol)
        return file.getvalue()
