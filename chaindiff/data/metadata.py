"""Metadata of images: metadata.jsonl and .csv and folders (Hugging Face imagefolder), dataset.json (EDM); filters."""

from __future__ import annotations

import csv
import io
import json
import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from chaindiff.data.sources import METADATA, Source
from chaindiff.io.errors import UserError, did_you_mean, nearest

# Bytes of one file and values of all, at most, and more for each image: well packed, a few bytes make many values.
BYTES, IMAGE_BYTES = 64 << 20, 64 << 10
VALUES, IMAGE_VALUES = 1_000_000, 256

Row = dict[str, Any]
_LABELS = "{'labels': [[file, class], ...]}"
SPLITS = {  # by the name of a folder in lower case, as Hugging Face's imagefolder has them
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


def read_metadata(source: Source, names: Sequence[str]) -> dict[str, Row]:
    """Each image's fields by its name; images without metadata have none.

    Raises UserError for metadata that does not parse, or that names a missing image.
    """
    rows: dict[str, Row] = {name: {} for name in names if posixpath.basename(name) not in METADATA}
    values, most = 0, VALUES + IMAGE_VALUES * len(rows)
    for name in names:
        if posixpath.basename(name) in METADATA:
            text = _text(source, name, BYTES + IMAGE_BYTES * len(rows))
            values += sum(map(text.count, ",[{"))  # one of them stands before each
            if values > most:
                message = f"refused: {values:,} values up to here; for {len(rows):,} images the limit is {most:,}"
                hint = "leave out of the metadata what is neither a caption nor a class"
                raise UserError(message, source.where(name), hint)
            read = {".json": _read_labels, ".csv": _read_table, ".jsonl": _read_lines}[posixpath.splitext(name)[1]]
            for where, image, row in read(source.where(name), name, text):
                if image not in rows:  # perhaps it was written on Windows
                    image = posixpath.normpath(image.replace("\\", "/"))
                if image not in rows:
                    raise UserError(f"the metadata names '{image}', which does not exist{_like(image, rows)}", where)
                if rows[image].keys() & row.keys():
                    raise UserError(f"a second row for '{image}'", where, "keep one row for each image")
                rows[image] |= row
    return rows


def _read_lines(place: str, name: str, text: str) -> Iterable[tuple[str, str, Row]]:
    """metadata.jsonl: one JSON object a line, with `file_name` relative to the metadata's folder."""
    number, last = 1, 0
    # Not splitlines(): captions may hold the line separators of Unicode, which do not end a line of JSON.
    for found in re.finditer(r"[^\n]+", text):
        number, last = number + text.count("\n", last, found.start()), found.start()
        if not (line := found[0]).strip():
            continue
        where = f"{place}:{number}"
        row = _json(line, where)
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise UserError("each line must be a JSON object with a `file_name`", where)
        yield where, _beside(name, row.pop("file_name")), row


def _read_table(place: str, name: str, text: str) -> Iterable[tuple[str, str, Row]]:
    """metadata.csv: a head that names the fields, `file_name` among them; an empty cell is a missing value."""
    table = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in table:
            where = f"{place}:{table.line_num}"
            if not row.get("file_name") or None in row or None in row.values():
                raise UserError("each row must have a `file_name` and as many cells as the head", where)
            yield where, _beside(name, row.pop("file_name")), {field: cell for field, cell in row.items() if cell}
    except csv.Error as error:
        raise UserError(f"not a table of comma-separated values: {error}", f"{place}:{table.line_num}") from error


def of_folders(names: Iterable[str]) -> dict[str, Row]:
    """What the folders of images without metadata say: the `split` by the first, the `label` by the one they are in."""
    rows: dict[str, Row] = {}
    for name in names:
        first, *inner = [*posixpath.dirname(name).split("/")]
        split = SPLITS.get(first.lower())
        label = (inner or ([] if split else [first]))[-1:]
        rows[name] = {**({"label": label[0]} if label and label[0] else {}), **({"split": split} if split else {})}
    return rows


def _read_labels(where: str, name: str, text: str) -> Iterable[tuple[str, str, Row]]:
    """dataset.json: {"labels": [[file, class], ...]} or {"labels": null}; the class becomes the field `label`.

    In place of a class there may be a list of numbers, for a vector.
    """
    content = _json(text, where)
    labels = content.get("labels", content) if isinstance(content, dict) else content
    if labels is not None and not isinstance(labels, list):
        raise UserError(f"expected {_LABELS}; got {labels!r:.80}", where)
    for number, pair in enumerate(labels or []):
        if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) and _is_label(pair[1])):
            said = f"expected {_LABELS} with whole-number classes or lists of numbers; item {number} is {pair!r:.80}"
            raise UserError(said, where)
        yield where, _beside(name, pair[0].replace("\\", "/")), {"label": pair[1]}


def _is_label(value: Any) -> bool:
    listed = isinstance(value, list) and bool(value)
    return type(value) is int or (listed and all(type(number) in (int, float) for number in value))


def _text(source: Source, name: str, most: int) -> str:
    try:
        return source.read(name, most).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 text: {error}", source.where(name)) from error


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also for numbers of thousands of digits
        raise UserError(f"not valid JSON: {error}", where) from error


def _beside(metadata: str, image: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(metadata), image))


def values(row: Row, field: str) -> list[str]:
    """The field's values as text: a list's items, or the one value; none if the image lacks it."""
    value = row.get(field)
    return [] if value is None else [str(v) for v in value] if isinstance(value, list) else [str(value)]


def fields(rows: Iterable[Row]) -> list[str]:
    """Every field's name, in order of appearance."""
    return list(dict.fromkeys(name for row in rows for name in row))


def keep(rows: Mapping[str, Row], where: Mapping[str, str | list[str]], place: str) -> dict[str, Row]:
    """The images that match every field of `where` by one of its values.

    Raises UserError for a field or value that no image has, or if no image is left.
    """
    kept = dict(rows)
    for field, wanted in where.items():
        known = fields(rows.values())
        if field not in known:
            raise UserError(f"the images have no field '{field}'{_like(field, known)}", place)
        wanted = [wanted] if isinstance(wanted, str) else wanted
        present = dict.fromkeys(value for row in rows.values() for value in values(row, field))
        for value in wanted:
            if value not in present:
                raise UserError(f"no image has {field} '{value}'{_like(value, sorted(present))}", place)
        kept = {name: row for name, row in kept.items() if not set(wanted).isdisjoint(values(row, field))}
    if not kept:
        raise UserError(f"no image matches {dict(where)}", place, "loosen data.where or data.split")
    return kept


def _like(name: str, names: Iterable[str]) -> str:
    """did_you_mean, but listing only a few of thousands of names."""
    names = list(names)
    if not names:
        return ": there is no metadata.jsonl, metadata.csv or dataset.json, and no folder of a class"
    return did_you_mean(name, names if nearest(name, names) else [*names[:12], *(["..."] if len(names) > 12 else [])])
