"""Files of a stage: weights with their configuration, and the whole state of a training run. Atomic, never pickled.

They are safetensors files, written here so that the same tensors and metadata always give the same bytes (the format's
own writer orders its metadata at random), with a checksum of the whole file in the metadata.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from chaindiff.io.errors import UserError, some
from chaindiff.io.files import regular, regular_path, whole
from chaindiff.io.metadata import DAMAGED

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
CHECKSUM = "crc32"
SUM = re.compile(rb'"crc32":"([^"]*)"')  # nowhere else in a header: within a text its quotes are escaped
NONE = "00000000"  # stands in for the checksum while it is computed
HEADER_BYTES = 16 << 20  # the header of a hundred thousand tensors
PIECE = 1 << 24  # bytes read at once


def save(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], before: Path | None = None) -> None:
    """Write a safetensors file as `files.whole` does, one tensor in memory at a time; raises what that raises,
    and UserError for a dtype that is not supported.
    """
    plain = {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}
    header: dict[str, Any] = {"__metadata__": dict(sorted({**plain, CHECKSUM: NONE}.items()))}
    if strange := [name for name in tensors if tensors[name].dtype not in DTYPES]:
        raise UserError(f"cannot write {path}: '{strange[0]}' is of {tensors[strange[0]].dtype}")
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))  # which aligns them
    end = 0
    for name in names:
        tensor, start = tensors[name], end
        end += tensor.numel() * tensor.itemsize
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"))
    first = (text + " " * (-len(text) % 8)).encode()
    checksum = zlib.crc32(first)
    with whole(path, before) as file:
        file.write(len(first).to_bytes(8, "little") + first)
        for name in names:
            data = tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
            checksum = zlib.crc32(data, checksum)
            file.write(data)
        file.seek(8)
        file.write(first.replace(f'"{CHECKSUM}":"{NONE}"'.encode(), f'"{CHECKSUM}":"{checksum:08x}"'.encode()))


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with regular(path) as start:
            if HEADER_BYTES < int.from_bytes(start.read(8), "little") < path.stat().st_size:
                raise SafetensorError(f"its header is longer than {HEADER_BYTES >> 20} MiB")
        with safe_open(regular_path(path), "pt") as file:
            yield file
    except FileNotFoundError as error:
        raise UserError(f"there is no weights file {path}") from error
    except (SafetensorError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"{path} is not a complete safetensors file: {reason}", hint=DAMAGED) from error


def _metadata(file: Any) -> dict[str, str]:
    return {k: v for k, v in (file.metadata() or {}).items() if k != CHECKSUM}


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, mapped into memory, and metadata of a safetensors file.

    Raises UserError if it is missing, truncated, damaged or something else.
    """
    with _opened(path) as file:
        status = path.stat()
        if not _intact(path, status.st_size, status.st_mtime_ns):
            raise SafetensorError("its checksum does not match its content")
        return {k: file.get_tensor(k) for k in file.keys()}, _metadata(file)  # noqa: SIM118


@cache
def _intact(path: Path, size: int, changed: int) -> bool:
    """Whether a file matches the checksum in its metadata, if it has one; computed once per process."""
    with regular(path) as file:
        first = file.read(int.from_bytes(file.read(8), "little"))
        said = SUM.search(first)
        if said is None:
            return True
        checksum = zlib.crc32(first.replace(said[0], f'"{CHECKSUM}":"{NONE}"'.encode()))
        while piece := file.read(PIECE):
            checksum = zlib.crc32(piece, checksum)
    return said[1] == f"{checksum:08x}".encode()


def shapes(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What `load` gives, with tensors on the meta device: only the file's header is read; raises what `load` raises."""
    with _opened(path) as file:
        sizes = {k: file.get_slice(k).get_shape() for k in file.keys()}  # noqa: SIM118
        return {k: torch.empty(size, device="meta") for k, size in sizes.items()}, _metadata(file)


def metadata(path: Path) -> dict[str, str]:
    """The metadata alone, without reading tensors; raises what `load` raises."""
    with _opened(path) as file:
        return _metadata(file)


def fill(module: torch.nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Load a module's tensors by name. Raises UserError naming what is missing, left over or of another shape."""
    if problems := misfits(module, tensors):
        hint = "the file belongs to another network, or to other given variables"
        raise UserError(f"{where} does not fit this stage: {some(problems, 3)}", hint=hint)
    module.load_state_dict(dict(tensors))


def misfits(module: torch.nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """What is missing, left over or of another shape, if these tensors should be a module's."""
    own = module.state_dict()
    wrong = [f"missing {name}" for name in sorted(own.keys() - tensors.keys())]
    wrong += [f"unexpected {name}" for name in sorted(tensors.keys() - own.keys())]
    shapes = {name: (list(tensors[name].shape), list(own[name].shape)) for name in own if name in tensors}
    return wrong + [f"{name} is {given}, expected {ours}" for name, (given, ours) in shapes.items() if given != ours]
