"""Training: killed and resumed bit for bit, its loss against a formula, its files, its order, and that it learns."""

from __future__ import annotations

import json
import math
import os
import random
import resource
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
from safetensors.torch import save_file
from torch import Tensor, nn

from chaindiff import cli
from chaindiff.chain import run_stage
from chaindiff.data import open_data
from chaindiff.edm.random import Draws, normal
from chaindiff.networks.condition import Given
from chaindiff.specs.errors import UserError
from chaindiff.specs.recipe import (
    AugmentSpec,
    DataSpec,
    EmaSpec,
    LinkSpec,
    OptimizerSpec,
    PriorSpec,
    SamplerSpec,
    TrainSpec,
    UNetSpec,
)
from chaindiff.stage import Stage
from chaindiff.training import checkpoint
from chaindiff.training.batches import Batches
from chaindiff.training.loop import compiles, learning_rate, train
from chaindiff.variables import Variable

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
    (mine, _), (theirs, _) = checkpoint.load(one), checkpoint.load(other)
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
        stage_file(out, ".state.safetensors.123.tmp").write_bytes(b"half")
        with stage_file(out, "metrics.jsonl").open("a") as file:
            file.write('{"images": 2')
    assert chaindiff_train(recipe, out) == 0
    assert_same_tensors(stage_file(out), stage_file(finished))
    assert_same_tensors(stage_file(out, "state.safetensors"), stage_file(finished, "state.safetensors"))
    assert logged(out) == logged(finished) == list(range(BATCH, TOTAL + 1, BATCH))
    assert list(out.rglob("*.tmp")) == []


def test_a_finished_run_has_its_files_and_is_left_alone(recipe, finished, capsys) -> None:
    kept = checkpoint.metadata(stage_file(finished))
    assert (kept["format"], kept["images"], kept["total"]) == ("chaindiff-stage/1", "240", "240")
    assert (finished / "stages/image/previews/000000160.png").exists()
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert chaindiff_train(recipe, finished) == 0
    assert f"stage image has weights: {stage_file(finished)}" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_fresh_begins_anew_where_training_had_ended(recipe, finished, again) -> None:
    tensors, kept = checkpoint.load(stage_file(again))
    checkpoint.save(stage_file(again), {k: torch.zeros_like(v) for k, v in tensors.items()}, kept)
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
    assert checkpoint.metadata(stage_file(prolonged))["images"] == "272"
    assert logged(prolonged) == list(range(BATCH, 273, BATCH))
    for images in ("256", "272"):
        assert chaindiff_train(recipe, again, "--more", "16") == 0
        assert checkpoint.metadata(stage_file(again))["images"] == images


# Files are written three times: the state after 16 and 32 images, the weights at the end.
@pytest.mark.parametrize(("write", "done"), [(1, False), (1, True), (2, False), (2, True), (3, False)])
def test_more_that_was_killed_ends_where_it_would_have(recipe, prolonged, again, monkeypatch, write, done) -> None:
    save, calls = checkpoint.save, []

    def save_or_die(*arguments) -> None:
        calls.append(arguments)
        if len(calls) == write and not done:
            raise Killed
        save(*arguments)
        if len(calls) == write:
            raise Killed

    monkeypatch.setattr(checkpoint, "save", save_or_die)
    with pytest.raises(Killed):
        cli.main(["train", recipe, "--out", str(again), "--more", "32"])
    monkeypatch.setattr(checkpoint, "save", save)
    assert chaindiff_train(recipe, again, "--more", "32") == 0
    assert checkpoint.metadata(stage_file(again))["images"] == "272"
    assert_same_tensors(stage_file(again), stage_file(prolonged))


def test_plain_train_also_ends_more_that_was_killed(recipe, prolonged, finished, tmp_path) -> None:
    """Killed between the last state and the weights: the old weights must not pass for the new ones."""
    out = Path(shutil.copytree(prolonged, tmp_path / "again"))
    shutil.copy(stage_file(finished), stage_file(out))
    assert chaindiff_train(recipe, out) == 0
    assert_same_tensors(stage_file(out), stage_file(prolonged))


# ------------------------------------------------------------ the loop


def vector_stage(seed: int = 0, **settings) -> Stage:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = settings.pop("network", PriorSpec(kind="prior", width=16, depth=1, heads=2))
        return Stage(Variable.vector("v", 4), network=network, **settings)


def vectors(samples: list[int]) -> dict[str, Tensor]:
    return {name: torch.stack([normal((4,), name, s).float() / 2 for s in samples]) for name in ("v", "c")}


