"""Data that is wrong or not what it seems: what can be used is used, everything else is named."""

from __future__ import annotations

import io
import json
import os
import stat
import tempfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_files import lines, noise, png, refusal, write, zipped
from PIL import Image

from chaindiff.data import open_data
from chaindiff.io.errors import UserError
from chaindiff.specs.recipe import DataSpec


def decode(data):
    return data.images([0], 32)


def test_missing_path(tmp_path):
    message = refusal(tmp_path / "nowhere")
    assert f"no data at {tmp_path / 'nowhere'}" in message
    assert "a folder of images, a zip of images or an embedded set (emoji64)" in message
    assert "--set data.path=FOLDER" in message


def test_not_a_set(tmp_path):
    (tmp_path / "a.zip").write_bytes(zipped(tmp_path / "b.zip", {"0.png": png(noise(64, 64))}).read_bytes()[:500])
    assert "neither a folder nor a readable zip" in refusal(tmp_path / "a.zip")
    (tmp_path / "empty").mkdir()
    assert "there are no images" in refusal(tmp_path / "empty")


def test_broken_images(tmp_path):
    whole = png(noise(32, 32))
    truncated = write(tmp_path / "a", {"x.png": whole[:1000]})
    message = refusal(truncated, decode)
    assert "x.png: not a readable image: image file is truncated" in message and "replace it, or remove it" in message
    assert "x.png: not a readable image: the format is unknown" in refusal(
        write(tmp_path / "b", {"x.png": "?"}), decode
    )

    archive = zipped(tmp_path / "c.zip", {"x.png": whole})
    content = bytearray(archive.read_bytes())
    content[400] ^= 255
    archive.write_bytes(content)
    assert "c.zip!x.png: cannot be read from the zip: Bad CRC-32" in refusal(archive, decode)


def test_bombs(tmp_path, monkeypatch):
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("x.png", bytes(3 << 20))
        file.writestr("y/metadata.jsonl", "")
    monkeypatch.setattr("chaindiff.data.sources.IMAGE_BYTES", 2 << 20)
    assert "x.png: refused: 3 MiB once unpacked; the limit is 2 MiB" in refusal(archive, decode)

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert "refused: 40 x 40 pixels" in refusal(write(tmp_path / "b", {"x.png": png(noise(40, 40))}), decode)
    assert "not a readable image: Image size (10000 pixels) exceeds limit" in refusal(
        write(tmp_path / "c", {"x.png": png(noise(100, 100))}), decode
    )


@pytest.mark.parametrize("name", ["../x.png", "/x.png", "a/../../x.png", "..\\x.png", "C:/x.png"])
def test_names_that_point_outside(tmp_path, name):
    assert "a name that points outside of it; refused" in refusal(zipped(tmp_path / "a.zip", {name: png(noise(4, 4))}))


@pytest.mark.parametrize(
    "metadata, message",
    [
        ("{\n", "metadata.jsonl:1: not valid JSON"),
        ('{"file_name": "0.png"}\n\n[1]\n', "metadata.jsonl:3: each line must be a JSON object with a `file_name`"),
        (lines({"file_name": "O.png"}), "the metadata names 'O.png', which does not exist; did you mean '0.png'?"),
        (lines({"file_name": "../0.png"}), "the metadata names '../0.png', which does not exist"),
        (lines({"file_name": "0.png", "a": 1}, {"file_name": "0.png", "a": 2}), "a second row for '0.png'"),
        (b"\xff\xfe", "metadata.jsonl: not UTF-8 text"),
        ('{"file_name": "0.png", "a": ' + "9" * 5000 + "}", "metadata.jsonl:1: not valid JSON: Exceeds the limit"),
        ("[" * 100_000, "metadata.jsonl:1: not valid JSON: "),
        ('{"file_name": "0.png"}\n{"file_name": "0.pn', "metadata.jsonl:2: not valid JSON: Unterminated string"),
        ('{"file_name": 0}', "metadata.jsonl:1: each line must be a JSON object with a `file_name`"),
        ('{"text": "a"}', "metadata.jsonl:1: each line must be a JSON object with a `file_name`"),
        ('{"file_name": ""}', "metadata.jsonl:1: the metadata names '.', which does not exist"),
        ('{"file_name": "/etc/passwd"}', "metadata.jsonl:1: the metadata names '/etc/passwd', which does not exist"),
    ],
)
def test_wrong_metadata(tmp_path, metadata, message):
    assert message in refusal(write(tmp_path, {"0.png": png(noise(4, 4)), "metadata.jsonl": metadata}))


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ('{"labels": [["0.png"]]}', "with whole-number classes or lists of numbers; item 0 is ['0.png']"),
        (
            '{"labels": [["0.png", 1], ["0.png", [0, "1"]]]}',
            "with whole-number classes or lists of numbers; item 1 is ['0.png', [0, '1']]",
        ),
        ('{"labels": [["0.png", true]]}', "with whole-number classes or lists of numbers; item 0 is ['0.png', True]"),
        ('{"labels": [["0.png", 1.5]]}', "with whole-number classes or lists of numbers; item 0 is ['0.png', 1.5]"),
        ('{"labels": [3]}', "with whole-number classes or lists of numbers; item 0 is 3"),
        ('{"labels": 3}', "; got 3"),
        ('{"labels": "0.png"}', "; got '0.png'"),
        ('{"lables": []}', "; got {'lables': []}"),
        ("true", "; got True"),
    ],
)
def test_wrong_labels(tmp_path, labels, expected):
    message = refusal(write(tmp_path, {"0.png": png(noise(4, 4)), "dataset.json": labels}))
    assert f"dataset.json: expected {{'labels': [[file, class], ...]}}{' ' * (expected[0] == 'w')}{expected}" in message


