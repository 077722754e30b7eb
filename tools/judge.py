"""Train a judge: a small classifier of emoji whose pooled features measure samples of 16x16 and 32x32.

    python -m tools.judge --kind conv [--out FILE]

From scratch on the train split: group, subgroup and style of an image, and its tags. Images are augmented and reduced
to 16, 24 or 32 pixels before they are resized to 32, so that samples of every size are judged on their content. An
interrupted run resumes with the same command; its result is a pure function of its options, machine and number of
threads.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from chaindiff.data import ImageData, augment, open_data
from chaindiff.edm.random import generator
from chaindiff.edm.random import seed as key_seed
from chaindiff.encoders.resize import resize
from chaindiff.evaluation.extractor import resize as resize_as_pil
from chaindiff.evaluation.features import JUDGES
from chaindiff.evaluation.judge_networks import SIZE, TRUNKS
from chaindiff.io import tensorfile
from chaindiff.io.files import cache_folder
from chaindiff.specs.training import AugmentSpec

STORED = 64  # side of the training images
SIDES = (16, 24, 32, STORED)  # what they are reduced to before they are resized to 32
SINGLE = ("group", "subgroup", "style")  # one class for every image
COMMON = 16  # training images that a tag needs to be predicted
TAGS_WEIGHT = 0.3  # of the sum over tags of their cross-entropies
LR = {"conv": 4e-3, "vit": 1.5e-3}
IMAGES = {"conv": 100_000, "vit": 100_000}  # seen in training
BATCH, SAVED = 64, 200  # images per step; steps between checkpoints
AUGMENT = AugmentSpec(probability=0.3, flip=True, colour=0.3)


class Judge(nn.Module):
    """A trunk, and a linear head for each attribute to predict: {name: classes}."""

    def __init__(self, kind: str, heads: Mapping[str, int]):
        super().__init__()
        self.trunk = TRUNKS[kind]()
        self.heads = nn.ModuleDict({name: nn.Linear(self.trunk.width, classes) for name, classes in heads.items()})

    def forward(self, x: Float[Tensor, "n 3 32 32"]) -> dict[str, Tensor]:
        features = self.trunk(x)
        return {name: head(features) for name, head in self.heads.items()}


class Labels:
    """The attributes to predict: a class of each of `SINGLE`, and which of the common tags."""

    def __init__(self, data: ImageData, tags: list[str] | None = None):
        known = [set(text.split(", ")) for text in data.field("tags")]
        counts = Counter(tag for row in known for tag in row if tag)
        self.tags = tags or sorted(tag for tag, count in counts.items() if count >= COMMON)
        self.classes: dict[str, Tensor] = {}
        self.heads = {"tags": len(self.tags)}
        for name in SINGLE:
            names, positions = data.categories(name)
            self.classes[name], self.heads[name] = torch.tensor(positions), len(names)
        self.tagged = torch.tensor([[tag in row for tag in self.tags] for row in known]).float()


def views(data: ImageData, seed: int, first: int, count: int) -> tuple[list[int], Float[Tensor, "count 3 32 32"]]:
    """Rows and training images number `first` and so on: each pass over the data has its own order."""
    total = len(data)
    numbers = range(first, first + count)
    orders = {e: generator(seed, "order", e).permutation(total) for e in {n // total for n in numbers}}
    rows = [int(orders[n // total][n % total]) for n in numbers]
    drawn = augment.draw(AUGMENT, [(seed, n) for n in numbers])
    images = augment.apply(data.images(rows, STORED).float() / 127.5 - 1, drawn).clamp(-1, 1)
    out = torch.empty(count, 3, SIZE, SIZE)
    which = torch.tensor([n % len(SIDES) for n in numbers])
    for place, side in enumerate(SIDES):
        chosen = which == place
        if chosen.any():
            out[chosen] = resize(resize(images[chosen], side, "box"), SIZE, "bicubic")
    return rows, out


def loss(told: dict[str, Tensor], labels: Labels, rows: list[int]) -> Float[Tensor, ""]:
    """Cross-entropies of the classes, and of every tag."""
    total = sum(F.cross_entropy(told[name], labels.classes[name][rows], label_smoothing=0.1) for name in SINGLE)
    tags = F.binary_cross_entropy_with_logits(told["tags"], labels.tagged[rows], reduction="none")
    return total + TAGS_WEIGHT * tags.sum(1).mean()


def new_judge(kind: str, heads: dict[str, int], seed: int) -> Judge:
    with torch.random.fork_rng():
        torch.manual_seed(key_seed(seed, "judge", kind))
        judge = Judge(kind, heads)
    judge.state_dict()["heads.tags.bias"].fill_(-5.0)  # tags are rare
    return judge.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def train(kind: str, data: ImageData, labels: Labels, state: Path, images: int, seed: int = 0) -> tuple[Judge, float]:
    """The trained judge, and the seconds that it took; resumes from the file `state` if it is there."""
    judge = new_judge(kind, labels.heads, seed)
    steps = images // BATCH
    optimizer = torch.optim.AdamW(judge.parameters(), LR[kind], weight_decay=0.05)
    first, seconds = _restore(state, judge, optimizer) if state.exists() else (0, 0.0)
    began = time.perf_counter() - seconds
    judge.train()
    for step in range(first, steps):
        warm, decay = (
            min(1.0, (step + 1) / (0.05 * steps)),
            0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / steps))),
        )
        optimizer.param_groups[0]["lr"] = LR[kind] * warm * decay.item()
        rows, x = views(data, seed, step * BATCH, BATCH)
        value = loss(judge(x.contiguous(memory_format=torch.channels_last)), labels, rows)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(judge.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            print(f"{kind} step {step} of {steps}: loss {value.item():.3f}", flush=True)
        if (step + 1) % SAVED == 0 and step + 1 < steps:
            _save(state, judge, optimizer, step + 1, time.perf_counter() - began)
    return judge.eval(), time.perf_counter() - began


def _save(path: Path, judge: Judge, optimizer: torch.optim.Optimizer, step: int, seconds: float) -> None:
    tensors = {f"judge.{k}": v for k, v in judge.state_dict().items()}
    for name, parameter in judge.named_parameters():
        kept = optimizer.state[parameter]
        tensors |= {f"{part}.{name}": kept[part] for part in ("exp_avg", "exp_avg_sq")}
    tensorfile.save(path, tensors, {"step": str(step), "seconds": str(seconds)})


def _restore(path: Path, judge: Judge, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    tensors, metadata = tensorfile.load(path)
    tensorfile.fill(judge, {k[6:]: v for k, v in tensors.items() if k.startswith("judge.")}, str(path))
    step = int(metadata["step"])
    for name, parameter in judge.named_parameters():
        kept = {part: tensors[f"{part}.{name}"] for part in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(float(step)), **kept}
    return step, float(metadata["seconds"])


@torch.inference_mode()
def accuracy(judge: Judge, data: ImageData, labels: Labels, side: int) -> dict[str, float]:
    """Accuracies on images reduced to `side`; `tag`: how often the likeliest tag is one of the image's."""
    x = resize_as_pil(data.images(range(len(data)), side), SIZE).float() / 127.5 - 1
    told = [judge(part) for part in x.split(128)]
    found = {name: torch.cat([part[name] for part in told]).argmax(1) for name in labels.heads}
    right = {name: (found[name] == labels.classes[name]).double() for name in SINGLE}
    right["tag"] = labels.tagged.gather(1, found["tags"][:, None])[:, 0].double()
    return {name: round(values.mean().item(), 4) for name, values in right.items()}


