"""Power-function averages: closed forms against quadrature, reconstruction against averages kept along, resuming."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from exact import normal
from torch import Tensor, nn

from chaindiff import cli
from chaindiff.chain.diffusion import Diffusion
from chaindiff.chain.formulation import averages
from chaindiff.chain.variable import Variable
from chaindiff.edm.ema import Average, PowerEma, coefficients, gamma_of, inner
from chaindiff.io import files, tensorfile
from chaindiff.io.errors import UserError
from chaindiff.recipe.assembly import Assembly
from chaindiff.specs.load import load_recipe
from chaindiff.specs.network import PriorSpec
from chaindiff.specs.training import EmaSpec, PowerEmaSpec, TrainSpec
from chaindiff.training import snapshots, states
from chaindiff.training.loop import train
from chaindiff.training.snapshots import reconstruct, reconstruct_stage

# ------------------------------------------------------------ profiles


def sigma_rel_of(gamma: float) -> float:
    """Standard deviation of the profile, relative to its length: that of a beta distribution (EDM2, section 3.1)."""
    return ((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) ** 0.5


def profile(time: np.ndarray, gamma: float, end: float) -> np.ndarray:
    """p_gamma at a time, for a profile of length `end`; 0 after it (EDM2, eq. 1)."""
    inside = np.minimum(time / end, 1.0)
    return np.where(time <= end, (gamma + 1) / end * inside**gamma, 0.0)


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_exponents_of_the_published_tracks(sigma_rel: float, gamma: float) -> None:
    """EDM2, section 3.1."""
    assert gamma_of(sigma_rel) == pytest.approx(gamma, abs=0.005)


def test_width_and_exponent_are_inverse() -> None:
    for gamma in np.geomspace(0.01, 2000, 50).tolist():
        assert gamma_of(sigma_rel_of(gamma)) == pytest.approx(gamma, rel=1e-8)
    for sigma_rel in np.linspace(0.001, 0.288, 50).tolist():
        assert sigma_rel_of(gamma_of(sigma_rel)) == pytest.approx(sigma_rel, rel=1e-10)
    for wrong in (0.0, -0.1, 0.29):
        with pytest.raises(ValueError, match=r"above 0 and below 0\.2887"):
            gamma_of(wrong)


@pytest.mark.parametrize("sigma_rel", [0.03, 0.1, 0.25])
def test_width_is_the_standard_deviation_of_the_profile(sigma_rel: float) -> None:
    time = np.linspace(0, 7, 200_001)
    density = profile(time, gamma_of(sigma_rel), 7.0)
    mean = np.trapezoid(density * time, time)
    assert np.trapezoid(density, time) == pytest.approx(1, abs=1e-4)
    assert np.trapezoid(density * (time - mean) ** 2, time) ** 0.5 / 7 == pytest.approx(sigma_rel, rel=1e-4)


@pytest.mark.parametrize(("one", "other"), [((0.05, 3.0), (0.1, 5.0)), ((0.2, 4.0), (0.03, 3.0)), ((0.1, 2.0),) * 2])
def test_inner_products_against_quadrature(one: tuple[float, float], other: tuple[float, float]) -> None:
    time = np.linspace(0, min(one[1], other[1]), 200_001)
    a, b = ((gamma_of(sigma_rel), end) for sigma_rel, end in (one, other))
    expected = np.trapezoid(profile(time, *a) * profile(time, *b), time)
    assert inner(*a, *b) == pytest.approx(expected, rel=1e-5)
    assert inner(*b, *a) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("sigma_rel", "end"), [(0.03, 1.0), (0.07, 1.0), (0.2, 1.0), (0.1, 0.6)])
def test_coefficients_against_least_squares_on_a_grid(sigma_rel: float, end: float) -> None:
    """Profiles on the midpoints of a fine grid, the sum of the coefficients held at 1 by a heavy row."""
    ends = np.repeat(np.arange(1, 9) / 8, 2)
    gammas = np.tile([gamma_of(0.05), gamma_of(0.1)], 8)
    found, error = coefficients(gammas, ends, gamma_of(sigma_rel), end)
    time = (np.arange(40_000) + 0.5) / 40_000
    columns = np.stack([profile(time, g, t) for g, t in zip(gammas, ends, strict=True)], axis=1)
    target = profile(time, gamma_of(sigma_rel), end)
    heavy = 1e5
    expected = np.linalg.lstsq(
        np.vstack([columns, np.full(16, heavy)]), np.append(target, heavy), rcond=None
    )[0]  # fmt: skip
    np.testing.assert_allclose(found, expected, atol=2e-3)
    assert found.sum() == pytest.approx(1, abs=1e-12)
    missed = np.linalg.norm(columns @ found - target) / np.linalg.norm(target)
    assert error == pytest.approx(missed, rel=1e-3, abs=1e-6)


def test_a_running_average_is_the_integral_of_its_profile() -> None:
    """Weights that stay the same for the length of a step: w_i times the profile's integral over step i, in float64."""
    values = np.random.default_rng(0).normal(size=30)
    module = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    average = PowerEma(module, 0.1)
    for step, value in enumerate(values, 1):
        with torch.no_grad():
            module.weight.fill_(value)
        average.update(module, 8, 8 * step)
    shares = np.diff((np.arange(31) / 30) ** (average.gamma + 1))  # the integral of eq. 1
    assert average.model.weight.item() == pytest.approx(shares @ values, rel=1e-12)
    assert average.keep(8, 8) == 0  # the first step leaves nothing of the initial weights


