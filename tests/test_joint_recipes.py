"""Published joint models as recipes: sizes, levels, samplers and EMAs against their papers; and they run."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy import stats
from torch import Tensor

from chaindiff import cli
from chaindiff.chain.diffusion import Diffusion
from chaindiff.data import open_data
from chaindiff.edm.families import Drawn
from chaindiff.edm.random import Draws
from chaindiff.edm.schedules import Flow
from chaindiff.recipe.assembly import Assembly
from chaindiff.specs.load import load_recipe
from chaindiff.specs.recipe import DataSpec
from chaindiff.specs.training import EmaSpec

COUNT = 40_000
ERROR = 4 / math.sqrt(COUNT)  # four standard deviations of a share, at most 1/2 each


@cache
def stage(recipe: str, *changes: str, name: str = "both") -> Diffusion:
    return Assembly(load_recipe(recipe, changes=changes)).stages[name].on_meta()


def size(found: Diffusion) -> int:
    return sum(parameter.numel() for parameter in found.parameters())


# ------------------------------------------------------------ sizes


def linear(inner: int, outer: int) -> int:
    return inner * outer + outer


def level(width: int, features: int = 256) -> int:
    """The MLP of a level, from sinusoids."""
    return linear(features, width) + linear(width, width)


def wide_head(width: int, wide: int, channels: int) -> int:
    """DiT-DH's two SwiGLU blocks with its embeddings of x and of the trunk and its last layer, for DiT's own."""
    hidden, norms = wide * 4 * 2 // 3, 4 * wide
    block = linear(wide, 3 * wide) + linear(wide, wide) + linear(wide, 6 * wide)
    block += linear(wide, 2 * hidden) + linear(hidden, wide)
    ends = linear(channels, wide) + linear(width, wide) + linear(wide, 2 * wide) + linear(wide, channels)
    return 2 * block + norms + ends - linear(width, 2 * width) - linear(width, channels)


POSITIONS = 256 * 1152  # are fixed, but parameters in the published code
NORMS = 57 * 1152  # weights of RMS norms, two a block and the last; ours have none
VARIANCES = linear(1152, 16)  # of 4 channels in patches of 2, which SiT's code computes and drops
# What the published networks have and ours have not, and their sizes in millions: ReDi's is that of SiT-XL/2; REG,
# table 2; SFD, README; RAE with its wide head and twice as many sinusoids, as quoted by RiT (arXiv 2605.21981).
SIZES = {
    "redi": ("both", POSITIONS + 3 * VARIANCES - level(1152), 675),
    "reg": ("both", POSITIONS + VARIANCES - level(1152) + 2 * 1152, 677),
    "sfd": ("both", POSITIONS + NORMS + 2 * (level(576) - level(1152)), 675),
    "rae": ("latent", POSITIONS + NORMS + wide_head(1152, 2048, 768) + level(1152, 512) - level(1152), 839),
}


@pytest.mark.parametrize("recipe", SIZES)
def test_sizes_are_the_published_ones_but_for_what_is_named(recipe: str) -> None:
    name, more, published = SIZES[recipe]
    assert round((size(stage(recipe, name=name)) + more) / 1e6) == published


def test_the_larger_semantic_first_model_has_a_billion_parameters() -> None:
    network = "stages.both.network={kind: transformer, width: 1536, depth: 24, heads: 24}"
    assert round(size(stage("sfd", network)) / 1e9, 1) == 1.0


def test_rcg_is_dit_with_a_vector_in_place_of_the_class() -> None:
    """DiT-XL/2 has 675.1 million parameters; RCG's MLP, counted from its code, 62.7."""
    found = stage("rcg", name="latent")
    told = sum(p.numel() for name, p in found.named_parameters() if "label" in name or name.startswith("conditioner"))
    assert round((size(found) - told + 1001 * 1152 + POSITIONS + VARIANCES) / 1e6, 1) == 675.1
    block = 2 * linear(1536, 1536) + linear(256, 1536) + 4 * 1536
    mlp = 12 * block + linear(1536, 256) + linear(256, 256) + linear(256, 1536) + 2 * 1536 + linear(1536, 256)
    assert size(stage("rcg", name="vector")) == pytest.approx(mlp, rel=0.05)


