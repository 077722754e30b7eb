"""Images a second at equal Fréchet distance: chaindiff's settings against EDM's published one. By hand; takes minutes.

    python -m benchmarks.equal_quality --out runs/equal_quality.json     # 1,000 samples a row

chaindiff samples as `chaindiff sample` does, by the recipe's own settings; EDM by Heun's 40 steps (79 evaluations) with
its network as published: eager, float32, contiguous. Weights, conditioning and seeds are the same.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import chaindiff as cd
from benchmarks.peers import Published
from chaindiff.commands.sample import sample
from chaindiff.data import open_data
from chaindiff.io.files import write_whole
from chaindiff.networks.interface import Condition
from chaindiff.specs.load import load_recipe

RECIPES, STEPS, WANT = ("vcdm_emoji16", "edm_emoji16"), 40, "image16"


class AsPublished(nn.Module):
    """EDM's network with the signature of ours."""

    def __init__(self, unet: Any):
        super().__init__()
        self.published = Published(unet)

    def forward(self, x: dict[str, Tensor], noise: dict[str, Tensor], condition: Condition) -> dict[str, Tensor]:
        ((name, image),) = x.items()
        return {name: self.published(image, noise[name], condition.augment, condition.labels)}


def ours(recipe: str, count: int, seed: int, *changes: str) -> tuple[Tensor, float, int]:
    """Images in [-1, 1], seconds, and evaluations of the image's network."""
    with tempfile.TemporaryDirectory() as folder:
        made = sample(load_recipe(recipe, changes=changes), out=Path(folder), count=count, seed=seed)
        files = sorted(path for path in (made.samples.folder / WANT).glob("*.png") if path.stem.isdecimal())
        pixels = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
        return torch.from_numpy(pixels).movedim(-1, 1) / 127.5 - 1, made.seconds, made.plan.costs[WANT].nfe


def published(recipe: str, count: int, seed: int) -> tuple[Tensor, float, int]:
    """The same by EDM's setting, for all stages."""
    chain = cd.load(recipe, ["stages.*.sample.churn={}", "stages.*.sample.eta=0", "stages.*.sample.sigma_min=null"])
    stage: Any = chain.stages[WANT]
    stage.network = AsPublished(stage.network).eval()
    began = time.perf_counter()
    images = chain.sample(count, want=[WANT], seed=seed, steps=STEPS, solver="heun")[WANT]
    return images.clamp(-1, 1), time.perf_counter() - began, 2 * STEPS - 1


def rows(recipe: str, count: int, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Both sides of a recipe, in turns; distances are means over seeds."""
    encoders, real = cd.load(recipe).encoders, open_data("emoji64", split="train")
    reference = encoders[WANT](encoders["image"](real.pixels(range(len(real)), 64)))
    found: dict[str, dict[str, Any]] = {}
    for seed in seeds:
        for side, make in {"chaindiff": ours, "EDM as published": published}.items():
            images, seconds, evaluations = make(recipe, count, seed)
            row = found.setdefault(side, {"recipe": recipe, "side": side, "count": count, "seconds": [], "fds": []})
            row["seconds"].append(seconds)
            row["evaluations"] = evaluations
            row["fds"].append({f.encoder: f.value for f in cd.measure(images, reference) if f.metric == "fd"})
            print(f"{recipe}, {side}, seed {seed}: {count / seconds:.3g} images/s, FD {row['fds'][-1]}", flush=True)
    slow = sum(found["EDM as published"]["seconds"])
    for row in found.values():
        row["images_per_second"] = count * len(seeds) / sum(row["seconds"])
        row["faster"] = slow / sum(row["seconds"])
        row["fd"] = {judge: sum(fd[judge] for fd in row["fds"]) / len(seeds) for judge in row["fds"][0]}
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000, help="samples a row and seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path("runs/equal_quality.json"))
    asked = parser.parse_args()
    for recipe in RECIPES:  # the second use is what counts: whatever is compiled once is compiled here
        ours(recipe, min(128, asked.count), 1, "sample.execution=compile")
    found = [row for recipe in RECIPES for row in rows(recipe, asked.count, asked.seeds)]
    write_whole(asked.out, json.dumps({"rows": found}, indent=1))
    print(f"wrote {asked.out}")


if __name__ == "__main__":
    main()
