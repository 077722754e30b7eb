"""Training runs through the command line: killed and resumed bit for bit, what is left alone, order and batches."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from chaindiff import cli
from chaindiff.chain.variable import Variable
from chaindiff.data import open_data
from chaindiff.edm.random import Draws
from chaindiff.io import tensorfile
from chaindiff.recipe.assembly import Assembly
from chaindiff.recipe.training import prepare
from chaindiff.specs.load import load_recipe
from chaindiff.specs.recipe import DataSpec
from chaindiff.specs.training import AugmentSpec
from chaindiff.training.batches import Batches

IMAGES, BATCH, TOTAL = 12, 8, 240  # rows of the data, so that batches cross epochs; images a step; images in all
RECIPE = """
name: tiny
data: {{path: {data}}}
variables: {{image: {{kind: image, shape: [3, 16, 16]}}}}
stages:
  image:
    network: {{kind: unet, channels: 16, mult: [1, 2], blocks: 1, attention: [], dropout: 0.1}}
    augment: {{probability: 0.5, colour: 0.5}}
    train:
      images: 240
      batch: 8
      optimizer: {{lr: 1.0e-3, warmup: 40, decay: 80}}
      ema: {{half_life: 100}}
      execution: eager
      checkpoint_every: 16
      preview_every: 160
      log_every: 1
    sample: {{steps: 2}}
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for index in range(IMAGES):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{index:02d}.png")
    return folder