def test_the_model_of_faces_is_the_chains_two_networks() -> None:
    chain = Assembly(load_recipe("vcdm_ffhq")).stages
    apart = sum(size(chain[name].on_meta()) for name in ("clip", "image"))
    assert size(stage("joint_ffhq")) == pytest.approx(apart, rel=0.02)


# ------------------------------------------------------------ levels


def draw(recipe: str, name: str = "both") -> Drawn:
    found = stage(recipe, name=name)
    noises = {made: found.training_noise(made) for made in found.generates}
    return found.family.draw(Draws(range(COUNT), 0, "stage"), noises, {made: found.pure(made) for made in noises})


def fits(values: Tensor, distribution) -> bool:
    return stats.kstest(values.double().numpy(), distribution.cdf).pvalue > 1e-3


def test_semantics_lead_by_0_3() -> None:
    """t ~ LN(0, 1), t_sem = min(1, 1.3 t), t_tex = max(0, 1.3 t - 0.3) with t = 1 at the data."""
    semantic, texture = (1 - Flow().time(draw("sfd").levels[name].double()) for name in ("semantic", "texture"))
    done = stats.norm.cdf(-math.log(1 / 0.3))
    assert done == pytest.approx(0.114, abs=5e-4)
    assert abs(float((semantic == 1).double().mean()) - done) < ERROR
    both = (semantic < 1) & (texture > 1 / 80)
    assert (semantic - texture)[both].sub(0.3).abs().max() < 1e-4
    assert abs(float(both.double().mean()) - (1 - 2 * done)) < ERROR
    # Published: squared errors of 16 channels twice and of 32 once. Ours are means over each variable's channels.
    weights = {name: own.weight for name, own in stage("sfd").own.items()}
    assert weights["semantic"] / 16 == 2 * weights["texture"] / 32


def test_features_are_learned_before_pixels() -> None:
    drawn, made = draw("latent_forcing"), stage("latent_forcing")
    dino, image = drawn.counted["dino"], drawn.counted["image"]
    assert torch.equal(dino, ~image) and abs(float(dino.double().mean()) - 0.4) < ERROR
    assert fits(drawn.levels["dino"][dino].log(), stats.norm(1.2, 1.0))
    assert fits(drawn.levels["image"][image].log(), stats.norm(0.4, 0.8))
    assert fits(Flow().time(drawn.levels["dino"][image].double()), stats.uniform(0, 0.25))
    assert made.own["dino"].weight == 0.333 and made.own["image"].weight == 1


@pytest.mark.parametrize("recipe", ["redi", "reg"])
def test_one_uniform_time_for_both(recipe: str) -> None:
    one, other = draw(recipe).levels.values()
    assert torch.allclose(one, other)
    below = one[one < 80].double()
    assert fits(Flow().time(below), stats.uniform(0.001, 80 / 81 - 0.001))
    assert {name: own.weight for name, own in stage("reg").own.items()} == {"token": 0.03, "latent": 1}


def test_rae_shifts_its_times() -> None:
    assert fits(draw("rae", "latent").levels["latent"].log(), stats.norm(math.log(math.sqrt(48)), 1))


def test_rcg_draws_the_levels_of_its_thousand_betas() -> None:
    """betas = linspace(sqrt 0.0015, sqrt 0.0195)^2 for the vector, to 3% in time; 0.0001 to 0.02 for latents, to 1%."""
    for name, betas, apart in (
        ("vector", np.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2, 0.03),
        ("latent", np.linspace(1e-4, 0.02, 1000), 0.01),
    ):
        published = np.sqrt(1 / np.cumprod(1 - betas) - 1)
        found = np.sort(draw("rcg", name).levels[name].numpy())
        drawn = np.searchsorted(found, published) / COUNT
        assert np.abs(drawn - np.arange(1, 1001) / 1000).max() < apart + 0.01


# ------------------------------------------------------------ sampling and training


