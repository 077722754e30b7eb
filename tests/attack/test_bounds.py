"""Small files and short requests that would take all memory or time: they are refused before they do."""

from __future__ import annotations

import itertools
import os
import pickle
import struct
import time
import tracemalloc
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import chaindiff as cd
from chaindiff import cli
from chaindiff.chain.variable import Variable
from chaindiff.data import open_data
from chaindiff.encoders.clip_files import _folder
from chaindiff.evaluation.features import _reading
from chaindiff.evaluation.provenance import read_evaluation
from chaindiff.interop.pickles import read_pickle
from chaindiff.io import tensorfile
from chaindiff.io.errors import UserError
from chaindiff.io.files import read_whole
from chaindiff.recipe.given import _numbers
from chaindiff.recipe.samples import read_image
from chaindiff.specs.network import PriorSpec
from chaindiff.specs.recipe import DataSpec
from chaindiff.training.metrics import Metrics


@contextmanager
def within(mebibytes: float, seconds: float) -> Iterator[None]:
    began = time.perf_counter()
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < mebibytes * 2**20
        assert time.perf_counter() - began < seconds
    finally:
        tracemalloc.stop()


def picture(path: Path) -> Path:
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(path)
    return path


@pytest.mark.parametrize("name", ["metadata.jsonl", "dataset.json"])
def test_metadata_is_bounded_by_what_it_expands_to(tmp_path, name) -> None:
    """Some bytes of noise make it less dense than what is refused for that; as objects it takes 25 times its size."""
    values = b"[]," * (5 << 20)
    noise = os.urandom(100_000).hex().encode()
    content = b'{"file_name": "0.png", "x": "%s", "y": [%s[]]}' % (noise, values)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.write(picture(tmp_path / "0.png"), "0.png")
        file.writestr(name, content)
    assert (tmp_path / "a.zip").stat().st_size < 1 << 20
    with within(80, 20), pytest.raises(UserError, match=r"refused: 10,\d+,\d+ values up to here; for 1 images"):
        open_data(DataSpec(path=str(tmp_path / "a.zip")))


def test_metadata_in_many_folders_is_bounded_in_all(tmp_path) -> None:
    picture(tmp_path / "0.png")
    for number in range(4):
        (tmp_path / f"{number}").mkdir()
        row = f'{{"file_name": "../0.png", "x{number}": [{"1," * 300_000}1]}}'
        (tmp_path / f"{number}" / "metadata.jsonl").write_text(row)
    with pytest.raises(UserError, match=r"3/metadata\.jsonl: refused: 1,200,0\d\d values up to here"):
        open_data(DataSpec(path=str(tmp_path)))


def test_metadata_of_blank_lines(tmp_path) -> None:
    picture(tmp_path / "0.png")
    (tmp_path / "metadata.jsonl").write_text("\n" * (15 << 20) + '{"file_name": "1.png"}')
    with within(80, 5), pytest.raises(UserError, match=r"metadata\.jsonl:15728641: the metadata names '1\.png'"):
        open_data(DataSpec(path=str(tmp_path)))


def test_metadata_is_no_larger_than_its_images_need(tmp_path) -> None:
    picture(tmp_path / "0.png")
    with (tmp_path / "metadata.jsonl").open("wb") as file:
        file.truncate(1 << 30)
    with within(1, 5), pytest.raises(UserError, match=r"refused: 1024 MiB; the limit is 64 MiB"):
        open_data(DataSpec(path=str(tmp_path)))


def test_a_header_of_weights_is_bounded(tmp_path) -> None:
    entry = '"%07d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    header = ("{" + ",".join(entry % number for number in range(330_000)) + "}").encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    for read in (tensorfile.metadata, tensorfile.shapes, tensorfile.load):
        with within(1, 2), pytest.raises(UserError, match="its header is longer than 16 MiB"):
            read(tmp_path / "x.safetensors")


def test_a_given_file_is_bounded_and_checked(tmp_path) -> None:
    """As every other safetensors file is: its header, and its content where it holds a checksum."""
    path, vector = tmp_path / "x.safetensors", Variable.vector("v", 4)
    with open(path, "wb") as file:
        file.write((20 << 20).to_bytes(8, "little") + b'{"v":')
        file.truncate(30 << 20)
    with within(1, 2), pytest.raises(UserError, match="of numbers: its header is longer than 16 MiB"):
        _numbers(path, vector, "--given v")
    tensorfile.save(path, {"v": torch.ones(3, 4)}, {"identity": "x"})
    assert _numbers(path, vector, "--given v").shape == (3, 4)
    path.write_bytes(path.read_bytes()[:-1] + b"\x41")
    with pytest.raises(UserError, match="of numbers: its checksum does not match its content"):
        _numbers(path, vector, "--given v")