def test_averages_of_a_recipe() -> None:
    module = nn.Linear(2, 2)
    assert list(averages(EmaSpec(half_life=10), module)) == ["ema"]
    kept = averages(PowerEmaSpec(kind="power", tracks=[0.1, 0.05]), module)
    assert list(kept) == ["ema0.1", "ema0.05"]
    assert len({id(average.model) for average in kept.values()}) == 2


# ------------------------------------------------------------ reconstruction

STEPS, EVERY = 512, 32  # 16 snapshots of two tracks
META = {"identity": "walk", "format": "chaindiff-stage/1"}


class Walk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.moving, self.still = nn.Parameter(torch.zeros(4096)), nn.Parameter(torch.full((7,), 3.14159))
        self.register_buffer("number", torch.tensor(5))
        self.register_buffer("large", torch.tensor([1e6]))


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[tuple[float, int], Tensor]]:
    """A random walk of weights with snapshots, and averages of other widths that were kept all along."""
    folder, rng, module = tmp_path_factory.mktemp("walk"), np.random.default_rng(0), Walk()
    kept: list[Average[Walk]] = list(averages(PowerEmaSpec(kind="power"), module).values())
    direct = {sigma_rel: PowerEma(module, sigma_rel) for sigma_rel in (0.04, 0.05, 0.07, 0.15)}
    truth = {}
    for step in range(1, STEPS + 1):
        with torch.no_grad():
            module.moving += torch.from_numpy(rng.normal(size=4096)).float() / 8
        for average in (*kept, *direct.values()):
            average.update(module, 4, 4 * step)
        if step % EVERY == 0:
            snapshots.write(folder, kept, 4 * step, META)
            truth |= {(s, 4 * step): average.model.moving.detach().clone() for s, average in direct.items()}
    return folder, truth


def far(one: Tensor, other: Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


@pytest.mark.parametrize("images", [4 * STEPS, 2 * STEPS])
@pytest.mark.parametrize("sigma_rel", [0.04, 0.07, 0.15])
def test_another_width_as_if_it_had_been_kept(walk, tmp_path, sigma_rel: float, images: int) -> None:
    """Within 0.5% of the average kept all along (1% from 8 snapshots), five times nearer than any snapshot."""
    folder, truth = walk
    said = reconstruct_stage(folder, sigma_rel, tmp_path / "out.safetensors", images)
    tensors, kept = tensorfile.load(tmp_path / "out.safetensors")
    expected = truth[sigma_rel, images]
    error = far(tensors["moving"], expected)
    assert error < (0.005 if images == 4 * STEPS else 0.01)
    assert error < 0.2 * min(far(tensorfile.load(path)[0]["moving"], expected) for path in snapshots._files(folder))
    assert (kept["images"], kept["sigma_rel"], kept["identity"]) == (str(images), str(sigma_rel), "walk")
    assert f" of {images // (4 * EVERY) * 2} snapshots" in said
    # What did not move is what it was, to the half precision of the snapshots; what halves do not hold is kept whole.
    torch.testing.assert_close(tensors["still"], torch.full((7,), 3.14159).half().float(), rtol=0, atol=1e-6)
    assert torch.equal(tensors["number"], torch.tensor(5)) and tensors["large"].item() == pytest.approx(1e6)
    assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in tensors.values())


