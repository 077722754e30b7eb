"""Where the files of a data set lie: a folder or a zip, with limits on what is read.

A source has `names()` of its files (POSIX, relative), and for each its bytes (`read`), a `stamp` that changes when it
does, and `where` it is, for messages.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from chaindiff.specs.errors import UserError

ASSETS = Path(__file__).parents[1] / "assets"
IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
METADATA = {"dataset.json", "metadata.jsonl"}

# A zip declares how large a file is once unpacked, and zipfile reads no further than that; beyond these sizes it is
# refused unread, so that a few kilobytes cannot fill the memory.
IMAGE_BYTES = 256 << 20
METADATA_BYTES = 1 << 30

_AGAIN = "the file may be incomplete: copy or download it again"


def open_source(path: str) -> Source:
    """A folder, a zip, or an embedded set by its bare name.

    Raises UserError if the path holds no data.
    """
    embedded = {file.stem: file for file in sorted(ASSETS.glob("*.zip"))}
    file = embedded.get(path) or Path(path).expanduser()
    if file.is_dir():
        return Folder(file)
    if zipfile.is_zipfile(file):
        return Zip(file)
    expected = f"a folder of images, a zip of images or an embedded set ({', '.join(embedded)})"
    hint = "point elsewhere: --set data.path=FOLDER"
    if file.exists():
        raise UserError(f"the data is neither a folder nor a readable zip; expected {expected}", str(file), hint)
    raise UserError(f"no data at {file.absolute()}; expected {expected}", "data.path", hint)


class Folder:
    """The files under a folder; hidden ones are left out, linked subfolders are not followed."""

    def __init__(self, path: Path):
        self.path = path

    def names(self) -> list[str]:
        found = (Path(root, name) for root, _, files in os.walk(self.path) for name in files)
        return _wanted(file.relative_to(self.path).as_posix() for file in found)

    def read(self, name: str) -> bytes:
        try:
            return (self.path / name).read_bytes()
        except OSError as error:
            raise UserError(f"cannot be read: {error.strerror or error}", self.where(name)) from error

    def stamp(self, name: str) -> tuple[int, int]:
        """Size and time of change."""
        status = (self.path / name).stat()
        return status.st_size, status.st_mtime_ns

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
        # A process made by fork would share the file's position with its parent, so it opens the zip anew.
        if self._open is None or self._open[0] != os.getpid():
            try:
                self._open = os.getpid(), zipfile.ZipFile(self.path)
            except (OSError, zipfile.BadZipFile) as error:
                raise UserError(f"the zip cannot be opened: {error}", str(self.path), _AGAIN) from error
        return self._open[1]

    def names(self) -> list[str]:
        members = [member for member in self._members().infolist() if not member.is_dir()]
        for member in members:
            parts = PurePosixPath(member.filename.replace("\\", "/"))
            if parts.is_absolute() or ".." in parts.parts or ":" in parts.parts[0]:
                raise UserError(
                    f"the zip holds '{member.filename}', a name that points outside of it; refused",
                    str(self.path),
                    "build the zip again with relative names",
                )
        return _wanted(member.filename for member in members)

    def read(self, name: str) -> bytes:
        member = self._members().getinfo(name)
        limit = METADATA_BYTES if PurePosixPath(name).name in METADATA else IMAGE_BYTES
        if member.file_size > limit:
            size = f"{member.file_size / 2**20:.0f} MiB once unpacked; the limit is {limit >> 20} MiB"
            raise UserError(f"refused: {size}", self.where(name))
        try:
            return self._members().read(member)
        except Exception as error:  # truncated, a wrong checksum, encrypted, an unknown method: each raises its own
            raise UserError(f"cannot be read from the zip: {error}", self.where(name), _AGAIN) from error

    def stamp(self, name: str) -> tuple[int, int]:
        """Size and CRC-32."""
        member = self._members().getinfo(name)
        return member.file_size, member.CRC

    def where(self, name: str) -> str:
        return f"{self.path}!{name}"


Source = Folder | Zip


def _wanted(names: Iterable[str]) -> list[str]:
    """Images and metadata in order of their names, without hidden files and what macOS adds to a zip."""

    def wanted(name: str) -> bool:
        path = PurePosixPath(name)
        hidden = any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
        return not hidden and (path.suffix.lower() in IMAGES or path.name in METADATA)

    return sorted(set(filter(wanted, names)))