def test_files_that_are_read_whole_are_bounded(tmp_path) -> None:
    def long(name: str) -> Path:
        with open(tmp_path / name, "wb") as file:
            file.truncate(1 << 40)
        return tmp_path / name

    with within(1, 5):
        with pytest.raises(OSError, match="larger than 64 MiB"):
            read_whole(long("x.json"))
        with pytest.raises(UserError, match="is not what saving a chain leaves"):
            cd.load(long("chain.json").parent)
        with pytest.raises(UserError, match="is not the output of an evaluation"):
            read_evaluation(long("metrics.json"))
        with pytest.raises(UserError, match=r"cannot read .*metrics\.jsonl: it is larger than 64 MiB"):
            Metrics(long("metrics.jsonl").parent, 4)
        with pytest.raises(UserError, match="too large for a recipe"):
            cd.load(long("recipe.lock.yaml"))
        long("open_clip_config.json")
        with pytest.raises(UserError, match=r"is not a model's configuration: .*larger than 64 MiB"):
            _folder(tmp_path, "x.model")


def test_weights_in_a_zip_are_bounded_by_what_they_expand_to(tmp_path) -> None:
    path, packed = tmp_path / "x.pth", tmp_path / "packed.pth"
    torch.save({"a": torch.zeros(8 << 20)}, path)
    with zipfile.ZipFile(path) as stored, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        for name in stored.namelist():
            file.writestr(name, stored.read(name))
    with within(1, 10), pytest.raises(UserError, match="they would expand to 32 MiB"), _reading("dinov2", packed):
        pytest.fail("they are read")


def bomb(path: Path, side: int) -> Path:
    """A picture of `side` x `side` pixels in a few bytes, as its header says."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


@pytest.mark.parametrize("side", [10_000, 50_000])
def test_pictures_that_expand_beyond_measure(tmp_path, side) -> None:
    path = bomb(tmp_path / "0.png", side)
    with within(1, 2):
        with pytest.raises(
            UserError, match=r"0\.png: (refused: 10000 x 10000 pixels|not a readable image: Image size)"
        ):
            open_data(DataSpec(path=str(tmp_path))).images([0], 8)
        with pytest.raises(UserError, match=r"0\.png: not a readable image: "):
            read_image(path)


@pytest.mark.parametrize("command", ["sample", "run", "evaluate"])
def test_a_count_beyond_measure_is_refused(tmp_path, capsys, monkeypatch, command) -> None:
    monkeypatch.chdir(tmp_path)
    with within(200, 30), pytest.raises(SystemExit) as ended:
        cli.main([command, "vcdm_emoji", "--count", "1000000000000"])
    assert ended.value.code == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "count: should be at most 1e+07, not 1000000000000" in error and list(tmp_path.iterdir()) == []


def test_the_numbers_of_samples_are_lazy() -> None:
    network = PriorSpec(kind="prior", width=16, depth=1, heads=2)
    chain = cd.Chain([cd.Diffusion(cd.Variable.vector("v", 4), network=network, sampler={"steps": 2})])
    expected = chain.sample(4, noise=7)["v"][2:]
    with within(5, 10):
        first, second = itertools.islice(chain.stream(10**12, batch=2), 2)
        same = next(chain.stream(10**12, noise=7, batch=2))
    assert torch.equal(torch.cat([first["v"], second["v"]]), chain.sample(4, batch=2)["v"])
    assert torch.equal(same["v"], expected)


# ------------------------------------------------------------ pickles


def refused(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_pickle(path)
    return str(error.value)


def test_keys_that_collide(tmp_path) -> None:
    """Python's hash of a whole number is its remainder by 2^61 - 1."""
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(dict.fromkeys(range(8)), 4))
    assert read_pickle(tmp_path / "x.pkl").keys() == {*range(8)}
    keys = b"".join(pickle.dumps(number * (2**61 - 1), 2)[2:-1] + b"N" for number in range(1, 60_000))
    with within(20, 3):
        assert "a key of 61 bits" in refused(tmp_path / "x.pkl", b"\x80\x04}(" + keys + b"u.")


def test_objects_of_one_byte(tmp_path) -> None:
    """Each is 60 times as large in memory."""
    assert "more than 1000000 opcodes" in refused(tmp_path / "x.pkl", b"\x80\x04" + b"]" * 1_500_000 + b".")


def test_numbers_of_thousands_of_digits(tmp_path) -> None:
    number = b"\x8b" + struct.pack("<i", 100_000) + b"\x7f" * 100_000
    for wrap in (b"%s.", b"}%sNs.", b"}N%ss."):
        assert "a whole number of " in refused(tmp_path / "x.pkl", b"\x80\x04" + wrap % number)
