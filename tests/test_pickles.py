"""The allow-list reader of pickles: nothing in a file is executed, and no file takes more than it has."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import pickletools
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from published import SOURCE, EasyDict, module, published_modules, snapshot
from torch import nn

from chaindiff.interop.pickles import SNAPSHOT as LISTED
from chaindiff.interop.pickles import Array, Object, interpret, read_pickle
from chaindiff.interop.snapshots import arrays
from chaindiff.io.errors import UserError

TENSORS = {
    "map_layer0.weight": torch.arange(6.0).reshape(2, 3),
    "map_layer0.bias": torch.tensor([0.25, -1.5], dtype=torch.float16),
    "enc.16x16_conv.resample_filter": torch.full((1, 1, 2, 2), 0.25),
    "u": torch.tensor([3, 1], dtype=torch.int64),
}
SMALL = snapshot(module("EDMPrecond", {"img_resolution": 16}, TENSORS))


def read(folder: Path, content: bytes):
    path = folder / "snapshot.pkl"
    path.write_bytes(content)
    return read_pickle(path)


def refused(folder: Path, content: bytes) -> str:
    with pytest.raises(UserError) as error:
        read(folder, content)
    return str(error.value)


# ------------------------------------------------------------ what is read


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_snapshot_is_read_as_records(tmp_path, protocol) -> None:
    content = snapshot(module("EDMPrecond", {"img_resolution": 16, "channel_mult": [1, 2]}, TENSORS), protocol)
    names = {str(argument) for _, argument, _ in pickletools.genops(content) if argument is not None}
    assert SOURCE in names, "the test's snapshot holds source text, as published ones do"
    found = read(tmp_path, content)
    assert found.keys() == {"ema", "loss_fn", "augment_pipe", "dataset_kwargs"}
    assert isinstance(found["ema"], Object)
    assert found["ema"].name == "EDMPrecond"
    assert found["ema"].state["_init_kwargs"] == {"img_resolution": 16, "channel_mult": [1, 2]}
    assert found["loss_fn"].state["P_std"] == 1.2
    assert found["dataset_kwargs"] == {
        "class_name": "training.dataset.ImageFolderDataset",
        "path": "x.zip",
        "use_labels": False,
    }
    tensors = {name: array.tensor() for name, array in arrays(found["ema"], len(content)).items()}
    assert tensors.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert tensors[name].dtype == value.dtype
        assert torch.equal(tensors[name], value), name


def test_views_of_one_storage(tmp_path) -> None:
    """Strides, offsets and shared storages, as torch itself pickles them."""
    base = torch.arange(24.0).reshape(4, 6)
    views = [base[1:3].T, base[:, 2], base[3, 5], torch.zeros(0, 3), base]
    found = read(tmp_path, pickle.dumps(views, 4))
    assert all(isinstance(array, Array) for array in found)
    for array, view in zip(found, views, strict=True):
        assert torch.equal(array.tensor(), view)


def test_arrays_of_numpy_stay_records(tmp_path) -> None:
    found = read(tmp_path, pickle.dumps({"a": np.arange(3), "b": np.float32(2)}, 4))
    assert [record.name.rsplit(".", 1)[1] for record in found.values()] == ["_reconstruct", "scalar"]


# ------------------------------------------------------------ what is refused: programs


class Call:
    """Pickles as a call of anything."""

    def __init__(self, function, *arguments, state=None):
        self.parts = (function, arguments, state)

    def __reduce__(self):
        return self.parts if self.parts[2] is not None else self.parts[:2]


def legacy(*parts: bytes, tail: bytes = struct.pack("<q", 1) + bytes(4)) -> bytes:
    """The bytes of a storage in torch's older format, with other parts in place of the first ones."""
    own = [
        pickle.dumps(0x1950A86A20F9469CFC6C, 2),
        pickle.dumps(1001, 2),
        pickle.dumps({"protocol_version": 1001, "little_endian": True, "type_sizes": {}}, 2),
        b"\x80\x02(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01NtQ.",
        pickle.dumps(["0"], 2),
    ]
    return b"".join([*parts, *own[len(parts) :]]) + tail


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def loads_bytes(blob: bytes) -> bytes:
    return b"\x80\x03ctorch.storage\n_load_from_bytes\nB" + struct.pack("<I", len(blob)) + blob + b"\x85R."