def test_times_of_sampling_are_the_published_ones() -> None:
    """Ours begin at the level of pure noise, t = 80 / 81, in place of 1, and end at 0."""
    reg = stage("reg").path()
    times = Flow().time(torch.tensor([reg.sigma(step)["latent"] for step in range(reg.steps)]))
    assert reg.steps == 250 and torch.allclose(times, torch.linspace(1, 0.04, 250), atol=0.0125)
    rae = stage("rae", name="latent").path()
    times = Flow().time(torch.tensor([rae.sigma(step)["latent"] for step in range(rae.steps + 1)]))
    even, s = 1 - torch.linspace(0, 0.999, 50), math.sqrt(48)
    assert rae.steps == 49 and torch.allclose(times, s * even / (1 + (s - 1) * even), atol=0.007)
    forced = stage("latent_forcing").path()
    first, last = (
        [1 - Flow().time(torch.tensor(forced.sigma(k)[v])).item() for k in range(51)] for v in ("dino", "image")
    )
    linear = np.linspace(0, 1, 26)
    assert np.allclose(last, [0] * 25 + [*linear], atol=0.0125)
    assert np.allclose(first, [*(0.575 * linear / (1 - 0.425 * linear)), *[1] * 25], atol=0.0135)
    sfd = stage("sfd").path()
    moving = [sfd.moves(step) for step in range(sfd.steps)]
    assert moving == [["semantic"]] * 15 + [["semantic", "texture"]] * 35 + [["texture"]] * 15


@pytest.mark.parametrize(
    ("recipe", "decay", "batch"),
    [("sfd", 0.9999, 256), ("redi", 0.9999, 256), ("reg", 0.9999, 256), ("latent_forcing", 0.9999, 1024),
     ("rae", 0.9995, 1024), ("rcg.vector", 0.9999, 512), ("rcg.latent", 0.9999, 2048)],
)  # fmt: skip
def test_averages_of_weights_have_the_published_decay(recipe: str, decay: float, batch: int) -> None:
    recipe, _, name = recipe.partition(".")
    stages = load_recipe(recipe).recipe.stages
    train = stages[name or next(iter(stages))].train
    assert train.batch == batch
    assert isinstance(train.ema, EmaSpec) and train.ema.rampup is None
    assert 1 - 0.5 ** (batch / train.ema.half_life) == pytest.approx(1 - decay, rel=1e-3)


# ------------------------------------------------------------ they run


@pytest.mark.parametrize(
    ("recipe", "files", "made"),
    [("sfd", {"semantic": 16, "texture": 32}, "texture"), ("latent_forcing", {"dino": 8}, "image")],
)
def test_joint_models_learn_from_files_of_features(
    recipe: str, files: dict[str, int], made: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As their users would, at a tiny size: files of maps for one's own images. Slow tests run every recipe's smoke."""
    monkeypatch.chdir(tmp_path)
    data = open_data(DataSpec(path="emoji64", split="test", where={"style": "google"}))
    patch = "{dino: 1, image: 16}" if recipe == "latent_forcing" else 1
    changes = [
        "data={path: emoji64, split: test, where: {style: google}}",
        "variables.label={shape: [7], of: group}",
        f"stages.both.network={{width: 32, depth: 1, heads: 2, patch: {patch}}}",
        "stages.both.train={images: 32, batch: 16, execution: eager, precision: float32}",
        "stages.both.sample.steps=10",
        f"sample={{count: 4, batch: 4, want: [{made}]}}",
    ]
    generator = torch.Generator().manual_seed(0)
    for name, channels in files.items():
        values = 3 + 2 * torch.randn(len(data), channels, 16, 16, generator=generator)
        save_file({"features": values}, f"{name}.safetensors", {"names": json.dumps(data.names)})
        changes += [f"variables.{name}={{shape: [{channels}, 16, 16], encoder: {{path: {name}.safetensors}}}}"]
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", recipe, "--quiet", *(part for change in changes for part in ("--set", change))])
    assert ended.value.code == 0
    if recipe == "latent_forcing":
        assert len([*Path(f"runs/{recipe}/samples/image").glob("0*.png")]) == 4
    else:
        values = load_file(f"runs/{recipe}/samples/{made}/000000.safetensors")[made]
        assert values.shape == (4, 32, 16, 16)
        assert values.std() == pytest.approx(1, abs=0.1)  # the average of weights is still at velocity 0: noise stays
