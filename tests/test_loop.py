"""The training loop: micro-batches, learning rate, divergence, that it learns; and its loss against the formula."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from exact import OneVariable, normal
from torch import Tensor, nn

from chaindiff.chain.chain import Chain
from chaindiff.chain.diffusion import Diffusion
from chaindiff.chain.variable import Variable
from chaindiff.edm.random import Draws
from chaindiff.io import tensorfile
from chaindiff.io.errors import UserError
from chaindiff.specs.link import LinkSpec
from chaindiff.specs.network import PriorSpec
from chaindiff.specs.sampling import SamplerSpec
from chaindiff.specs.training import EmaSpec, OptimizerSpec, TrainSpec
from chaindiff.training import loop
from chaindiff.training.loop import learning_rate, train


def vector_stage(seed: int = 0, **settings) -> Diffusion:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = settings.pop("network", PriorSpec(kind="prior", width=16, depth=1, heads=2))
        return Diffusion(Variable.vector("v", 4), network=network, **settings)


def vectors(samples: list[int]) -> dict[str, Tensor]:
    return {name: torch.stack([normal((4,), name, s).float() / 2 for s in samples]) for name in ("v", "c")}


def settings(**changes) -> TrainSpec:
    plain = {"images": 40, "batch": 8, "execution": "eager", "log_every": 1, "ema": EmaSpec(half_life=0)}
    return TrainSpec(**{**plain, **changes})


def run_train(folder: Path, stage: Diffusion, spec: TrainSpec, batches=vectors) -> dict[str, Tensor]:
    for _ in train(stage, batches, spec, folder, total=spec.images, metadata={"identity": "i"}):
        pass
    return tensorfile.load(folder / "weights.safetensors")[0]


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
        run_train(tmp_path, vector_stage(), settings().model_copy(update={"accumulate": 3}))


def test_the_state_of_another_stage_is_refused(tmp_path) -> None:
    run_train(tmp_path, vector_stage(), settings(images=8))
    steps = train(vector_stage(), vectors, settings(), tmp_path, total=40, metadata={"identity": "other"})
    with pytest.raises(UserError) as error:
        next(steps)
    assert str(error.value) == (
        f"{tmp_path}/state.safetensors is the state of another stage or of other training settings\n"
        f"  choose another --out, or delete {tmp_path} to start again"
    )


def test_learning_rate() -> None:
    spec = OptimizerSpec(lr=2.0, warmup=100, decay=40)
    rates = {1: 0.02, 25: 0.5, 100: 2.0, 101: 2.0, 360: 2.0, 370: 1 + math.sqrt(0.5), 380: 1.0, 400: 0.0}
    assert {images: learning_rate(spec, images, 400) for images in rates} == pytest.approx(rates)
    assert learning_rate(OptimizerSpec(lr=3.0), 1, 10) == learning_rate(OptimizerSpec(lr=3.0), 10, 10) == 3.0


def test_the_learning_rate_of_a_step_counts_the_images_before_it(tmp_path) -> None:
    run_train(tmp_path, vector_stage(), settings(optimizer=OptimizerSpec(lr=0.1, warmup=32)))
    rates = [json.loads(line)["lr"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rates == pytest.approx([0, 0.025, 0.05, 0.075, 0.1])


@pytest.fixture
def compiled(monkeypatch) -> list[nn.Module]:
    """The networks that training would have compiled."""
    found: list[nn.Module] = []
    monkeypatch.setattr(loop, "compile_network", found.append)
    monkeypatch.setattr(loop, "compiler", lambda: "c++")
    return found


def test_auto_compiles_after_some_steps_where_that_saves_more_than_it_takes(tmp_path, compiled, monkeypatch) -> None:
    spec = settings(images=80, execution="auto", checkpoint_every=8)
    run_train(tmp_path / "short", vector_stage(), spec)
    assert compiled == []  # 80 images are soon seen
    assert tensorfile.metadata(tmp_path / "short/state.safetensors")["execution"] == "eager"
    monkeypatch.setattr(loop, "COMPILING", 0.0)
    steps = train(vector_stage(), vectors, spec, tmp_path / "long", total=80, metadata={"identity": "i"})
    images = [step.images for step in steps if not compiled]
    assert images == [8 * step for step in range(1, loop.TIMED)]
    assert len(compiled) == 1
    assert tensorfile.metadata(tmp_path / "long/weights.safetensors")["execution"] == "compile"


def test_a_resumed_run_is_executed_as_it_was_decided(tmp_path, compiled, monkeypatch) -> None:
    spec = settings(images=160, execution="auto", checkpoint_every=8)
    steps = train(vector_stage(), vectors, spec, tmp_path, total=160, metadata={"identity": "i"})
    for _ in range(loop.TIMED + 2):
        next(steps)
    steps.close()
    monkeypatch.setattr(loop, "COMPILING", 0.0)
    run_train(tmp_path, vector_stage(), spec)
    assert compiled == []


@pytest.mark.parametrize("execution", ["eager", "compile"])
def test_what_is_asked_for_is_done_at_once(tmp_path, compiled, execution, monkeypatch) -> None:
    monkeypatch.setattr(loop, "COMPILING", 0.0 if execution == "eager" else math.inf)
    next(train(vector_stage(), vectors, settings(execution=execution), tmp_path, total=40, metadata={"identity": "i"}))
    assert len(compiled) == (execution == "compile")


class Infinite(OneVariable):
    """A network whose output is finite at the start, but not its gradient: the square root of a weight that is 0."""

    def __init__(self):
        super().__init__()
        self.scale, self.edge = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(()))

    def one(self, x, noise_labels, class_labels) -> Tensor:
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
    tensors, kept = tensorfile.load(tmp_path / "state.safetensors")
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
    tensorfile.fill(trained, weights, "the weights")
    # The median: single samples that start far out miss by up to 0.8, whatever the seed.
    assert float((Chain([trained]).sample(128)["v"] - value).abs().median()) < 0.03


# ------------------------------------------------------------ the loss


class Known(Draws):
    """Draws that the test knows: standard normal numbers by role."""

    def __init__(self, **values: Tensor):
        super().__init__(range(len(values["sigma"])), 0, "v")
        self.values = values

    def normal(self, role: str, shape=()) -> Tensor:
        assert self.values[role].shape[1:] == tuple(shape)
        return self.values[role]


class Affine(OneVariable):
    """F(x, c_noise) = 0.7 x + 0.3 c_noise, which float64 can follow."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.7))

    def one(self, x, noise_labels, class_labels) -> Tensor:
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
