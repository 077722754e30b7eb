"""The figures of a training run: metrics.jsonl, and TensorBoard's event file."""

from __future__ import annotations

import io
import json
import math
import os
import socket
import time
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

# Protobuf makes these classes when it is imported.
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.summary.writer.record_writer import RecordWriter

from chaindiff.io.errors import UserError
from chaindiff.io.files import UNWRITABLE, read_whole, regular, write_whole
from chaindiff.io.progress import say


class Metrics:
    """metrics.jsonl and TensorBoard of one stage; lines after the point of resumption are dropped."""

    def __init__(self, folder: Path, images: int):
        self.path = folder / "metrics.jsonl"
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self.board = folder / "tensorboard" / name
        self.board.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            lines = _lines(self.path)
            seen = [_seen(line) for line in lines]
            kept = [line for line, at in zip(lines, seen, strict=True) if at <= images]
            write_whole(self.path, b"".join(line + b"\n" for line in kept))
            if odd := seen[:-1].count(math.inf):  # a killed process leaves half a line at the end
                say(f"{self.path}: {odd} unreadable lines left out")
        self._event(images, file_version="brain.Event:2")
        self._event(images + 1, session_log=SessionLog(status=SessionLog.START))  # hides what was after

    def write(self, images: int, **values: float) -> None:
        append(self.path, (json.dumps({"images": images, **values}) + "\n").encode())
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._event(images, summary=Summary(value=scalars))

    def _event(self, images: int, **what: Any) -> None:
        record = io.BytesIO()
        RecordWriter(record).write(Event(step=images, wall_time=time.time(), **what).SerializeToString())
        append(self.board, record.getvalue())


class _Line(BaseModel, strict=True):
    images: int


def _seen(line: bytes) -> float:
    """The images after which a line was written; without end for what is no line of ours."""
    try:
        return _Line.model_validate_json(line).images
    except ValidationError:  # cut short, or another program's
        return math.inf


def _lines(path: Path) -> list[bytes]:
    try:
        return read_whole(path).split(b"\n")
    except OSError as error:
        hint = "remove it: it only shows how the training went"
        raise UserError(f"cannot read {path}: {error.strerror or error}", hint=hint) from error


def append(path: Path, data: bytes) -> None:
    """Raises UserError if it cannot be written. (TensorBoard's own writer fails in a thread, with its traceback.)"""
    try:
        with regular(path, "ab") as file:
            file.write(data)
    except OSError as error:  # which does not name the file when the disk is full
        raise UserError(f"cannot write {path}: {error.strerror or error}", hint=UNWRITABLE) from error
