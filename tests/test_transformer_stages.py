"""Stages and recipes with a transformer."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from recipe_text import message, write
from torch import Tensor, nn
from transformer_parts import TINY

import chaindiff as cd
from chaindiff.chain.diffusion import Diffusion
from chaindiff.chain.variable import Variable
from chaindiff.edm.random import Draws
from chaindiff.io.errors import UserError
from chaindiff.networks import build
from chaindiff.networks.interface import Condition, Interface
from chaindiff.specs.network import TransformerSpec

# ------------------------------------------------------------ stages


@pytest.mark.slow
def test_it_learns_the_denoiser_of_a_gaussian() -> None:
    """Correlated pixels, whose denoiser is C (C + sigma^2)^-1 x: the error of the rest is small."""
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(4)))[0]
    spread = torch.tensor([1.2, 1.0, 0.8, 0.5] + [0.1] * 12)
    covariance = basis @ torch.diag(spread**2) @ basis.T
    network = {"kind": "transformer", "width": 32, "depth": 2, "heads": 2, "patch": 2}
    stage = Diffusion(Variable.image("x", 1, 4), network=network, noise={"mean": -0.5, "std": 1.0})
    optimizer = torch.optim.Adam(stage.parameters(), lr=3e-3, betas=(0.9, 0.99))
    steps = 600
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps)
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        clean = ((torch.randn(128, 16, generator=generator) * spread) @ basis.T).reshape(-1, 1, 4, 4)
        sigma = (torch.randn(128, generator=generator) - 0.5).exp()
        noisy = clean + sigma[:, None, None, None] * torch.randn(clean.shape, generator=generator)
        error = stage.denoise({"x": noisy}, {"x": sigma}, Condition()).x0["x"] - clean
        loss = (stage.precondition.weight(sigma) * error.square().flatten(1).mean(1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    clean = (torch.randn(2000, 16, generator=generator) * spread) @ basis.T
    for level in (0.3, 1.0):
        noisy = clean + level * torch.randn(clean.shape, generator=generator)
        best = noisy @ torch.linalg.solve(covariance + level**2 * torch.eye(16), covariance)
        with torch.no_grad():
            x, sigma = {"x": noisy.reshape(-1, 1, 4, 4)}, {"x": torch.full((2000,), level)}
            found = stage.denoise(x, sigma, Condition()).x0["x"].flatten(1)
        errors = [float((guess - clean).square().mean()) for guess in (found, best, noisy * 0.3 / (0.3 + level**2))]
        assert errors[0] < 1.08 * errors[1] and errors[2] > 1.4 * errors[1], "the best for every pixel alone is worse"


@pytest.mark.parametrize("streams", ["own", "shared", "merged"])
def test_an_image_a_vector_and_a_map_together(streams: str) -> None:
    """Trained a little and sampled through the public interface: together, and any given the others."""
    variables = [cd.Variable.vector("clip", 3), cd.Variable.map("latent", 4, 4, 4), cd.Variable.image("image", 3, 8)]
    kind = cd.Variable.label("kind", 2)
    network = cd.Transformer(width=16, depth=1, heads=2, patch={"latent": 1, "image": 2}, streams=streams)
    stage = cd.Diffusion(
        variables, given=[(kind, {"dropout": 0.2})], network=network, sampler=cd.Sampler(steps=3), name="all"
    )
    data = {
        "clip": torch.randn(8, 3) / 2,
        "latent": 3 * torch.randn(8, 4, 4, 4),
        "image": torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8),
        "kind": torch.arange(8) % 2,
    }
    cd.train(stage, data, images=16, batch=8)
    chain = cd.Chain([stage], sources=[cd.Source(kind, [1, 1])])
    shapes = {"clip": (3, 3), "latent": (3, 4, 4, 4), "image": (3, 3, 8, 8)}
    assert {name: out.shape for name, out in chain.sample(3, want=[*shapes]).items()} == shapes
    for known in shapes:
        value = torch.rand(3, *shapes[known][1:])
        out = chain.sample(
            3, given={known: value, "kind": torch.tensor([0, 1, 1])}, want=[name for name in shapes if name != known]
        )
        assert all(out[name].isfinite().all() and out[name].shape == shapes[name] for name in out)
    assert stage.cost(["image"]).flops > 0


def test_labels_of_several_preconditionings_have_one_span() -> None:
    """Flow counts times up to 1000, EDM quarters of logarithms: a network of both is built for one of them."""
    seen: list[Mapping[str, Tensor]] = []

    class Watched(nn.Module):
        def forward(self, x, noise, condition):
            seen.append(noise)
            return x

    a, b = Variable.vector("a", 2), Variable.vector("b", 2)
    x, level = {"a": torch.zeros(1, 2), "b": torch.zeros(1, 2)}, {"a": torch.ones(1), "b": torch.ones(1)}
    for own, expected in (({}, 0.5), ({"precondition": {"kind": "flow"}}, 0.5), ({"precondition": {"kind": "v"}}, 0.5)):
        for whole in ("edm", "flow"):
            stage = Diffusion([(a, own), b], network=Watched(), precondition=whole)
            stage.denoise(x, level, Condition())
            other = 1000 * expected if whole == "flow" else 0.0
            mine = other if not own else expected * (1000 if whole == "flow" else 1)
            assert float(seen[-1]["b"]) == pytest.approx(other) and float(seen[-1]["a"]) == pytest.approx(mine)


# ------------------------------------------------------------ recipes

RECIPE = """\
name: both
data: {path: emoji64, split: test, where: {style: google}}
variables:
  image: {kind: image, shape: [3, 32, 32]}
  small: {kind: image, shape: [3, 16, 16], encoder: {kind: resize, of: image}}
  clip: {kind: vector, shape: [8], encoder: {kind: open_clip, model: clip_emoji, of: image, reduce: {kind: pca, k: 8}}}