def test_a_stored_track_is_given_back(walk, tmp_path) -> None:
    folder, truth = walk
    said = reconstruct_stage(folder, 0.05, tmp_path / "out.safetensors")
    stored, _ = tensorfile.load(folder / "snapshots" / f"{4 * STEPS:09d}-0.05.safetensors")
    assert stored["moving"].dtype == torch.float16
    tensors, kept = tensorfile.load(tmp_path / "out.safetensors")
    torch.testing.assert_close(tensors["moving"], stored["moving"].float(), rtol=0, atol=1e-6)
    assert far(tensors["moving"], truth[0.05, 4 * STEPS]) < 2**-11  # rounding to halves
    assert float(kept["profile_error"]) < 1e-6
    assert said.endswith("std 0.05 at 2048 images, of 32 snapshots; its profile is within 0.00%")


def test_what_cannot_be_reconstructed_is_explained(walk, tmp_path) -> None:
    folder, _ = walk
    files, out = snapshots._files(folder), tmp_path / "out.safetensors"

    def refusal(call, *arguments, **options) -> str:
        with pytest.raises(UserError) as error:
            call(*arguments, **options, out=out)
        assert not out.exists()
        return str(error.value)

    message = refusal(reconstruct, files, 0.005)
    assert (
        "std 0.005 at 2048 images cannot be reconstructed: 32 snapshots up to there would miss its profile" in message
    )
    low, high = (float(word.strip(";")) for word in message.split("they reach widths from ")[1].split()[0:3:2])
    assert low < 0.03 and 0.2 < high <= 0.28
    reconstruct(files, low + 1e-3, out=tmp_path / "low.safetensors")
    message = refusal(reconstruct, files[-1:], 0.07)
    assert "the only snapshot up to there" in message and "train.ema.snapshot_every" in message
    assert "above 0 and below 0.2887" in refusal(reconstruct, files, 0.3)
    assert "the snapshots end at 2048 images, before 4096" in refusal(reconstruct, files, 0.07, 4096)

    other = tmp_path / "snapshots" / "000002048-0.07.safetensors"
    tensors, kept = tensorfile.load(files[-1])
    tensorfile.save(other, tensors, {**kept, "identity": "another"})
    assert "are snapshots of different networks" in refusal(reconstruct, [*files, other], 0.07)
    tensorfile.save(other, {"moving": torch.zeros(3)}, kept)
    assert "are snapshots of different networks" in refusal(reconstruct, [*files, other], 0.07)
    tensorfile.save(other, tensors, META)
    assert "is not a snapshot of a power-function average" in refusal(reconstruct, [other], 0.07)
    assert "kind: power" in refusal(reconstruct_stage, tmp_path / "nothing", 0.07)


# ------------------------------------------------------------ training


def vectors(samples: list[int]) -> dict[str, Tensor]:
    return {"v": torch.stack([normal((4,), "v", s).float() / 2 for s in samples])}


def settings(images: int = 64) -> TrainSpec:
    ema = {"kind": "power", "tracks": [0.1, 0.05], "snapshot_every": 24}
    return TrainSpec.model_validate(
        {"images": images, "batch": 8, "execution": "eager", "checkpoint_every": 16, "ema": ema}
    )