def settings(**changes) -> TrainSpec:
    plain = {"images": 40, "batch": 8, "execution": "eager", "log_every": 1, "ema": EmaSpec(half_life=0)}
    return TrainSpec(**{**plain, **changes})


def run_train(folder: Path, stage: Stage, spec: TrainSpec, batches=vectors) -> dict[str, Tensor]:
    for _ in train(stage, batches, spec, folder, total=spec.images, metadata={"identity": "i"}):
        pass
    return checkpoint.load(folder / "weights.safetensors")[0]


def test_micro_batches_give_the_weights_of_the_whole_batch(tmp_path) -> None:
    """With an eps above rounding errors, which Adam would magnify, and no clip, which would hide a wrong scale."""
    optimizer = OptimizerSpec(lr=1e-2, eps=1e-2, clip=0)
    given = [(Variable.vector("c", 4), LinkSpec(variable="c", dropout=0.5, noise=0.3))]
    weights = [
        run_train(tmp_path / str(parts), vector_stage(given=given), settings(accumulate=parts, optimizer=optimizer))
        for parts in (1, 4)
    ]
    before = vector_stage(given=given).state_dict()
    assert max(float((weights[0][k] - before[k]).abs().max()) for k in before) > 1e-2
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=1e-5)
    losses = [[json.loads(s)["loss"] for s in (tmp_path / n / "metrics.jsonl").read_text().splitlines()] for n in "14"]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_batch_that_cannot_be_shared_out(tmp_path) -> None:
    with pytest.raises(UserError, match=r"train\.batch 8 cannot be shared by 1 processes x 3 micro-batches"):
        run_train(tmp_path, vector_stage(), settings(accumulate=3))


def test_the_state_of_another_stage_is_refused(tmp_path) -> None:
    run_train(tmp_path, vector_stage(), settings(images=8))
    steps = train(vector_stage(), vectors, settings(), tmp_path, total=40, metadata={"identity": "other"})
    with pytest.raises(UserError) as error:
        next(steps)
    assert str(error.value) == (
        f"{tmp_path}/state.safetensors is the state of another stage or of other training settings\n"
        f"  choose another --out, or delete {tmp_path} to begin afresh"
    )


def test_learning_rate() -> None:
    spec = OptimizerSpec(lr=2.0, warmup=100, decay=40)
    rates = {1: 0.02, 25: 0.5, 100: 2.0, 101: 2.0, 360: 2.0, 370: 1 + math.sqrt(0.5), 380: 1.0, 400: 0.0}
    assert {images: learning_rate(spec, images, 400) for images in rates} == pytest.approx(rates)
    assert learning_rate(OptimizerSpec(lr=3.0), 1, 10) == learning_rate(OptimizerSpec(lr=3.0), 10, 10) == 3.0


def test_the_learning_rate_of_a_step_counts_its_own_images(tmp_path) -> None:
    run_train(tmp_path, vector_stage(), settings(optimizer=OptimizerSpec(lr=0.1, warmup=32)))
    rates = [json.loads(line)["lr"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rates == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1])


def test_compiles(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/clang++" if name == "clang++" else None)
    assert compiles(settings(execution="auto"), 1_000_000)
    assert not compiles(settings(execution="auto"), 1000)
    assert not compiles(settings(execution="eager"), 1_000_000)
    assert compiles(settings(execution="compile"), 1)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert not compiles(settings(execution="auto"), 1_000_000)


class Infinite(nn.Module):
    """A network whose output is finite at the start, but not its gradient: the square root of a weight that is 0."""

    def __init__(self):
        super().__init__()
        self.scale, self.edge = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(()))

    def forward(self, x, noise_labels, class_labels=None, augment_labels=None, context=None) -> Tensor:
        return x * self.scale + self.edge.sqrt()


@pytest.mark.parametrize("log_every", [1, 50])
def test_a_loss_that_is_not_finite_ends_training_and_spares_the_checkpoint(tmp_path, log_every) -> None:
    def broken(samples: list[int]) -> dict[str, Tensor]:
        return {"v": torch.full((len(samples), 4), math.nan if samples[0] >= 24 else 0.1)}

    with pytest.raises(UserError) as error:
        run_train(tmp_path, vector_stage(), settings(checkpoint_every=8, log_every=log_every), broken)
    assert str(error.value) == (
        "the loss of stage 'v' is nan after 32 images\n"
        "  lower train.optimizer.lr or lengthen its warmup; the last checkpoint is kept"
    )
    tensors, kept = checkpoint.load(tmp_path / "state.safetensors")
    assert kept["images"] == "24"
    assert all(value.isfinite().all() for value in tensors.values())


