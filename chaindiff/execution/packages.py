"""Compiled networks, kept in the user's cache between processes: AOTInductor packages with frozen weights.

A package is a shared object, so only the user's own are loaded: from a folder, and of files, that belong to the user
and that nobody else can write. It is named after what it was made of and after its own digest.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import nn

from chaindiff.execution.machine import machine
from chaindiff.execution.runner import Call, Flat, example, flat
from chaindiff.io.digest import digest
from chaindiff.io.files import cache_folder, regular
from chaindiff.networks.interface import Interface

LIMIT = 4 << 30  # bytes of all packages; what was not used for longest is deleted first
FREEZE: dict[str, Any] = {"freezing": True}  # weights are constants: cast and laid out for convolutions once
OLD = 86_400  # seconds after which a package that is still being built is a killed process's


class UntrustedError(Exception):
    """The folder of packages is not the user's alone."""


def folder() -> Path:
    """The folder of packages, made if there is none. Raises UntrustedError if others could have written it."""
    path = cache_folder() / "packages"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _own(path):
            raise UntrustedError(f"{path} is not yours alone: others own it or can write to it")
    except OSError as error:
        raise UntrustedError(f"{path}: {error.strerror or error}") from error
    return path


def _own(path: Path) -> bool:
    """Whether a folder or file is this user's, and no link, and nobody else can write it."""
    status = os.lstat(path)
    return status.st_uid == os.getuid() and not status.st_mode & 0o022 and not stat.S_ISLNK(status.st_mode)


def shape_key(spec: BaseModel, interface: Interface, device: torch.device) -> str:
    """Equal for networks that take equally long here: of one spec and interface, with any weights."""
    return digest([spec.model_dump(mode="json"), asdict(interface), machine(device)])


def weights_key(module: nn.Module) -> str:
    """A digest of a module's parameters and buffers."""
    found = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()[:16]


def find(key: str) -> Path | None:
    """The package of this key, if there is a whole one. Raises UntrustedError."""
    for path in sorted(folder().glob(f"{key}.*.pt2")):
        with suppress(OSError):
            if _own(path) and path.name == f"{key}.{_content(path)}.pt2":
                return path
            path.unlink()  # damaged: it is built again
    return None


def _content(path: Path) -> str:
    with regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


def load(path: Path, device: torch.device) -> Call:
    """A package as a function of a list of tensors. Torch's own loader without the slow import of its compiler."""
    os.utime(path)
    index = -1 if device.index is None else device.index
    return torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, index).run  # type: ignore[attr-defined]


def build(
    key: str, network: nn.Module, interface: Interface, rows: int, dtype: torch.dtype | None, device: torch.device
) -> Path:
    """Compile a network for `rows` samples at a time, and keep it. Raises what torch raises, and UntrustedError."""
    inputs = flat(*example(interface, rows, device))
    with torch.no_grad(), tempfile.TemporaryDirectory(prefix=".building-", dir=folder()) as place:
        program = torch.export.export(Flat(network, interface, dtype).eval(), (inputs,), strict=False)
        made = Path(place) / "network.pt2"
        torch._inductor.aoti_compile_and_package(program, package_path=str(made), inductor_configs=FREEZE)
        made.chmod(0o600)
        kept = made.replace(folder() / f"{key}.{_content(made)}.pt2")
    _prune()
    return kept


def _prune() -> None:
    """Delete the packages that were not used for longest, above the limit, and what killed processes left."""
    with suppress(OSError):
        paths = sorted(folder().glob("*.pt2"), key=lambda path: path.stat().st_mtime, reverse=True)
        total = 0
        for path in paths:
            total += path.stat().st_size
            if total > LIMIT and path != paths[0]:
                path.unlink()
        for path in folder().glob(".building-*"):
            if path.stat().st_mtime < time.time() - OLD:
                shutil.rmtree(path)
