"""Where the files of a data set are: a folder or a zip, with limits on what is read.

A source has `names()` of its files (POSIX, relative), for each its bytes (`read`, no more than `most`) and its location
for messages (`where`), and `stamps`: sizes and checksums (CRC-32), the same for a folder and a zip of it.
"""

from __future__ import annotations

import json
import os
import stat
import time
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import NoReturn

from pydantic_core import from_json

from chaindiff.io.digest import digest, unchanged
from chaindiff.io.errors import UserError
from chaindiff.io.files import cache_folder, read_whole, regular, regular_path, user_path, write_whole
from chaindiff.io.progress import say

ASSETS = Path(__file__).parents[1] / "assets"
IMAGES = {  # by suffix, with PIL's name of the format
    ".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".bmp": "BMP", ".gif": "GIF", ".tif": "TIFF",
    ".tiff": "TIFF", ".ppm": "PPM", ".pgm": "PPM",
}  # fmt: skip
METADATA = {"dataset.json", "metadata.csv", "metadata.jsonl"}

# A zip declares the unpacked size of a file, and zipfile reads no further. Larger files are refused unread, and so are
# those compressed more densely than images or text ever are: a few kilobytes cannot fill the memory.
IMAGE_BYTES = 256 << 20
SMALL_BYTES = 16 << 20
DENSEST = 200  # bytes for one byte of a zip, beyond SMALL_BYTES

MANY = 10_000  # files that take a while to read
SETTLED = 2e9  # nanoseconds; two changes in quick succession may get the same time from a file system
_AGAIN = "the file may be incomplete: copy or download it again"


def open_source(path: str) -> Source:
    """A folder, a zip, or an embedded set by its bare name.

    Raises UserError if the path holds no data.
    """
    embedded = {file.stem: file for file in sorted(ASSETS.glob("*.zip"))}
    file = embedded.get(path) or user_path(path, "data.path")
    if file.is_dir():
        return Folder(file)
    if _is_zip(file):
        return Zip(file)
    expected = f"a folder of images, a zip of images or an embedded set ({', '.join(embedded)})"
    hint = "point elsewhere: --set data.path=FOLDER"
    if file.exists():
        raise UserError(f"the data is neither a folder nor a readable zip; expected {expected}", str(file), hint)
    raise UserError(f"no data at {file.absolute()}; expected {expected}", "data.path", hint)


def _is_zip(file: Path) -> bool:
    if not file.is_file():
        return False
    try:
        with regular(file) as opened:
            return zipfile.is_zipfile(opened)
    except OSError as error:
        raise UserError(f"the data cannot be read: {error.strerror}", str(file)) from error


class Folder:
    """The files under a folder; hidden ones are left out, linked subfolders are not followed."""

    def __init__(self, path: Path):
        self.path = path

    def names(self) -> list[str]:
        def refuse(error: OSError) -> None:
            raise UserError(f"the folder cannot be read: {error.strerror or error}", str(error.filename)) from error

        found = (Path(root, name) for root, _, files in os.walk(self.path, onerror=refuse) for name in files)
        names = _wanted(file.relative_to(self.path).as_posix() for file in found)
        for name in names:
            if not name.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in name):
                raise UserError(f"a file's name is not in UTF-8: {name!r}", str(self.path), "rename the file")
        return names

    def read(self, name: str, most: int | None = None) -> bytes:
        _refuse_size(self._status(name).st_size, most or IMAGE_BYTES, self.where(name))
        try:
            return read_whole(self.path / name, most or IMAGE_BYTES)
        except OSError as error:
            raise UserError(f"cannot be read: {error.strerror or error}", self.where(name)) from error

    def stamps(self, names: Sequence[str]) -> list[tuple[int, int]]:
        """Sizes and checksums; those of files that have not changed come from the user's cache."""
        memo = cache_folder() / "checksums" / f"{digest(str(self.path.resolve()))}.json"
        known, settled = _known(memo), time.time_ns() - SETTLED
        found = {name: unchanged(self._status(name)) for name in names}
        sums = {name: known[name][3] for name, now in found.items() if known.get(name, ())[:3] == [*now]}
        if new := [name for name in names if name not in sums]:
            if len(new) >= MANY:
                say(f"reading {len(new):,} images once to compute their checksums")
            sums |= {name: zlib.crc32(self.read(name)) for name in new}
            kept = {name: [*found[name], sums[name]] for name in new if found[name][2] < settled}
            with suppress(UserError):  # without a writable cache they are read every time
                write_whole(memo, json.dumps({**known, **kept}))
        return [(found[name][0], sums[name]) for name in names]

    def _status(self, name: str) -> os.stat_result:
        try:
            return (self.path / name).stat()
        except OSError as error:
            raise UserError(f"cannot be read: {error.strerror or error}", self.where(name)) from error

    def where(self, name: str) -> str:
        return str(self.path / name)