def zipped(evil: bytes) -> bytes:
    """torch's newer format with a program in it."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", evil)
        archive.writestr("archive/version", "3")
    return file.getvalue()


def programs(command: str) -> dict[str, tuple[bytes, str]]:
    system, source = pickle.dumps(Call(os.system, command), 4), f"__import__('os').system({command!r})"
    header = [pickle.dumps(0x1950A86A20F9469CFC6C, 2), pickle.dumps(1001, 2)]
    with published_modules():
        easy = pickle.dumps(EasyDict(a=Call(os.system, command)), 4)
    said = text(command)
    return {
        "os.system": (system, "it refers to 'posix.system'"),
        "eval": (pickle.dumps(Call(eval, source), 4), "'builtins.eval'"),
        "exec": (pickle.dumps(Call(exec, source), 2), "'__builtin__.exec'"),
        "inside a mapping": (easy, "'posix.system'"),
        "named but not called": (pickle.dumps({"ema": os.system}, 4), "'posix.system'"),
        "a chain of calls": (
            pickle.dumps(Call(getattr, Call(__import__, "os"), "system"), 4),
            "'builtins.getattr'",
        ),
        "a dotted name": (
            b"\x80\x04" + text("collections") + text("abc.sys.modules") + b"\x93.",
            "'collections.abc.sys",
        ),
        "a name with a space": (b"\x80\x02cos system\nx\n.", "'os.system x'"),
        "torch.load": (pickle.dumps(Call(torch.load, "x.pt"), 4), "'torch.serialization.load'"),
        "a storage's object": (loads_bytes(legacy(*header, pickle.dumps({}, 2), system)), "'posix.system'"),
        "a storage's first word": (loads_bytes(system), "'posix.system'"),
        "a storage in a storage": (
            loads_bytes(legacy(*header, pickle.dumps({}, 2), loads_bytes(system))),
            "'torch.storage._load_from_bytes'",
        ),
        "a storage in a zip": (loads_bytes(zipped(system)), "a storage in a zip archive"),
        "a zip for a snapshot": (zipped(system), "is an archive of torch.save"),
        "BUILD with __setstate__": (
            b"\x80\x02ctorch.nn.modules.container\nModuleDict\n)\x81}"
            + text("__setstate__")
            + b"cos\nsystem\nsb"
            + said
            + b"b.",
            "'os.system'",
        ),
        "BUILD of a name": (b"\x80\x02ccollections\nOrderedDict\n}" + said + said + b"sb.", "BUILD of something"),
        "BUILD of a mapping": (b"\x80\x02ccollections\nOrderedDict\n)R}" + said + said + b"sb.", "BUILD of something"),
        "REDUCE of a record": (b"\x80\x02cnumpy\ndtype\n)R" + said + b"\x85R.", "REDUCE of something"),
        "INST": (b"\x80\x02(S'" + command.encode() + b"'\nios\nsystem\n.", "the opcode STRING"),
        "INST without arguments": (b"\x80\x02(ios\nsystem\n.", "the opcode INST"),
        "OBJ": (b"\x80\x02(ccollections\nOrderedDict\n" + said + b"o.", "the opcode OBJ"),
        "EXT1": (b"\x80\x02\x82\x01" + said + b"\x85R.", "the opcode EXT1"),
        "EXT4": (b"\x80\x02\x84\x01\x00\x00\x00.", "the opcode EXT4"),
        "a persistent id": (b"\x80\x02" + said + b"Q.", "the opcode BINPERSID"),
        "a persistent id as text": (b"\x80\x02P" + command.encode() + b"\n.", "the opcode PERSID"),
        "an out-of-band buffer": (b"\x80\x05\x97.", "the opcode NEXT_BUFFER"),
        "NEWOBJ_EX": (b"\x80\x04ccollections\nOrderedDict\n)}\x92.", "the opcode NEWOBJ_EX"),
    }


@pytest.mark.parametrize("name", programs(""))
def test_programs_are_refused_and_do_not_run(tmp_path, name) -> None:
    sentinel = tmp_path / "sentinel"
    content, message = programs(f"touch {sentinel}")[name]
    said = refused(tmp_path, content)
    assert message in said
    assert "is not a snapshot that can be read safely" in said
    assert not sentinel.exists()


@pytest.mark.parametrize("name", ["os.system", "eval", "exec", "inside a mapping"])
def test_those_programs_do_run_in_pickle_itself(tmp_path, name) -> None:
    """Without this, the sentinel would prove nothing."""
    sentinel = tmp_path / "sentinel"
    content, _ = programs(f"touch {sentinel}")[name]
    with published_modules():
        pickle.loads(content)
    assert sentinel.exists()


def test_source_text_is_dropped(tmp_path) -> None:
    sentinel = tmp_path / "sentinel"
    source = f"import os; os.system('touch {sentinel}')".encode()
    content = SMALL.replace(SOURCE.encode(), source.ljust(len(SOURCE))[: len(SOURCE)])
    assert content != SMALL
    record = read(tmp_path, content)["ema"]
    assert "module_src" not in record.state
    assert not sentinel.exists()


# ------------------------------------------------------------ what is refused: sizes

HUGE = 2**62
TUPLE = b"\x80\x04(" + b"N" * 50_000 + b"t\x940"  # 50,000 times None, remembered as 0
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n("
STORAGE = loads_bytes(legacy())[2:-1]


def tensor(storage: bytes, *numbers: bytes) -> bytes:
    return b"\x80\x03" + TENSOR + storage + b"".join(numbers) + b"\x89ccollections\nOrderedDict\n)RtR."


SIZES = {
    "BINBYTES8": b"\x80\x04\x8e" + struct.pack("<Q", HUGE) + b"x.",
    "BINUNICODE8": b"\x80\x04\x8d" + struct.pack("<Q", HUGE) + b"x.",
    "BYTEARRAY8": b"\x80\x05\x96" + struct.pack("<Q", HUGE) + b"x.",
    "BYTEARRAY8 within memory": b"\x80\x05\x96" + struct.pack("<Q", 2**33) + b"x.",
    "BINBYTES": b"\x80\x03B" + struct.pack("<I", 2**32 - 1) + b"x.",
    "LONG4": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"x.",
    "LONG4 below zero": b"\x80\x02\x8b" + struct.pack("<i", -1) + b"x.",
    "FRAME": b"\x80\x04\x95" + struct.pack("<Q", HUGE) + b"N",
    "a storage of more than there is": loads_bytes(legacy(tail=struct.pack("<q", HUGE) + bytes(4))),
    "a storage without its end": loads_bytes(legacy(tail=struct.pack("<q", 1) + bytes(3))),
    "a long header": loads_bytes(b"\x80\x02" + b"]" * 1000 + b"."),
    "a tensor of one element, repeated": tensor(STORAGE, b"K\x00", b"\x8a\x06\0\0\0\0\0\x01\x85", b"K\x00\x85"),
    "a tensor beyond its storage": tensor(STORAGE, b"K\x01", b"K\x01\x85", b"K\x01\x85"),
    "a tensor before its storage": tensor(STORAGE, b"J\xff\xff\xff\xff", b"K\x01\x85", b"K\x01\x85"),
    "a stride below zero": tensor(STORAGE, b"K\x00", b"K\x01\x85", b"J\xff\xff\xff\xff\x85"),
    "a tensor of many dimensions": tensor(STORAGE, b"K\x00", b"(" + b"K\x01" * 99 + b"t", b"(" + b"K\x01" * 99 + b"t"),
    "a deep key": b"\x80\x04})" + b"\x85" * 30_000 + b"Ns.",
    "a key that is a mapping": b"\x80\x04}}Ns.",
    "a mapping without its last value": b"\x80\x04}(NNNu.",
    "records of records": TUPLE + b"(" + b"cnumpy\ndtype\nh\x00R" * 2000 + b"\x81.",
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_bounded_by_the_file(tmp_path, name) -> None:
    content = SIZES[name]
    tracemalloc.start()
    try:
        refused(tmp_path, content)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2e6 + 150 * len(content)


def test_a_memo_of_any_number_takes_no_room(tmp_path) -> None:
    """Python's own reader makes room for all numbers up to the one that is said."""
    content = b"\x80\x02Nr" + struct.pack("<I", 2**32 - 1) + b"0j" + struct.pack("<I", 2**32 - 1) + b"."
    tracemalloc.start()
    try:
        assert read(tmp_path, content) is None
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()


