"""Read a pickle as data. Its opcodes are interpreted here; nothing that it names is imported, called or evaluated.

A pickle is a program for a small stack machine. `pickletools` (standard library) decodes its opcodes, bounded by the
bytes of the file; the machine below builds plain values, and inert records where the program would call something
on an explicit list of names. Everything off that list is refused by name, before anything is made of it. Python's own
`pickle.Unpickler` would not do even with a closed `find_class`: it allocates what a length or memo index claims before
it reads, it sets attributes of whatever BUILD is pointed at, and it hashes keys of any depth.
"""

from __future__ import annotations

import io
import math
import mmap
import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from chaindiff.io.errors import UserError
from chaindiff.io.files import regular

Table = Mapping[str, Callable[[str, tuple], Any]]  # a global's name -> what stands for a call of it

DIMENSIONS = 8  # of a tensor, at most
HEADER = 200  # opcodes in one part of a storage's header, at most; torch writes about 20
OPCODES = 1_000_000  # of a snapshot, at most, for each byte may make an object; published ones have some 100,000
BITS = 128  # of a whole number, at most
KEY_BITS = 20  # of one that is a key: larger ones can be chosen so that a dictionary looks for each among all others


class Refused(ValueError):
    """Content that this reader does not accept, named in the message."""


# ------------------------------------------------------------ what a pickle becomes


@dataclass(frozen=True)
class Global:
    """A name that the program refers to, as text."""

    name: str


@dataclass
class Object:
    """Something made by a call on the list: never called, only recorded."""

    name: str
    arguments: tuple[Any, ...]
    state: Any = None


@dataclass(frozen=True)
class Storage:
    """The elements behind tensors."""

    dtype: torch.dtype
    data: memoryview

    @property
    def count(self) -> int:
        return len(self.data) // self.dtype.itemsize


@dataclass(frozen=True)
class Array:
    """A tensor, as a view of a storage within its bounds."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.size) * self.storage.dtype.itemsize

    def tensor(self) -> Tensor:
        """A tensor with memory of its own."""
        if not self.bytes:
            return torch.empty(self.size, dtype=self.storage.dtype)
        width = self.storage.dtype.itemsize
        last = self.offset + sum((n - 1) * s for n, s in zip(self.size, self.stride, strict=True))
        part = bytearray(self.storage.data[self.offset * width : (last + 1) * width])
        return torch.frombuffer(part, dtype=self.storage.dtype).as_strided(self.size, self.stride).contiguous()


# Stand-ins for calls, given the name and its arguments unchanged, so that repetition copies nothing.


def _object(name: str, arguments: tuple) -> Object:
    return Object(name, arguments)


def _mapping(name: str, arguments: tuple) -> dict[Any, Any]:
    if arguments:
        raise Refused(f"{name} with arguments")
    return {}


def _items(name: str, arguments: tuple) -> Any:
    return arguments[0] if arguments else []  # a set is read as the list of its items: nothing is hashed


def _persistent(name: str, arguments: tuple) -> Object:
    """An object of NVIDIA's `torch_utils.persistence`: its class's name and state; its source text is dropped."""
    (meta,) = arguments
    if not (isinstance(meta, dict) and isinstance(meta.get("class_name"), str) and isinstance(meta.get("state"), dict)):
        raise Refused("an object of torch_utils.persistence has no class name or state")
    return Object(meta["class_name"], (), meta["state"])


def _array(name: str, arguments: tuple) -> Array:
    """A tensor's view, checked against its storage."""
    storage, offset, size, stride = arguments[:4]
    if not isinstance(storage, Storage) or not (isinstance(size, tuple) and isinstance(stride, tuple)):
        raise Refused("a tensor without a storage or shape")
    if len(size) != len(stride) or len(size) > DIMENSIONS:
        raise Refused(f"a tensor of {len(size)} dimensions and {len(stride)} strides")
    if not all(type(n) is int and 0 <= n < 2**63 for n in (offset, *size, *stride)):
        raise Refused("a tensor whose shape is not made of whole numbers")
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if 0 not in size and (math.prod(size) > storage.count or last >= storage.count):
        raise Refused(f"a tensor of {math.prod(size):.3g} elements in a storage of {storage.count}")
    return Array(storage, offset, size, stride)


def _parameter(name: str, arguments: tuple) -> Array:
    if not isinstance(arguments[0], Array):
        raise Refused("a parameter without a tensor")
    return arguments[0]


# ------------------------------------------------------------ storages: torch's format from before its zip files

MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001  # of torch.save(..., _use_new_zipfile_serialization=False)
DTYPES = {
    "torch.FloatStorage": torch.float32, "torch.DoubleStorage": torch.float64, "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16, "torch.LongStorage": torch.int64, "torch.IntStorage": torch.int32,
    "torch.ByteStorage": torch.uint8, "torch.BoolStorage": torch.bool,
}  # fmt: skip
STORAGES: Table = dict.fromkeys(DTYPES, _object)


def _storage(name: str, arguments: tuple) -> Storage:
    """A storage that was pickled by itself: five short pickles, the number of elements, the elements."""
    (blob,) = arguments
    if not isinstance(blob, bytes):
        raise Refused("a storage without bytes")
    if blob.startswith(b"PK"):
        raise Refused("a storage in a zip archive; snapshots use torch's older format")
    stream = io.BytesIO(blob)
    parts = [interpret(stream, STORAGES, persistent=True, most=HEADER) for _ in range(5)]
    magic, version, system, found, keys = parts
    if (magic, version) != (MAGIC, VERSION) or not isinstance(system, dict) or system.get("little_endian") is not True:
        raise Refused("a storage that is not in torch's older format, little-endian")
    if not (isinstance(found, Object) and found.name == "persistent id" and len(found.arguments) == 6):
        raise Refused("a storage with another object in its place")
    kind, dtype, key, _, count, view = found.arguments
    if kind != "storage" or not isinstance(dtype, Global) or keys != [key] or view is not None:
        raise Refused("a storage that is a part of another one")
    start, data = stream.tell() + 8, memoryview(blob)
    said, width = int.from_bytes(data[start - 8 : start], "little"), DTYPES[dtype.name].itemsize
    if said != count or len(data) - start != count * width:
        raise Refused(f"a storage that claims {said} elements in {max(0, len(data) - start)} bytes")
    return Storage(DTYPES[dtype.name], data[start:])