def test_weights_that_are_not_finite_are_not_saved(tmp_path) -> None:
    with pytest.raises(UserError, match="the weights of stage 'v' are not finite after 8 images"):
        run_train(tmp_path, vector_stage(network=Infinite()), settings(checkpoint_every=8))
    assert not (tmp_path / "state.safetensors").exists()


def test_learns_a_constant(tmp_path) -> None:
    value = torch.tensor([0.5, -0.5, 0.25, -0.25])
    sampler = SamplerSpec(steps=12)
    stage = vector_stage(network=PriorSpec(kind="prior", width=32, depth=1, heads=2), sampler=sampler)
    spec = settings(images=9600, batch=32, log_every=30, optimizer=OptimizerSpec(lr=3e-3, decay=4800))
    weights = run_train(tmp_path, stage, spec, lambda samples: {"v": value.repeat(len(samples), 1)})
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0] / 10
    trained = vector_stage(1, network=PriorSpec(kind="prior", width=32, depth=1, heads=2), sampler=sampler)
    checkpoint.fill(trained, weights, "the weights")
    samples = run_stage(trained.eval(), {}, range(16), 0)
    assert float((samples - value).abs().max()) < 0.05


# ------------------------------------------------------------ the loss


class Known(Draws):
    """Draws that the test knows: standard normal numbers by role."""

    def __init__(self, **values: Tensor):
        super().__init__(range(len(values["sigma"])), 0, "v")
        self.values = values

    def normal(self, role: str, shape=()) -> Tensor:
        assert self.values[role].shape[1:] == tuple(shape)
        return self.values[role]


class Affine(nn.Module):
    """F(x, c_noise) = 0.7 x + 0.3 c_noise, which float64 can follow."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.7))

    def forward(self, x, noise_labels, class_labels=None, augment_labels=None, context=None) -> Tensor:
        return self.weight * x + 0.3 * noise_labels[:, None]


@pytest.mark.parametrize("kind", ["edm", "x0"])
def test_loss_equals_the_formula(kind) -> None:
    """Karras et al. 2022, equations 2, 3, 7 and 8 and table 1, in float64."""
    rng = np.random.default_rng(3)
    clean, normals, noise = rng.normal(size=(6, 4)) / 2, rng.normal(size=6), rng.normal(size=(6, 4))
    spread, sigma = 0.5, np.exp(-1.2 + 1.2 * normals)[:, None]
    noisy = clean + sigma * noise
    raw = 0.7 * noisy / np.sqrt(sigma**2 + spread**2) + 0.3 * np.log(sigma) / 4
    skip, out = spread**2 / (sigma**2 + spread**2), sigma * spread / np.sqrt(sigma**2 + spread**2)
    weight = (sigma**2 + spread**2) / (sigma * spread) ** 2
    if kind == "x0":
        skip, out, weight = 0, 1, 1
    expected = (weight * (skip * noisy + out * raw - clean) ** 2).mean(axis=1)

    stage = vector_stage(network=Affine(), precondition=kind)
    known = Known(sigma=torch.from_numpy(normals).float(), noise=torch.from_numpy(noise).float())
    found = stage.loss({"v": torch.from_numpy(clean).float()}, known)
    np.testing.assert_allclose(found.detach().double().numpy(), expected, rtol=2e-5)


def test_levels_of_training_are_lognormal_and_depend_on_the_sample_alone() -> None:
    draws = Draws(range(4000), 0, "v")
    levels = draws.normal("sigma")
    assert float(levels.mean()) == pytest.approx(0, abs=5 / math.sqrt(4000))
    assert float(levels.std()) == pytest.approx(1, abs=5 / math.sqrt(8000))
    stage = vector_stage(network=Affine())
    whole = stage.loss(vectors([3, 4, 90]), Draws([3, 4, 90], 0, "v"))
    alone = stage.loss(vectors([90]), Draws([90], 0, "v"))
    torch.testing.assert_close(whole[2:], alone)


# ------------------------------------------------------------ files


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path) -> None:
    path = tmp_path / "state.safetensors"
    checkpoint.save(path, {"a": torch.arange(3)}, {"images": "1"})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)  # writing beyond it fails as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError) as error:
            checkpoint.save(path, {"a": torch.zeros(100_000)}, {"images": "2"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(error.value).startswith(f"cannot write {path}: ")
    assert "File too large" in error.value.message
    assert error.value.hint == (
        "free some space or choose another folder with --out; the last complete file is untouched"
    )
    tensors, kept = checkpoint.load(path)
    assert torch.equal(tensors["a"], torch.arange(3))
    assert kept == {"images": "1"}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("damage", ["missing", "truncated", "text", "empty"])
def test_files_that_are_not_whole(tmp_path, damage) -> None:
    path = tmp_path / "weights.safetensors"
    if damage == "truncated":
        save_file({"a": torch.zeros(100)}, path)
        path.write_bytes(path.read_bytes()[:-50])
    elif damage != "missing":
        path.write_text("these are no weights" if damage == "text" else "")
    expected = (
        f"there is no weights file {path}" if damage == "missing" else f"{path} is not a complete safetensors file: "
    )
    for read in (checkpoint.load, checkpoint.metadata):
        with pytest.raises(UserError) as error:
            read(path)
        assert error.value.message.startswith(expected)


def test_fill_names_what_does_not_fit() -> None:
    module = nn.Linear(3, 2)
    with pytest.raises(UserError) as error:
        checkpoint.fill(module, {"weight": torch.zeros(2, 4), "bia": torch.zeros(2)}, "w.safetensors")
    assert str(error.value) == (
        "w.safetensors does not fit this stage: missing bias; unexpected bia; weight is [2, 4], expected [2, 3]\n"
        "  the file belongs to another network, or to other given variables"
    )
    many = {f"extra{i}": torch.zeros(1) for i in range(5)} | dict(module.state_dict())
    with pytest.raises(UserError, match="unexpected extra0; unexpected extra1; unexpected extra2; and 2 more"):
        checkpoint.fill(module, many, "w.safetensors")


# ------------------------------------------------------------ beginning from other weights

UNET = UNetSpec(kind="unet", channels=16, mult=[1, 2], blocks=1, attention=[], dropout=0.0)
IMAGE, VECTOR = Variable.image("image", 3, 16), Variable.vector("c", 5)


def image_stage(seed: int, **settings) -> Stage:
    """A stage whose weights are none of them 0 or tiny, as after training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        stage = Stage(IMAGE, network=UNET, **settings)
        with torch.no_grad():
            for parameter in stage.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.05)
    return stage.eval()