def run_train(folder: Path, steps: int | None = None, identity: str = "i") -> None:
    """Train, or be killed after so many steps."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stage = Diffusion(Variable.vector("v", 4), network=PriorSpec(kind="prior", width=16, depth=1, heads=2))
    for number, _ in enumerate(train(stage, vectors, settings(), folder, total=64, metadata={"identity": identity}), 1):
        if number == steps:
            return


def test_resumed_tracks_and_snapshots_are_those_of_undisturbed_training(tmp_path) -> None:
    run_train(tmp_path / "whole")
    for steps in (3, 2, 3):  # killed after the snapshot of 24 images, whose state is that of 16; and again
        run_train(tmp_path / "killed", steps)
        leftover = tmp_path / "killed" / "snapshots" / ".000000048-0.1.safetensors.0123456789abcdef.chaindiff.tmp"
        leftover.write_bytes(b"half")
        files.remove_leftovers.cache_clear()  # as in another process
    assert not (tmp_path / "killed" / "weights.safetensors").exists()
    run_train(tmp_path / "killed")
    whole, killed = (
        {str(path.relative_to(tmp_path / run)): path for path in (tmp_path / run).rglob("*.safetensors*")}
        for run in ("whole", "killed")
    )
    names = [f"snapshots/{images:09d}-{track}.safetensors" for images in (24, 48, 64) for track in (0.05, 0.1)]
    assert (
        sorted(whole)
        == sorted(killed)
        == sorted([*names, "state.previous.safetensors", "state.safetensors", "weights.safetensors"])
    )
    for name, path in whole.items():
        (mine, _), (theirs, _) = tensorfile.load(path), tensorfile.load(killed[name])
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine), name


def test_the_weights_are_the_first_tracks_and_new_training_begins_without_old_snapshots(tmp_path) -> None:
    run_train(tmp_path)
    weights, _ = tensorfile.load(tmp_path / "weights.safetensors")
    state, _ = tensorfile.load(tmp_path / "state.safetensors")
    for name, value in weights.items():
        assert torch.equal(value, state[f"ema0.1.{name}"])
    assert any(not torch.equal(value, state[f"ema0.05.{name}"]) for name, value in weights.items())
    states.discard(tmp_path)
    run_train(tmp_path, steps=4, identity="other")
    kept = [tensorfile.metadata(path) for path in snapshots._files(tmp_path)]
    assert [(k["images"], k["identity"]) for k in kept] == [("24", "other")] * 2


# ------------------------------------------------------------ recipes and the command line

RECIPE = """
name: vectors
data: {path: emoji64, split: test, where: {style: google}}
variables:
  image: {kind: image, shape: [3, 64, 64]}
  small: {kind: image, shape: [3, 8, 8], encoder: {kind: resize, of: image}}
stages:
  small:
    network: {kind: unet, channels: 16, mult: [1], blocks: 1, attention: []}
    train:
      images: 96
      batch: 8
      execution: eager
      ema: {kind: power, snapshot_every: 8}
    sample: {steps: 2}
"""


def test_reconstructed_weights_are_those_of_a_stage(tmp_path, capsys) -> None:
    recipe, run = tmp_path / "vectors.yaml", tmp_path / "run"
    recipe.write_text(RECIPE)

    def command(*arguments: str) -> tuple[int | None, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    assert command("train", str(recipe), "--out", str(run), "--quiet")[0] == 0
    file = tmp_path / "other.safetensors"
    arguments = ["ema", str(run / "stages" / "small"), "--std", "0.15", "--out", str(file)]
    status, out, err = command(*arguments)
    assert (status, err) == (0, "")
    assert out.startswith(f"{file}: std 0.15 at 96 images, of 24 snapshots; its profile is within ")
    chain = Assembly(load_recipe(recipe, changes=[f"stages.small.weights={file}"]), tmp_path / "elsewhere").chain()
    own = Assembly(load_recipe(recipe), run).chain()
    samples = [made.sample(2, seed=0)["small"] for made in (chain, own)]
    assert samples[0].isfinite().all() and not torch.equal(*samples)
    status, _, err = command("ema", str(run), "--std", "0.15", "--out", str(file))
    assert status == 2 and f"a stage's folder has them: {run / 'stages' / 'small'}" in err


def test_how_often_snapshots_are_written_is_no_part_of_what_is_trained() -> None:
    def identity(*changes: str) -> str:
        return (
            Assembly(load_recipe("vcdm_emoji16", changes=[f"stages.image16.train.ema.{c}" for c in changes]))
            .stages["image16"]
            .identity
        )

    power = identity("kind=power")  # another kind drops the card's half-life, though the card names no kind
    assert power != identity("kind=exponential") == identity("half_life=20000")
    assert power == identity("kind=power", "snapshot_every=5") == identity("kind=power", "tracks=[0.05, 0.1]")
    assert power != identity("kind=power", "tracks=[0.1]")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["kind=powr"], "unknown kind 'powr'; did you mean 'power'?"),
        (["kind=power", "half_life=3"], "unknown field 'half_life'"),
        (["snapshot_every=3"], "unknown field 'snapshot_every'"),
        (["kind=power", "tracks=[0.05, 0.05]"], "train.ema.tracks: the same EMA is tracked twice"),
        (["kind=power", "tracks=[0.3]"], "should be below 0.2886751, not 0.3"),
        (["kind=power", "tracks=[]"], "expected at least 1 item"),
    ],
)
def test_settings_that_make_no_sense(changes: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        load_recipe("vcdm_emoji16", changes=[f"stages.image16.train.ema.{change}" for change in changes])
    assert message in str(error.value)
