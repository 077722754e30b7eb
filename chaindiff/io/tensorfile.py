"""Files of a stage: weights with their configuration, and the whole state of a training run. Atomic, never pickled."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from chaindiff.io.errors import UserError
from chaindiff.io.files import regular, whole
from chaindiff.io.metadata import DAMAGED


def save(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write a safetensors file as `files.whole` does, flushed to the disk; raises what that raises."""
    plain = {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}
    with whole(path) as temporary:
        try:
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, plain)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # safetensors writes for the owner alone


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files of processes that were killed while writing, each as large as a checkpoint."""
    for path in folder.glob(".*.safetensors.*.tmp"):
        path.unlink(missing_ok=True)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(regular(path), "pt") as file:
            yield file
    except FileNotFoundError as error:
        raise UserError(f"there is no weights file {path}") from error
    except (SafetensorError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"{path} is not a complete safetensors file: {reason}", hint=DAMAGED) from error


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file. Raises UserError if it is missing, truncated or of another format."""
    with _opened(path) as file:
        return {k: file.get_tensor(k) for k in file.keys()}, file.metadata() or {}  # noqa: SIM118


def shapes(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What `load` gives, with tensors on the meta device: only the file's header is read; raises what `load` raises."""
    with _opened(path) as file:
        sizes = {k: file.get_slice(k).get_shape() for k in file.keys()}  # noqa: SIM118
        return {k: torch.empty(size, device="meta") for k, size in sizes.items()}, file.metadata() or {}


def metadata(path: Path) -> dict[str, str]:
    """The metadata alone, without reading tensors; raises what `load` raises."""
    with _opened(path) as file:
        return file.metadata() or {}


def fill(module: torch.nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Load a module's tensors by name. Raises UserError naming what is missing, left over or of another shape."""
    own = module.state_dict()
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    shapes = [
        f"{k} is {list(tensors[k].shape)}, expected {list(v.shape)}"
        for k, v in own.items()
        if k in tensors and tensors[k].shape != v.shape
    ]
    problems = [f"missing {k}" for k in missing] + [f"unexpected {k}" for k in extra] + shapes
    if problems:
        raise UserError(
            f"{where} does not fit this stage: {'; '.join(problems[:3])}"
            + (f"; and {len(problems) - 3} more" if len(problems) > 3 else ""),
            hint="the file belongs to another network, or to other given variables",
        )
    module.load_state_dict(dict(tensors))
