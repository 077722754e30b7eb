"""The embedded image-text model: open_clip's own factory loads it offline, and it knows emoji it never saw."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

import open_clip
import pytest
import torch

from chaindiff.encoders.clip_emoji import CLIP_EMOJI, local_options, open_clip_folder, open_clip_tokenizer
from tools.contrastive import load_emoji, resize, retrieval


@pytest.fixture(scope="module")
def emoji() -> tuple[torch.Tensor, list[dict]]:
    return load_emoji()


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return open_clip_folder()


@pytest.fixture(scope="module")
def tokenizer():
    return open_clip_tokenizer()


def test_retrieval_of_unseen_concepts(emoji, model, tokenizer) -> None:
    """Of the test split's Google emoji, the caption's own is among the five nearest (chance: 0.04)."""
    images, rows = emoji
    asked = [i for i, r in enumerate(rows) if r["split"] == "test" and r["style"] == "google"]
    figures = retrieval(model, tokenizer, images[asked], [rows[i]["caption"] for i in asked])
    assert len(asked) == 126
    assert figures["text_to_image_top5"] >= 0.40, figures
    assert figures["image_to_text_top5"] >= 0.40, figures


def test_plain_open_clip_loads_it(emoji, model, tokenizer, monkeypatch) -> None:
    """Inside the folder nothing of chaindiff is needed; elsewhere the factory takes `local_options`."""
    from torchvision.transforms.functional import to_pil_image

    same, _, preprocess = open_clip.create_model_and_transforms(**local_options())
    monkeypatch.chdir(CLIP_EMOJI)
    plain = open_clip.create_model("local-dir:.").eval()
    texts = open_clip.get_tokenizer("local-dir:.")(["a red heart", "teddy bear"])
    image = emoji[0][:8]
    pixels = torch.stack([preprocess(to_pil_image(x)) for x in image])
    assert (pixels - resize(image)).abs().mean() < 0.25 / 128  # PIL rounds to whole levels, twice
    with torch.inference_mode():
        expected = model.encode_text(tokenizer(["a red heart", "teddy bear"]))
        for other in (same.eval(), plain):
            torch.testing.assert_close(other.encode_text(texts), expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(other.encode_image(pixels), model.encode_image(pixels), rtol=1e-3, atol=1e-3)
    assert expected.shape == (2, 128)


def test_every_file_is_small() -> None:
    assert all(f.stat().st_size < 25_000_000 for f in CLIP_EMOJI.iterdir())


def test_tokenizer_stays_inside_the_pruned_vocabulary(emoji, model, tokenizer) -> None:
    captions = sorted({r["caption"] for r in emoji[1]})
    unknown = tokenizer.tokenizer.unk_token_id
    ids = tokenizer([*captions, "Zürich 漢字 🦊 qxzjv-42 ½", ""])
    assert ids.min() >= 0 and ids.max() < model.text.vocab_size
    words = ["red", "heart", "dog", "woman", "face", "smiling", "tree", "pizza", *captions]
    assert not (tokenizer(words) == unknown).any()