@pytest.mark.parametrize("bare", [True, False])
def test_an_unconditional_network_begins_a_conditional_stage(tmp_path, bare) -> None:
    """VCDM, section 4: at first the output is the unconditional network's, whatever the condition."""
    path = tmp_path / "edm.safetensors"
    teacher = image_stage(1)
    save_file((teacher.network if bare else teacher).state_dict(), path)
    given = [(VECTOR, LinkSpec(variable="c", dropout=0.1, null="learned"))]
    stage = image_stage(2, given=given)
    x, sigma = torch.randn(4, 3, 16, 16), torch.tensor([0.01, 0.3, 2.0, 50.0])
    with torch.no_grad():
        expected = teacher.denoise(x, sigma, teacher.conditioner({}, 4, x))

        def denoised() -> list[Tensor]:
            values = [Given(torch.randn(4, 5) * 10), Given(torch.randn(4, 5), torch.zeros(4, dtype=torch.bool))]
            return [stage.denoise(x, sigma, stage.conditioner({"c": value}, 4, x)) for value in values]

        assert not any(torch.allclose(output, expected, atol=1e-2) for output in denoised())
        checkpoint.begin_from(stage, path)
        assert all(torch.equal(output, expected) for output in denoised())
    assert not stage.network.map_label.weight.any()
    assert not stage.network.map_label.bias.any()
    stage({"image": x, "c": torch.randn(4, 5)}, Draws(range(4), 0, "image")).mean().backward()
    assert stage.network.map_label.weight.grad.any(), "what begins at zero must learn"


def test_weights_that_cannot_begin_a_stage(tmp_path) -> None:
    path = tmp_path / "edm.safetensors"
    save_file(image_stage(1).network.state_dict(), path)
    given = [(Variable.image("small", 3, 8), LinkSpec(variable="small"))]
    with pytest.raises(UserError) as error:
        checkpoint.begin_from(image_stage(2, given=given), path)
    assert str(error.value) == (
        f"{path} cannot begin this stage: network.enc.16x16_conv.weight has shape [16, 3, 3, 3], expected [16, 6, 3, 3]"
    )
    with pytest.raises(UserError, match=r"cannot begin this stage: network\.map_augment\.weight is missing"):
        checkpoint.begin_from(image_stage(2, augment_dim=9), path)


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