@pytest.fixture(scope="module")
def recipe(data: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(RECIPE.format(data=data))
    return str(path)


def chaindiff_train(recipe: str, out: Path, *options: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", recipe, "--out", str(out), *options])
    return ended.value.code


@pytest.fixture(scope="module")
def finished(recipe: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that trained to its end undisturbed."""
    out = tmp_path_factory.mktemp("finished") / "run"
    assert chaindiff_train(recipe, out) == 0
    return out


@pytest.fixture
def again(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to go on with."""
    return Path(shutil.copytree(finished, tmp_path / "again"))


def stage_file(run: Path, name: str = "weights.safetensors") -> Path:
    return run / "stages" / "image" / name


def logged(run: Path) -> list[int]:
    return [json.loads(line)["images"] for line in stage_file(run, "metrics.jsonl").read_text().splitlines()]


def assert_same_tensors(one: Path, other: Path) -> None:
    (mine, _), (theirs, _) = tensorfile.load(one), tensorfile.load(other)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


# ------------------------------------------------------------ killed and started again


def kill_after(arguments: list[str], metrics: Path, lines: int, delay: float) -> None:
    """Start a command and kill it `delay` seconds after its metrics have so many lines."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        [sys.executable, "-m", "chaindiff", *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    until = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < until:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= lines:
            time.sleep(delay)
            break
        time.sleep(0.002)
    process.kill()
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors.decode()


def test_killed_training_ends_with_the_weights_of_undisturbed_training(recipe, finished, tmp_path) -> None:
    out, rng = tmp_path / "killed", random.Random(7)
    for lines in (rng.randrange(3, 8), rng.randrange(10, 20)):
        kill_after(["train", recipe, "--out", str(out)], stage_file(out, "metrics.jsonl"), lines, rng.uniform(0, 0.02))
        assert stage_file(out, "state.safetensors").exists()
        assert not stage_file(out).exists()
        # What a process leaves that was killed while it wrote: half a file, and half a line.
        stage_file(out, ".state.safetensors.0123456789abcdef.chaindiff.tmp").write_bytes(b"half")
        with stage_file(out, "metrics.jsonl").open("a") as file:
            file.write('{"images": 2')
    assert chaindiff_train(recipe, out) == 0
    assert_same_tensors(stage_file(out), stage_file(finished))
    assert_same_tensors(stage_file(out, "state.safetensors"), stage_file(finished, "state.safetensors"))
    assert logged(out) == logged(finished) == list(range(BATCH, TOTAL + 1, BATCH))
    assert list(out.rglob(".*")) == []


def test_a_finished_run_has_its_files_and_is_left_alone(recipe, finished, capsys) -> None:
    kept = tensorfile.metadata(stage_file(finished))
    assert (kept["format"], kept["images"], kept["total"]) == ("chaindiff-stage/1", "240", "240")
    assert (finished / "stages/image/previews/000000160.png").exists()
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert chaindiff_train(recipe, finished) == 0
    assert f"stage image has weights: {stage_file(finished)}" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_fresh_begins_anew_where_training_had_ended(recipe, finished, again) -> None:
    tensors, kept = tensorfile.load(stage_file(again))
    tensorfile.save(stage_file(again), {k: torch.zeros_like(v) for k, v in tensors.items()}, kept)
    assert chaindiff_train(recipe, again, "--fresh", "--set", "stages.image.train.preview_every=0") == 0
    assert_same_tensors(stage_file(again), stage_file(finished))
    assert logged(again) == list(range(BATCH, TOTAL + 1, BATCH))


class Killed(BaseException):
    """Stands for a process that ends here and now."""


@pytest.fixture(scope="module")
def prolonged(recipe: str, finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run and 32 images more, undisturbed."""
    out = Path(shutil.copytree(finished, tmp_path_factory.mktemp("prolonged") / "run"))
    assert chaindiff_train(recipe, out, "--more", "32") == 0
    return out


def test_more_goes_on_by_so_many_images(recipe, prolonged, again) -> None:
    assert tensorfile.metadata(stage_file(prolonged))["images"] == "272"
    assert logged(prolonged) == list(range(BATCH, 273, BATCH))
    for images in ("256", "272"):
        assert chaindiff_train(recipe, again, "--more", "16") == 0
        assert tensorfile.metadata(stage_file(again))["images"] == images


# Files are written three times: the state after 16 and 32 images, the weights at the end.
@pytest.mark.parametrize(("write", "done"), [(1, False), (1, True), (2, False), (2, True), (3, False)])
def test_more_that_was_killed_ends_where_it_would_have(recipe, prolonged, again, monkeypatch, write, done) -> None:
    save, calls = tensorfile.save, []

    def save_or_die(*arguments) -> None:
        calls.append(arguments)
        if len(calls) == write and not done:
            raise Killed
        save(*arguments)
        if len(calls) == write:
            raise Killed

    monkeypatch.setattr(tensorfile, "save", save_or_die)
    with pytest.raises(Killed):
        cli.main(["train", recipe, "--out", str(again), "--more", "32"])
    monkeypatch.setattr(tensorfile, "save", save)
    assert chaindiff_train(recipe, again, "--more", "32") == 0
    assert tensorfile.metadata(stage_file(again))["images"] == "272"
    assert_same_tensors(stage_file(again), stage_file(prolonged))


def test_plain_train_also_ends_more_that_was_killed(recipe, prolonged, finished, tmp_path) -> None:
    """Killed between the last state and the weights: the old weights must not pass for the new ones."""
    out = Path(shutil.copytree(prolonged, tmp_path / "again"))
    shutil.copy(stage_file(finished), stage_file(out))
    assert chaindiff_train(recipe, out) == 0
    assert_same_tensors(stage_file(out), stage_file(prolonged))


# ------------------------------------------------------------ order and batches


def make_batches(folder: Path, seed: int = 0, **augment) -> Batches:
    root = Variable.image("image", 3, 16)
    spec = AugmentSpec(**{"probability": 0.7, "colour": 0.5, **augment})
    return Batches(open_data(DataSpec(path=str(folder))), root, [root], {}, {}, {}, spec, seed)


def test_every_epoch_is_a_permutation_and_a_function_of_seed_and_epoch(data) -> None:
    batches = make_batches(data)
    epochs = [batches.rows(range(e * IMAGES, (e + 1) * IMAGES)) for e in range(4)]
    assert all(sorted(rows) == list(range(IMAGES)) for rows in epochs)
    assert len({tuple(rows) for rows in epochs}) == 4
    # Out of order, from another object, a sample at a time, across the edges of epochs: the same rows.
    other, flat = make_batches(data), [row for rows in epochs for row in rows]
    samples = list(range(4 * IMAGES))
    random.Random(0).shuffle(samples)
    assert [other.rows([s])[0] for s in samples] == [flat[s] for s in samples]
    assert other.rows(samples) == [flat[s] for s in samples]
    assert make_batches(data, seed=1).rows(range(IMAGES)) != epochs[0]


@pytest.mark.parametrize("variants", [0, 3])
def test_a_sample_is_the_same_in_every_batch(data, variants) -> None:
    whole = make_batches(data, variants=variants)(list(range(30)))
    for samples in ([17], [29, 3, 17], list(range(8, 24))):
        part = make_batches(data, variants=variants)(samples)
        assert part.keys() == {"image", "augment_labels"}
        for name, value in part.items():
            assert torch.equal(value, whole[name][samples]), name
    assert len({tuple(label.tolist()) for label in whole["augment_labels"]}) > 15, "augmentation must vary"


def test_without_augmentation_a_batch_holds_the_pixels(data) -> None:
    batches = make_batches(data, probability=0.0, colour=0.0, flip=False)
    samples = [0, 5, 40]
    batch = batches(samples)
    assert batch.keys() == {"image"}
    for value, row in zip(batch["image"], batches.rows(samples), strict=True):
        with Image.open(data / f"{row:02d}.png") as image:
            pixels = np.asarray(image).astype(np.float64).transpose(2, 0, 1) / 127.5 - 1
        np.testing.assert_allclose(value.numpy(), pixels, atol=1e-6)


@pytest.mark.parametrize(
    ("variable", "labels"),
    [
        ({"kind": "vector", "shape": [2], "of": "label"}, [[row / 12, -1.5] for row in range(IMAGES)]),
        ({"kind": "label", "shape": [10], "of": "label"}, [3, 7] * (IMAGES // 2)),  # two classes of a network of ten
    ],
    ids=["vector", "classes"],
)
def test_labels_of_edms_data_sets(data, recipe, tmp_path, variable, labels) -> None:
    folder = Path(shutil.copytree(data, tmp_path / "data"))
    rows = [[path.name, label] for path, label in zip(sorted(folder.iterdir()), labels, strict=True)]
    (folder / "dataset.json").write_text(json.dumps({"labels": rows}))
    changes = {"data": {"path": str(folder)}, "variables": {"told": variable}}
    loaded = load_recipe(recipe).override({**changes, "stages": {"image": {"given": [{"variable": "told"}]}}})
    assembly = Assembly(loaded, tmp_path / "run")
    batch = prepare(assembly, "image")(list(range(IMAGES)))
    np.testing.assert_allclose(sorted(batch["told"].tolist()), sorted(labels))
    loss = assembly.stages["image"].build().loss(batch, Draws(range(IMAGES), 0, "image"))
    assert bool(loss.isfinite().all())