class Zip:
    """The members of a zip; nothing is ever extracted. One open file per process, shared by its threads."""

    def __init__(self, path: Path):
        self.path = path
        self._open: tuple[int, zipfile.ZipFile] | None = None
        self._members()  # a broken zip is reported when it is opened

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": None}

    def _members(self) -> zipfile.ZipFile:
        # A forked process would share the file's position with its parent, so it reopens the zip.
        if self._open is None or self._open[0] != os.getpid():
            try:
                self._open = os.getpid(), zipfile.ZipFile(regular_path(self.path))
            except Exception as error:  # a damaged zip directory may raise nearly anything
                raise UserError(f"the zip cannot be opened: {error}", str(self.path), _AGAIN) from error
        return self._open[1]

    def names(self) -> list[str]:
        members = [m for m in self._members().infolist() if m.filename and not m.is_dir()]
        wanted = set(_wanted(member.filename for member in members))
        seen: dict[str, zipfile.ZipInfo] = {}
        for member in members:
            parts = PurePosixPath(member.filename.replace("\\", "/"))
            if parts.is_absolute() or ".." in parts.parts or ":" in "".join(parts.parts[:1]):
                self._refuse(member, "a name that points outside of it", "build the zip again with relative names")
            if member.filename not in wanted:
                continue
            if stat.S_ISLNK(member.external_attr >> 16):
                self._refuse(member, "a symbolic link", "build the zip again with the files themselves")
            if member.flag_bits & 1:
                self._refuse(member, "which is encrypted", "build the zip again without a password")
            if seen.setdefault(member.filename, member).CRC != member.CRC:
                self._refuse(member, "twice, with different content", "build the zip again with one file of that name")
        return sorted(wanted)

    def _refuse(self, member: zipfile.ZipInfo, what: str, hint: str) -> NoReturn:
        raise UserError(f"the zip holds '{member.filename}', {what}; refused", str(self.path), hint)

    def read(self, name: str, most: int | None = None) -> bytes:
        member = self._members().getinfo(name)
        _refuse_size(member.file_size, most or IMAGE_BYTES, self.where(name), " once unpacked")
        if member.file_size > max(SMALL_BYTES, DENSEST * member.compress_size):
            size = f"{member.file_size / 2**20:.0f} MiB out of {member.compress_size / 2**20:.2f} MiB"
            raise UserError(f"refused: it unpacks to {size}, more than any image or text would", self.where(name))
        try:
            return self._members().read(member)
        except NotImplementedError as error:
            hint = "build the zip again, stored or deflated"
            raise UserError(f"cannot be read from the zip: {error}", self.where(name), hint) from error
        except Exception as error:  # truncated, a wrong checksum, a damaged stream: each raises its own type
            raise UserError(f"cannot be read from the zip: {error}", self.where(name), _AGAIN) from error

    def stamps(self, names: Sequence[str]) -> list[tuple[int, int]]:
        """Sizes and checksums from the zip's directory; zipfile checks what it reads against them."""
        members = map(self._members().getinfo, names)
        return [(member.file_size, member.CRC) for member in members]

    def where(self, name: str) -> str:
        return f"{self.path}!{name}"


Source = Folder | Zip


def _known(memo: Path) -> dict[str, list[int]]:
    try:
        known = from_json(read_whole(memo))
        return {name: entry for name, entry in known.items() if isinstance(entry, list) and len(entry) == 4}
    except (OSError, ValueError, AttributeError):
        return {}


def _refuse_size(size: int, limit: int, where: str, how: str = "") -> None:
    if size > limit:
        raise UserError(f"refused: {size / 2**20:.0f} MiB{how}; the limit is {limit >> 20} MiB", where)


def _wanted(names: Iterable[str]) -> list[str]:
    """Images and metadata in order of their names, without hidden files and those that macOS adds to a zip."""

    def wanted(name: str) -> bool:
        path = PurePosixPath(name)
        hidden = any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
        return not hidden and (path.suffix.lower() in IMAGES or path.name in METADATA)

    return sorted(set(filter(wanted, names)))
