"""Commands that are killed at random moments, alone and two at once: what they leave in the end is what one leaves."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

RECIPE = """
name: tiny
data: {path: data}
variables:
  photo: {kind: image, shape: [3, 32, 32]}
  image: {kind: image, shape: [3, 8, 8], encoder: {kind: resize, of: photo}}
  clip:
    kind: vector
    shape: [8]
    encoder: {kind: open_clip, model: clip_emoji, of: photo, reduce: {kind: pca, k: 8}}
stages:
  clip:
    network: {kind: prior, width: 16, depth: 1, heads: 2}
    augment: &augment {flip: true, variants: 2}
    train: &train {images: 160, batch: 8, execution: eager, log_every: 5, checkpoint_every: 16}
    sample: {steps: 3}
  image:
    given: [clip]
    network: {kind: unet, channels: 16, mult: [1], blocks: 1, attention: [], dropout: 0.0}
    augment: *augment
    train: *train
    sample: {steps: 3}
sample: {want: [image], count: 30, batch: 4, seed: 0}
"""
COMMANDS = [
    ["run", "tiny.yaml"],
    ["evaluate", "tiny.yaml", "--of=image", "--judge=pixels:8", "--count=250", "--links"],
]
KILLS = 50


def prepared(folder: Path) -> Path:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    (folder / "data").mkdir()
    for index in range(40):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / "data" / f"{index:02}.png")
    (folder / "tiny.yaml").write_text(RECIPE)
    return folder


def start(folder: Path, arguments: list[str]) -> subprocess.Popen:
    environment = os.environ | {"CHAINDIFF_CACHE": str(folder / "cache")}
    command = [sys.executable, "-m", "chaindiff", *arguments]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    return subprocess.Popen(command, cwd=folder, env=environment, **pipes)


def kill(process: subprocess.Popen) -> None:
    with suppress(ProcessLookupError):  # it has just ended by itself
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def left(folder: Path) -> dict[str, str]:
    """A digest of every file whose content does not tell the time; of tensors without metadata or seconds, which do."""
    found = {}  # checksums are named by their folder; a killed process leaves its lock file, which locks nothing then
    paths = sorted([*(folder / "runs").rglob("*"), *(folder / "cache").rglob("*")])
    for path in (path for path in paths if not {"tensorboard", "checksums", ".lock"} & {*path.parts}):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":
            with safe_open(path, "np") as file:
                tensors = {key: file.get_tensor(key) for key in sorted(file.keys()) if key != "seconds"}
            said = b"".join(key.encode() + str(t.shape).encode() + t.tobytes() for key, t in tensors.items())
            found[name] = hashlib.sha256(said).hexdigest()
        elif path.suffix in (".png", ".svg"):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.name == "metrics.json":
            figures = json.loads(path.read_text())["figures"]
            found[name] = json.dumps([{k: v for k, v in figure.items() if "seconds" not in k} for figure in figures])
        elif path.is_file():
            found[name] = "there"
    return found


@pytest.mark.slow
def test_fifty_kills_leave_what_none_leaves(tmp_path: Path) -> None:
    calm = prepared(tmp_path / "calm")
    longest = 0.0  # seconds that a command takes if it is left alone
    for arguments in COMMANDS:
        began, process = time.monotonic(), start(calm, arguments)
        assert (process.communicate()[1], process.returncode) == ("", 0)
        longest = max(longest, time.monotonic() - began)
    whole, rng, kills, rounds = left(calm), random.Random(11), 0, 0
    while kills < KILLS:
        rounds += 1
        folder = prepared(tmp_path / str(rounds))
        for arguments in COMMANDS:
            while True:
                process = start(folder, arguments)
                beside = start(folder, arguments) if rng.random() < 0.3 else None
                end = time.monotonic() + rng.uniform(1.5, 1.3 * longest)
                while process.poll() is None and time.monotonic() < end:
                    time.sleep(0.01)
                if beside is not None:
                    kills += beside.poll() is None
                    kill(beside)
                if process.poll() is None:
                    kill(process)
                    kills += 1
                    continue
                said = process.communicate()[1]
                assert process.returncode == 0 or "is in use" in said, said
                if process.returncode == 0:
                    break
        assert left(folder) == whole, f"after {kills} kills"
        shutil.rmtree(folder)
    assert kills >= KILLS