stages:
  both:
    generates: [clip, small]
    network: {kind: transformer, width: 16, depth: 1, heads: 2, patch: 4, positions: rotary, mlp: swiglu}
    augment: {flip: false}
    train: {images: 16, batch: 8, execution: eager}
    sample: {steps: 2, path: {kind: offset, offset: 0.3}}
sample: {want: [clip, small], count: 3, batch: 2, execution: eager}
"""
MISTAKES = [
    ("heads: 2", "heads: 3", "both.network.width: should be a multiple of 4 and of heads (3), not 16"),
    ("heads: 2", "heads: 8", "both.network.heads: rotary positions need a multiple of 4 features per head, not 2"),
    ("patch: 4", "patch: 5", "both.network.patch: patches of 5 do not divide 'small', which is 16 x 16"),
    ("patch: 4", "patch: {smal: 4}", "both.network.patch.smal: 'smal' is no image or map of this stage; did you"),
    ("patch: 4", "patch: {}", "both.network.patch: does not name 'small', which needs one too"),
    ("patch: 4", "size: 4", "both.network: unknown field 'size'"),
    ("mlp: swiglu", "mlp: swigl", "both.network.mlp: 'swigl' is not one of gelu, swiglu"),
    ("[clip, small]\n    network", "[clip, image]\n    given: [small]\n    network", None),
    ("[clip, small]\n    network", "[clip]\n    given: [small]\n    network", "given images and maps are channels of"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "expected"), MISTAKES)
def test_mistakes_are_explained(old: str, new: str, expected: str | None, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert old in RECIPE
    text = RECIPE.replace(", path: {kind: offset, offset: 0.3}", "").replace(old, new)
    write(tmp_path, text if "[clip]" not in new else text.replace("want: [clip, small]", "want: [clip]"))
    if expected is None:
        cd.load("r.yaml")
    else:
        assert expected in message("r.yaml")


def test_merged_grids_must_be_equal() -> None:
    spec = TransformerSpec(kind="transformer", width=16, depth=1, heads=2, patch=2, streams="merged")
    with pytest.raises(UserError, match=r"merged needs as many patches .* 'image' has 4 x 4, 'map' has 2 x 2"):
        build(spec, Interface({"image": (3, 8, 8), "map": (4, 4, 4)}))


def test_a_recipe_trains_samples_and_saves(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, RECIPE)
    chain = cd.load("r.yaml")
    cd.train(chain)
    out = chain.sample(2)
    assert out["clip"].shape == (2, 8) and out["small"].shape == (2, 3, 16, 16)
    cd.save_stage(chain.stages["both"], "stage.safetensors")
    again = cd.load_stage("stage.safetensors")
    x, noise = {"clip": torch.randn(2, 8), "small": torch.randn(2, 3, 16, 16)}, {"clip": 1.0, "small": 2.0}
    one, other = (stage.bind({})(x, noise).x0 for stage in (chain.stages["both"], again))
    assert all(torch.equal(one[name], other[name]) for name in x)


def test_draws_of_one_variable_do_not_depend_on_the_network() -> None:
    """The same start for the same seed, whatever network denoises it."""
    x = Variable.vector("x", 4)
    starts = []
    for network in ({"kind": "transformer", **TINY}, {"kind": "prior", **TINY}):
        stage = Diffusion(x, network=network, sampler={"steps": 1, "sigma_max": 1e4}).eval()
        starts.append(next(iter(stage.sample({}, Draws([0, 1], 0, "x"), sampler={"steps": 2}))).x0["x"])
    assert starts[0].shape == starts[1].shape