# ------------------------------------------------------------ the list

NUMPY = ("_reconstruct", "scalar")
SNAPSHOT: Table = {
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent,
    "dnnlib.util.EasyDict": _mapping,
    "collections.OrderedDict": _mapping,
    "builtins.set": _items,
    "torch._utils._rebuild_tensor_v2": _array,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.storage._load_from_bytes": _storage,
    **{f"torch.nn.modules.container.{name}": _object for name in ("ModuleDict", "ModuleList", "Sequential")},
    **{f"numpy.{core}.multiarray.{name}": _object for core in ("core", "_core") for name in NUMPY},
    "numpy.ndarray": _object,
    "numpy.dtype": _object,
}


# ------------------------------------------------------------ the machine

LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
    *("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": list}


def interpret(stream: IO[bytes], table: Table, persistent: bool = False, most: int = OPCODES) -> Any:
    """The value of one pickle, up to its STOP.

    `table` lists the globals that may be named; `persistent` allows persistent ids, read as objects; `most` bounds the
    number of opcodes. Raises Refused, or another ValueError, LookupError or TypeError for a pickle that is not well
    formed.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    argument: Any
    for number, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if number >= most:
            raise Refused(f"more than {most} opcodes")
        name = opcode.name
        if name in LITERALS:
            if isinstance(argument, int) and argument.bit_length() > BITS:
                raise Refused(f"a whole number of {argument.bit_length()} bits")
            stack.append(argument)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in EMPTY:
            stack.append(EMPTY[name]())
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "MARK":
            marks.append(len(stack))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            items = [stack.pop() for _ in range(int(name[-1]))]
            stack.append(tuple(reversed(items)))
        elif name == "TUPLE":
            items = since_mark()
            stack.append(tuple(items))
        elif name in ("APPEND", "APPENDS", "ADDITEMS"):
            items = [stack.pop()] if name == "APPEND" else since_mark()
            _expect(stack[-1], list, name).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = [stack.pop(-2), stack.pop()] if name == "SETITEM" else since_mark()
            target = _expect(stack[-1], dict, name)
            for key, value in zip(items[::2], items[1::2], strict=True):
                if not isinstance(key, str | int):
                    raise Refused("a mapping whose keys are neither text nor whole numbers")
                if isinstance(key, int) and key.bit_length() > KEY_BITS:
                    raise Refused(f"a mapping with a key of {key.bit_length()} bits")
                target[key] = value
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            stack.append(_listed(argument, stack, table))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, called = stack.pop(), stack.pop()
            if not isinstance(called, Global) or not isinstance(arguments, tuple):
                raise Refused(f"{name} of something that is not a name on the list")
            stack.append(table[called.name](called.name, arguments))
        elif name == "BUILD":
            state = stack.pop()
            target = _expect(stack[-1], Object, name)
            if target.state is not None:
                raise Refused("BUILD of an object that has a state already")
            target.state = state
        elif name == "BINPERSID" and persistent:
            stack.append(Object("persistent id", _expect(stack.pop(), tuple, name)))
        elif name == "POP":
            stack.pop()
        elif name == "STOP":
            return stack.pop()
        elif name not in ("PROTO", "FRAME"):
            raise Refused(f"the opcode {name}, which snapshots do not use")
    raise Refused("no end")


def _expect(value: Any, kind: type, opcode: str) -> Any:
    if not isinstance(value, kind):
        raise Refused(f"{opcode} of something that is not a {kind.__name__}")
    return value


def _listed(argument: Any, stack: list[Any], table: Table) -> Global:
    """The name that GLOBAL carries or STACK_GLOBAL finds on the stack, if it is on the list."""
    if argument is None:
        name, module = _expect(stack.pop(), str, "STACK_GLOBAL"), _expect(stack.pop(), str, "STACK_GLOBAL")
    else:
        module, _, name = argument.partition(" ")
    whole = f"{module}.{name}"
    if whole not in table:
        raise Refused(f"it refers to {whole!r:.100}, which is not on the list of what snapshots may hold")
    return Global(whole)


def read_pickle(path: Path) -> Any:
    """The value of a pickle file, as plain data and inert records (`Object`, `Array`); executes nothing.

    Raises UserError if the file is missing, empty, truncated or not a pickle, or holds anything not on the list.
    """
    try:
        with regular(path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content[:1] != b"\x80":
                raise Refused("it does not start like one")
            return interpret(content, SNAPSHOT)  # type: ignore[arg-type]  (mmap reads like a file)
    except FileNotFoundError as error:
        raise UserError(f"there is no snapshot {path}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except Refused as error:
        raise UserError(
            f"{path} is not a snapshot that can be read safely: {error}",
            hint="a pickle can run any program when it is loaded; this reader runs nothing, and accepts only what "
            "snapshots of EDM and VCDM hold",
        ) from error
    except (ValueError, LookupError, TypeError, OverflowError) as error:
        raise UserError(
            f"{path} is not a complete pickle: {str(error) or type(error).__name__}", hint="copy or download it again"
        ) from error
