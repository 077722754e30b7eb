"""Values given on the command line, as tensors: class names, numbers, images, embeddings in files."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chaindiff.chain.request import Value
from chaindiff.chain.variable import Variable
from chaindiff.data import ImageData, open_data
from chaindiff.data.sources import IMAGES, Folder
from chaindiff.io import tensorfile
from chaindiff.io.errors import UserError, did_you_mean
from chaindiff.io.files import regular_path, user_path
from chaindiff.recipe.assembly import Assembly
from chaindiff.specs.recipe import DataSpec, FileSpec


def read_given(assembly: Assembly, given: Mapping[str, Any], count: int | None = None) -> dict[str, Value]:
    """Values of given variables, [1, *shape] or [rows, *shape].

    A label is a class's name or number, a text is itself, and of both there may be a list. An image is a file or
    folder. Anything that an encoder computes from images (clusters too) can be given as an image, which is then
    encoded; or as numbers in a .safetensors or .npy file.
    Raises UserError for unknown variables, classes and files, and with a `count` unless there are one row or `count`.
    """
    values: dict[str, Value] = {}
    for name, value in given.items():
        variable = _variable(assembly, name)
        text = variable.kind == "text"
        values[name] = _texts(assembly, name, value) if text else _read(assembly, variable, value)
        if count is not None:
            _check_rows(name, values[name], count)
    return values


def check_given(assembly: Assembly, given: Mapping[str, Any]) -> None:
    """The checks that need no fitted encoders: raises UserError for unknown variables, classes and files."""
    for name, value in given.items():
        variable = _variable(assembly, name)
        # Of a text, any words will do.
        found = _checked(assembly, variable, value) if variable.kind != "text" else value
        if isinstance(found, Tensor | list):
            _check_rows(name, found, assembly.recipe.sample.count)


def _check_rows(name: str, rows: Sized, count: int) -> None:
    if len(rows) not in (1, count):
        hint = f"give one for all samples, or one for each: sample.count={len(rows)}"
        raise UserError(f"{len(rows)} values for {count} samples", f"--given {name}", hint)


def _texts(assembly: Assembly, name: str, value: Any) -> list[str]:
    """A text enters the chain through its encodings; some stage must be conditioned on one."""
    specs, texts = assembly.recipe.variables, value if isinstance(value, list) else [value]
    used = {variable.name for stage in assembly.recipe.stages for variable, _ in assembly.stages[stage].links}
    encodings = [n for n, spec in specs.items() if n in used and spec.reads == name]
    if not encodings:
        raise UserError(f"--given {name}: no stage is conditioned on an encoding of this text")
    return [str(text) for text in texts]


def _variable(assembly: Assembly, name: str) -> Variable:
    if name not in assembly.variables:
        raise UserError(f"--given {name}: no such variable{did_you_mean(name, assembly.variables)}")
    return assembly.variables[name]


def _checked(assembly: Assembly, variable: Variable, value: Any) -> Tensor | Path:
    """A class as a tensor, or the path of a file to read."""
    where = f"--given {variable.name}"
    if isinstance(value, Tensor):
        return value
    classes = value if isinstance(value, list) else [value]
    if variable.kind == "label" and (
        assembly.recipe.variables[variable.name].encoder is None
        or all(str(one).removeprefix("-").isdecimal() for one in classes)
    ):
        return torch.tensor([_class(assembly, variable, one, where) for one in classes])
    path = user_path(str(value), where)
    if not path.exists():
        raise UserError(
            f"there is no file or folder {path}",
            where,
            f"give {variable} as {'a class, ' if variable.kind == 'label' else ''}an image, a folder of images, "
            "or numbers in a .safetensors or .npy file",
        )
    encoder = assembly.recipe.variables[variable.name].encoder
    if isinstance(encoder, FileSpec) and _shows_images(path):
        raise UserError(
            f"{path} cannot be encoded: '{variable.name}' is of {encoder.path}, which knows only the data's images",
            where,
            f"give numbers: a .safetensors or .npy file with [rows, {', '.join(map(str, variable.shape))}]",
        )
    return path


def _shows_images(path: Path) -> bool:
    return path.is_dir() or path.suffix.lower() in {*IMAGES, ".zip"}


def _read(assembly: Assembly, variable: Variable, value: Any) -> Tensor:
    where, path = f"--given {variable.name}", _checked(assembly, variable, value)
    if isinstance(path, Tensor):
        return path
    if _shows_images(path):
        return _encode(assembly, variable, path, where)
    tensor = _numbers(path, variable, where)
    if path.suffix == ".safetensors":
        _check_said(assembly, variable, path, tensorfile.metadata(path).get("identity"), where)
    if not bool(tensor.isfinite().all()):
        raise UserError(f"{path} holds numbers that are not finite (NaN or infinity)", where)
    if variable.kind == "label" and tensor.ndim == 1:  # as samples are saved
        return torch.tensor([_class(assembly, variable, int(number), where) for number in tensor])
    tensor = tensor[None] if tuple(tensor.shape) == variable.shape else tensor
    if tuple(tensor.shape[1:]) != variable.shape:
        raise UserError(f"{path} holds {list(tensor.shape)}; expected [rows, *{list(variable.shape)}]", where)
    if variable.kind == "image" and tensor.numel() and float(tensor.abs().max()) > 1.01:
        low, high = float(tensor.min()), float(tensor.max())
        raise UserError(f"{path} holds numbers from {low:g} to {high:g}; images lie in [-1, 1]", where)
    return tensor


def _check_said(assembly: Assembly, variable: Variable, path: Path, said: str | None, where: str) -> None:
    """Raises UserError if a file, such as a file of samples, says in its metadata that it is of another variable."""
    spec, version = assembly.recipe.variables[variable.name].encoder, assembly.versioned(variable.name).version
    identity, _, then = (said or variable.identity).partition(" ")
    same = identity == variable.identity and (then == version or not (then and version))
    if not same and not (isinstance(spec, FileSpec) and said == spec.called):
        hint = "another encoder made it, or another fit; give what this recipe makes, or numbers without an `identity`"
        raise UserError(f"{path} is of another '{variable.name}': its metadata says `identity: {said}`", where, hint)


def _class(assembly: Assembly, variable: Variable, value: Any, where: str) -> int:
    """The class of a number, whether or not the data is there, or of a name in the data."""
    if str(value) in map(str, range(*variable.shape)):
        return int(value)
    names = assembly.columns[variable.name].classes
    if str(value) in names:
        return names.index(str(value))
    raise UserError(f"'{value}' is not a class of {variable.name}{did_you_mean(str(value), names)}", where)


def _encode(assembly: Assembly, variable: Variable, path: Path, where: str) -> Tensor:
    """Read images as the variable itself, or as what its encoder reads, and so on up."""
    if variable.kind == "image":
        return _images(path, variable)
    source = assembly.recipe.variables[variable.name].reads
    if source is None:
        raise UserError(f"{path} is an image, but no encoder computes {variable} from images", where)
    value = _encode(assembly, assembly.variables[source], path, where)
    with torch.no_grad():
        return assembly.encoders[variable.name].build()(value)


def _images(path: Path, variable: Variable) -> Tensor:
    if path.suffix.lower() in IMAGES and not path.is_dir():
        data = ImageData(Folder(path.parent), {path.name: {}}, [], path.stem)
    else:
        data = open_data(DataSpec(path=str(path)))
    return data.images(range(len(data)), variable.shape[-1], variable.shape[0]).float() / 127.5 - 1


def _numbers(path: Path, variable: Variable, where: str) -> Tensor:
    try:
        if path.suffix == ".npy":
            found = np.load(regular_path(path), allow_pickle=False)
            if np.iscomplexobj(found):
                raise ValueError("its numbers are complex")
            return torch.from_numpy(found).float()
        tensors, _ = tensorfile.load(path)
    except Exception as error:  # the readers raise many kinds of errors for other or truncated files
        reason = str(error.__cause__ or error) or type(error).__name__
        raise UserError(f"{path} is not a complete .safetensors or .npy file of numbers: {reason}", where) from error
    if variable.name in tensors:
        return tensors[variable.name].float()
    if len(tensors) == 1:
        return next(iter(tensors.values())).float()
    raise UserError(f"{path} holds no tensor '{variable.name}'{did_you_mean(variable.name, tensors)}", where)
