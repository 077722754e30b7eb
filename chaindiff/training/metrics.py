"""The figures of a training run: metrics.jsonl, and TensorBoard's event file."""

from __future__ import annotations

import io
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

# Protobuf makes these classes when it is imported.
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.summary.writer.record_writer import RecordWriter

from chaindiff.io.errors import UserError
from chaindiff.io.files import UNWRITABLE, write_whole
from chaindiff.io.progress import say


class Metrics:
    """metrics.jsonl and TensorBoard of one stage; lines after the point of resumption are dropped."""

    def __init__(self, folder: Path, images: int):
        self.path = folder / "metrics.jsonl"
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self.board = folder / "tensorboard" / name
        self.board.parent.mkdir(parents=True, exist_ok=True)
        if self.path.is_file():
            lines = self.path.read_text(errors="replace").splitlines()
            seen = [_images(line) for line in lines]
            kept = [line for line, at in zip(lines, seen, strict=True) if at is not None and at <= images]
            write_whole(self.path, "".join(f"{line}\n" for line in kept))
            if odd := seen[:-1].count(None):  # a killed process leaves half a line at the end
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


def _images(line: str) -> int | None:
    """After how many images a line was written; None if it is not such a line."""
    try:
        images = json.loads(line)["images"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return images if type(images) is int else None


def append(path: Path, data: bytes) -> None:
    """Raises UserError if it cannot be written. (TensorBoard's own writer fails in a thread, with its traceback.)"""
    try:
        with path.open("ab") as file:
            file.write(data)
    except OSError as error:  # which does not name the file when the disk is full
        raise UserError(f"cannot write {path}: {error.strerror or error}", hint=UNWRITABLE) from error