def test_labels_of_images_that_are_not_there(tmp_path):
    files = {"0.png": png(noise(4, 4)), "dataset.json": '{"labels": [["0.png", 1], ["1.png", 1]]}'}
    assert "dataset.json: the metadata names '1.png', which does not exist; did you mean '0.png'?" in refusal(
        write(tmp_path, files)
    )


# -- images that are not what they seem


def test_a_lying_header(tmp_path):
    """A small file that declares a large image: refused by its header, without a warning of PIL's on top."""
    content = bytearray(png(noise(4, 4)))
    start = content.index(b"IHDR")
    for side, expected in (
        (60_000, "exceeds limit"),
        (10_000, "refused: 10000 x 10000 pixels; the limit is 89478485 in all"),
    ):
        content[start + 4 : start + 12] = side.to_bytes(4, "big") * 2
        content[start + 17 : start + 21] = zlib.crc32(content[start : start + 17]).to_bytes(4, "big")
        message = refusal(write(tmp_path / str(side), {"x.png": bytes(content)}), decode)
        assert "x.png: " in message and expected in message
    assert "remove it (and its row of the metadata)" in message


def saved(image: Image.Image, suffix: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, suffix, **options)
    return file.getvalue()


def test_what_can_be_used_is_used(tmp_path):
    """Palettes, one bit, CMYK, animation (its first frame), a wrong suffix, one pixel: all become RGB."""
    grey = Image.fromarray(np.full((4, 4), 255, np.uint8))
    red, blue = (Image.new("RGB", (4, 4), colour) for colour in ("red", "blue"))
    files = {
        "0.gif": saved(red, "gif", save_all=True, append_images=[blue]),
        "1.png": saved(red, "png", save_all=True, append_images=[blue]),
        "2.webp": saved(red, "webp", save_all=True, append_images=[blue], lossless=True),
        "3.png": saved(red.quantize(2), "png"),
        "4.png": saved(red.resize((1, 1)), "png"),
        "5.jpg": saved(red, "png"),
        "6.png": saved(red.resize((4, 1)), "png"),
        "7.tif": saved(red.convert("CMYK"), "tiff"),
        "8.png": saved(grey.convert("1"), "png"),
        "9.png": saved(grey.convert("LA"), "png"),
    }
    images = open_data(DataSpec(path=str(write(tmp_path, files)))).images(range(10), 4).numpy()
    assert (images[:8] == np.array([255, 0, 0]).reshape(3, 1, 1)).all()
    assert (images[8:] == 255).all()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "x.tif: not a readable image: the file is empty"),
        (b"<svg/>", "x.tif: not a readable image: the format is unknown"),
        (b"\x00" * 1000, "x.tif: not a readable image: the format is unknown"),
        (saved(Image.new("F", (4, 4)), "tiff"), "x.tif: not a readable image: its pixels are floating-point numbers"),
        (
            saved(Image.new("I", (4, 4), 100_000), "tiff"),
            "x.tif: not a readable image: its pixels range from 100000 to",
        ),
    ],
    ids=range(5),
)
def test_what_cannot_be_used_is_named(tmp_path, content, expected):
    assert expected in refusal(write(tmp_path, {"x.tif": content, "y.png": png(noise(4, 4))}), decode)


def test_files_that_are_none(tmp_path):
    folder = write(tmp_path / "a", {"y.png": png(noise(4, 4))})
    os.mkfifo(folder / "x.png")
    assert "x.png: cannot be read: it is not a regular file" in refusal(folder, decode)
    (folder / "x.png").unlink()
    (folder / "x.png").symlink_to("nowhere.png")
    assert "x.png: cannot be read: No such file or directory" in refusal(folder, decode)
    assert "x.png: cannot be read: No such file or directory" in refusal(folder, lambda data: data.digest)
    (folder / "x.png").unlink()
    with (folder / "x.png").open("wb") as file:
        file.truncate(300 << 20)  # takes no room on the disk
    assert "x.png: refused: 300 MiB; the limit is 256 MiB" in refusal(folder, decode)
    (folder / "x.png").unlink()
    (folder / os.fsdecode(b"\xff.png")).write_bytes(png(noise(4, 4)))
    assert "a file's name is not in UTF-8: '\\udcff.png'\n  rename the file" in refusal(folder)
    os.mkfifo(tmp_path / "pipe.zip")
    assert "pipe.zip: the data is neither a folder nor a readable zip" in refusal(tmp_path / "pipe.zip")


