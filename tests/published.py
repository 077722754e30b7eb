"""Snapshots in the published layout, made for tests: what NVIDIA's `torch_utils.persistence` and `dnnlib` pickle.

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

from torch import Tensor, nn

SOURCE = "raise SystemExit('the source text of a snapshot was executed')"
BUFFERS = {"resample_filter", "freqs", "u"}
CONTAINERS = {"enc", "dec"}


def reconstruct(meta: dict[str, Any]) -> Any:
    raise AssertionError("a snapshot was executed")


class EasyDict(dict):
    pass


reconstruct.__module__, reconstruct.__name__ = "torch_utils.persistence", "_reconstruct_persistent_obj"
reconstruct.__qualname__ = reconstruct.__name__
EasyDict.__module__ = "dnnlib.util"


@contextmanager
def published_modules() -> Iterator[None]:
    contents = {
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