def save(path: Path, judge: Judge, about: dict[str, Any]) -> None:
    """Weights in half precision, with what they are in the metadata."""
    halves = {k: v.half() if v.is_floating_point() else v for k, v in judge.state_dict().items()}
    tensorfile.save(path, halves, about)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=sorted(TRUNKS), required=True)
    parser.add_argument("--out", type=Path, help="file to write; chaindiff/assets/judges/judge_KIND.safetensors")
    parser.add_argument("--images", type=int, help=f"seen in training; {IMAGES}")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    out = args.out or JUDGES / f"judge_{args.kind}.safetensors"
    images = args.images or IMAGES[args.kind]
    split: dict[str, Any] = {name: open_data("emoji64", split=name) for name in ("train", "test")}
    labels = Labels(split["train"])
    options = [args.kind, images, args.seed]
    state = cache_folder() / "judges" / f"{'-'.join(map(str, options))}.safetensors"
    judge, seconds = train(args.kind, split["train"], labels, state, images, args.seed)
    held_out = Labels(split["test"], labels.tags)
    figures = {str(side): accuracy(judge, split["test"], held_out, side) for side in (16, 32)}
    about = {"kind": args.kind, "images": images, "seed": args.seed, "seconds": round(seconds), "test": figures}
    save(out, judge, {**about, "threads": torch.get_num_threads(), "heads": labels.heads, "tags": labels.tags})
    state.unlink(missing_ok=True)
    print(json.dumps(about, indent=2))


if __name__ == "__main__":
    main()
