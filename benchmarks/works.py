"""Works that only a checkout measures: kernels, sampling outside the network, data, plans."""

from __future__ import annotations

import tempfile
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.overhead import overhead
from chaindiff.bench.timing import Side
from chaindiff.bench.works import AUGMENT, BATCH, SMALL, WAYS, denoised, executed, quietly, stage
from chaindiff.chain.diffusion import Diffusion
from chaindiff.chain.graph import Producer, resolve
from chaindiff.data import augment, open_data
from chaindiff.data.items import Items
from chaindiff.edm.random import Draws
from chaindiff.edm.solvers import Row
from chaindiff.networks.blocks import GroupNormSilu
from chaindiff.networks.interface import Condition
from chaindiff.recipe.assembly import Assembly
from chaindiff.recipe.load import load
from chaindiff.specs.load import load_recipe
from chaindiff.training.cache import EmbeddingCache

HEUN, FEW = 6, 16  # steps (11 evaluations), images

# ---------------------------------------------------------------- kernels


def norm_silu() -> dict[str, Side]:
    x = torch.randn(BATCH, 64, 32, 32)
    last, norm = x.contiguous(memory_format=torch.channels_last), GroupNormSilu(64, 1e-6)
    plain = nn.GroupNorm(norm.groups, 64, 1e-6)
    fused = torch.compile(lambda value: F.silu(plain(value)))
    return {
        "chaindiff": Side(quietly(partial(norm, last))),
        "torch, channels-last": Side(quietly(lambda: F.silu(plain(last)))),
        "torch, contiguous": Side(quietly(lambda: F.silu(plain(x)))),
        "torch.compile, channels-last": Side(quietly(lambda: fused(last))),
    }


def affine_update() -> dict[str, Side]:
    x, clean, before = torch.randn(3, BATCH, 3, 32, 32, dtype=torch.float64)
    return {
        "chaindiff": Side(partial(Row(x=0.5, clean=0.7, before=-0.2), x, x, clean, before, x)),
        "torch, as written": Side(lambda: 0.5 * x + 0.7 * clean - 0.2 * before),
    }


class Nothing(nn.Module):
    """A network that returns its input."""

    def forward(self, x: dict[str, Tensor], noise: Any, condition: Condition) -> dict[str, Tensor]:
        return x


def precondition() -> dict[str, Side]:
    x, sigma = torch.randn(BATCH, 3, 32, 32), torch.rand(BATCH, 1, 1, 1) + 0.1

    def written() -> Tensor:
        total = (sigma**2 + 0.25).sqrt()
        return 0.25 / total**2 * x + sigma * 0.5 / total * (x / total)

    return {"chaindiff": denoised(Nothing(), 32, BATCH), "torch, as written": Side(written, BATCH)}


def noise() -> dict[str, Side]:
    shape, random = (3, 32, 32), np.random.default_rng(0)
    return {
        "chaindiff": Side(partial(Draws(range(BATCH), 0, "image").normal, "start", shape=shape), BATCH),
        "torch, one generator": Side(partial(torch.randn, BATCH, *shape), BATCH),
        "numpy, one generator": Side(partial(random.standard_normal, (BATCH, *shape)), BATCH),
    }


# ---------------------------------------------------------------- sampling


def sample_32() -> dict[str, Side]:
    made = {name: executed(stage(SMALL, 32), *how) for name, how in WAYS.items()}
    runs = {name: partial(_sampled, it, {}, FEW, solver="heun", steps=HEUN) for name, it in made.items()}
    return {name: Side(run, FEW, warm=1) for name, run in runs.items()}


def _sampled(made: Diffusion, given: dict[str, Tensor], count: int, **sampler: Any) -> None:
    draws = Draws(range(count), 0, 0, made.name, dtype=torch.float64)
    for _ in made.sample(given, draws, sampler=sampler):
        pass


def overhead_image() -> dict[str, Side]:
    return _overhead("image16", {"clip": torch.randn(BATCH, 32)})


def overhead_prior() -> dict[str, Side]:
    return _overhead("clip", {})


def _overhead(name: str, given: dict[str, Tensor]) -> dict[str, Side]:
    made: Any = load("vcdm_emoji16").stages[name].eval()  # type: ignore[attr-defined]

    def spent(part: str) -> float:
        return overhead(made, given, batch=BATCH, least=2, solver="euler", steps=HEUN)[part]

    return {f"chaindiff, {part}": Side(partial(spent, part), warm=1) for part in ("network", "outside")}


# ---------------------------------------------------------------- data


def cache() -> dict[str, Side]:
    encoder, scratch = Assembly(load_recipe("vcdm_emoji")).encoders["clip"].build(), tempfile.TemporaryDirectory()
    data, number = Items({"image": open_data("emoji64").pixels(range(256), 64)}), count()

    def filled() -> EmbeddingCache:
        made = EmbeddingCache(Path(scratch.name, str(next(number))), encoder, data, AUGMENT, 64)
        for _ in made.build():
            pass
        return made

    features, rows = filled()["features"], torch.randperm(len(data))[:128].tolist()
    return {
        "chaindiff": Side(filled, len(data)),
        "chaindiff, reading": Side(lambda: features[rows], 128, keeps=scratch),
    }


def batches() -> dict[str, Side]:
    """From memory, as in every epoch but the first; and from the file."""
    data, rows, keys = open_data("emoji64"), range(128), [("bench", n) for n in range(128)]

    def augmented() -> Tensor:
        return augment.apply(data.pixels(rows, 64), augment.draw(AUGMENT, keys))

    decoded = Side(lambda: open_data("emoji64").pixels(rows, 64), 128)
    return {"chaindiff": Side(augmented, 128), "chaindiff, opening and decoding": decoded}


# ---------------------------------------------------------------- plans


def resolve_line() -> dict[str, Side]:
    return _resolved(1)


def resolve_fan() -> dict[str, Side]:
    return _resolved(5)


def resolve_middle() -> dict[str, Side]:
    return _resolved(5, middle=True)


def _resolved(fan: int, middle: bool = False) -> dict[str, Side]:
    sides = {}
    for stages in (2, 10, 100, 1000):
        names = [f"v{n}" for n in range(stages)]
        made = [Producer(f"s{n}", "stage", (v,), tuple(names[max(0, n - fan) : n])) for n, v in enumerate(names)]
        first = max(0, stages // 2 - 3)
        given = names[first : stages - 1][:fan] if middle else []
        sides[f"chaindiff, {stages:,} stages"] = Side(partial(resolve, made, names[-1:], given), warm=1)
    return sides