def test_depth_is_no_matter(tmp_path) -> None:
    found = read(tmp_path, b"\x80\x04" + b"]" * 30_000 + b"a" * 29_999 + b".")
    depth = 0
    while found:
        found, depth = found[0], depth + 1
    assert depth == 29_999


def test_modules_that_hold_themselves_or_share_tensors(tmp_path) -> None:
    loop = Object("Layer", (), {"_modules": {}})
    loop.state["_modules"]["inner"] = loop
    with pytest.raises(UserError, match="is part of the network twice"):
        arrays(loop, 1000)
    shared = read(tmp_path, pickle.dumps(torch.zeros(100), 4))
    many = Object("Layer", (), {"_parameters": {f"p{i}": shared for i in range(5)}})
    with pytest.raises(UserError, match="its tensors share memory: 2000 bytes of them in a file of 1000"):
        arrays(many, 1000)
    bare = Object("Layer", (), {"_parameters": {"p": [1.0]}})
    with pytest.raises(UserError, match="'p' is not a tensor"):
        arrays(bare, 1000)


# ------------------------------------------------------------ files that are not whole


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a complete pickle: cannot mmap an empty file"),
        (b"these are no weights", "does not start like one"),
        (b"\x89PNG\r\n\x1a\n", "does not start like one"),
        (b"\x80", "is not a complete pickle"),
        (b"\x80\x04.", "is not a complete pickle"),
        (b"\x80\x04N", "is not a complete pickle: pickle exhausted before seeing STOP"),
        (b"\x80\x04h\x07.", "is not a complete pickle"),
        (b"\x80\x04\xff.", "is not a complete pickle"),
    ],
)
def test_files_that_are_no_pickle(tmp_path, content, message) -> None:
    assert message in refused(tmp_path, content)


def test_files_that_are_not_there(tmp_path) -> None:
    with pytest.raises(UserError, match="there is no snapshot"):
        read_pickle(tmp_path / "missing.pkl")
    with pytest.raises(UserError, match="cannot read"):
        read_pickle(tmp_path)


def test_a_snapshot_that_was_cut_short(tmp_path) -> None:
    for end in range(0, len(SMALL), 61):
        refused(tmp_path, SMALL[:end])


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_snapshots_raise_value_errors_alone(data) -> None:
    """Whatever the bytes: a value, or an error of the kinds that `read_pickle` turns into a message."""
    content = bytearray(SMALL)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(2, len(content) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ValueError, LookupError, TypeError, OverflowError):
        interpret(io.BytesIO(bytes(content)), LISTED)


def test_modules_of_torch_are_pickled_as_tests_suppose(tmp_path) -> None:
    """A container of torch itself, beside the persistent ones."""
    record = read(tmp_path, pickle.dumps(nn.ModuleDict(), 4))
    assert record.name == "torch.nn.modules.container.ModuleDict"
    assert record.state["_modules"] == {}