def test_a_folder_that_may_not_be_read_is_not_left_out(monkeypatch):
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        monkeypatch.setattr("chaindiff.data.sources.ASSETS", Path(folder))  # where nobody may look, too
        path = write(Path(folder) / "set", {"y.png": png(noise(4, 4)), "sub/x.png": png(noise(4, 4))})
        archive = zipped(Path(folder) / "a.zip", {"x.png": png(noise(4, 4))})
        (path / "sub").chmod(0)
        archive.chmod(0)
        user = os.geteuid()
        os.seteuid(user or 65534)  # the superuser may read anything, so become nobody
        try:
            assert f"{path}/sub: the folder cannot be read: Permission denied" in refusal(path)
            assert f"{archive}: the data cannot be read: Permission denied" in refusal(archive)
        finally:
            os.seteuid(user)
            (path / "sub").chmod(0o755)


# -- zips


def member(name: str, *, mode: int = 0, flags: int = 0) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr, info.flag_bits = mode << 16, flags
    return info


def test_links_passwords_and_second_files_in_a_zip(tmp_path):
    image, path = png(noise(4, 4)), tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(member("x.png", mode=stat.S_IFLNK | 0o777), "/etc/passwd")
    assert f"{path}: the zip holds 'x.png', a symbolic link; refused\n  build the zip again with the files" in refusal(
        path
    )

    content = zipped(path, {"x.png": image}).read_bytes()
    central = content.index(b"PK\x01\x02")
    path.write_bytes(content[: central + 8] + b"\x01" + content[central + 9 :])
    assert "the zip holds 'x.png', which is encrypted; refused\n  build the zip again without a password" in refusal(
        path
    )

    path.write_bytes(content[: central + 10] + b"\x63" + content[central + 11 :])
    message = refusal(path, decode)
    assert (
        "a.zip!x.png: cannot be read from the zip: " in message and "build the zip again, stored or deflated" in message
    )

    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(path, "w") as file:
        file.writestr("x.png", image)
        file.writestr("x.png", image)
    assert len(open_data(DataSpec(path=str(path)))) == 1
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(path, "a") as file:
        file.writestr("x.png", png(noise(4, 4, 1)))
    assert "the zip holds 'x.png', twice, with different content; refused" in refusal(path)


def test_a_zip_that_expands_beyond_measure(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("0.png", png(noise(4, 4)))
        file.writestr("metadata.jsonl", "\n" * (20 << 20))
    assert path.stat().st_size < 1 << 20
    assert "a.zip!metadata.jsonl: refused: it unpacks to 20 MiB out of 0.02 MiB" in refusal(path)

    # A size declared too small is where reading ends; one declared too large is refused unread.
    content = zipped(path, {"x.png": png(noise(64, 64))}).read_bytes()
    central = content.index(b"PK\x01\x02")
    for size, expected in (
        (100, "cannot be read from the zip: Bad CRC-32"),
        (1 << 30, "refused: 1024 MiB once unpacked"),
    ):
        path.write_bytes(content[: central + 24] + size.to_bytes(4, "little") + content[central + 28 :])
        assert f"a.zip!x.png: {expected}" in refusal(path, decode)


@given(st.data())
@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_a_damaged_zip_is_read_or_explained(tmp_path, data):
    rows = lines({"file_name": "a/0.png", "text": "one"}, {"file_name": "1.png", "text": "two"})
    content = zipped(
        tmp_path / "a.zip", {"a/0.png": png(noise(4, 4)), "1.png": png(noise(4, 4)), "metadata.jsonl": rows}
    )
    damaged = bytearray(content.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        if data.draw(st.integers(0, 5)):
            damaged[at] = data.draw(st.integers(0, 255))
        else:
            del damaged[at:]
            damaged += b"\0"
    content.write_bytes(damaged)
    try:
        found = open_data(DataSpec(path=str(content)))
        found.images(range(len(found)), 4)
    except UserError as error:
        assert "a.zip" in str(error)


# -- metadata


def test_line_separators_of_unicode_end_no_row(tmp_path):
    captions = ["a\u2028b", "c\x85d", "e\u2029f"]
    rows = "".join(
        json.dumps({"file_name": f"{i}.png", "text": text}, ensure_ascii=False) + "\r\n"
        for i, text in enumerate(captions)
    )
    files = {f"{i}.png": png(noise(4, 4)) for i in range(3)}
    assert open_data(DataSpec(path=str(write(tmp_path, {**files, "metadata.jsonl": rows})))).field("text") == captions


def test_paths_as_windows_writes_them(tmp_path):
    files = {"a/0.png": png(noise(4, 4)), "metadata.jsonl": lines({"file_name": ".\\a\\0.png", "text": "one"})}
    assert open_data(DataSpec(path=str(write(tmp_path, files)))).field("text") == ["one"]
