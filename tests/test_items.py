"""Any dataset as data: images of every sort, labels, vectors, in batches, caches and evaluation; and refusals."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_files import noise, png
from PIL import Image
from torch.utils.data import Dataset

import chaindiff as cd
from chaindiff.chain.variable import Variable
from chaindiff.data import open_data
from chaindiff.data.items import Items
from chaindiff.encoders import build_encoder
from chaindiff.evaluation.oracle import DataValues
from chaindiff.io.errors import UserError
from chaindiff.recipe.assembly import Assembly
from chaindiff.specs.load import load_recipe
from chaindiff.specs.recipe import DataSpec, VariableSpec
from chaindiff.specs.training import AugmentSpec
from chaindiff.training.batches import Batches
from chaindiff.training.cache import EmbeddingCache

ROWS, SIDE = 6, 8
STILL = AugmentSpec(flip=False)
ROOT = Variable.image("image", 3, SIDE)
BYTES = np.stack([noise(SIDE, SIDE, seed) for seed in range(ROWS)])
FLOATS = torch.from_numpy(np.random.default_rng(3).uniform(-1, 1, (ROWS, 3, SIDE, SIDE))).float()
VECTORS = torch.from_numpy(np.random.default_rng(4).normal(size=(ROWS, 5))).float()


class Rows(Dataset):
    """A dataset of items, from columns."""

    def __init__(self, **columns: Any):
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {name: values[row] for name, values in self.columns.items()}


def both(**columns: Any) -> list[Items]:
    return [Items(columns), Items(Rows(**columns))]


def refusal(call) -> str:
    with pytest.raises(UserError) as caught:
        call()
    return str(caught.value)


# ------------------------------------------------------------ images


@pytest.mark.parametrize(
    "images",
    [torch.from_numpy(BYTES).permute(0, 3, 1, 2), list(BYTES), [Image.fromarray(image) for image in BYTES], BYTES],
    ids=["tensor", "arrays", "pil", "array"],
)
def test_bytes_of_every_sort_are_the_same_pixels(images) -> None:
    for data in both(image=images):
        assert len(data) == ROWS and data.names == ["0", "1", "2", "3", "4", "5"]
        got = data.images([4, 1], SIDE)
        assert got.dtype == torch.uint8 and torch.equal(got, torch.from_numpy(BYTES[[4, 1]]).permute(0, 3, 1, 2))
        torch.testing.assert_close(data.pixels([4, 1], SIDE), got.float() / 127.5 - 1)
        assert data.resolution == SIDE and data.description == "items: 6 items at 8 x 8"
        assert data.images([], SIDE).shape == (0, 3, SIDE, SIDE)


def test_pixels_are_those_of_the_same_images_in_files(tmp_path) -> None:
    for seed, image in enumerate(BYTES):
        (tmp_path / f"{seed}.png").write_bytes(png(image))
    files = open_data(DataSpec(path=str(tmp_path)))
    for size in (SIDE, SIDE // 2):
        mine = Items({"image": list(BYTES)}).pixels(range(ROWS), size)
        assert torch.equal(mine, files.pixels(range(ROWS), size))
        assert torch.equal(files.pixels(range(ROWS), size), files.images(range(ROWS), size).float() / 127.5 - 1)


def test_floats_are_left_as_they_are_and_resized_with_antialiasing() -> None:
    data = Items({"image": FLOATS})
    assert torch.equal(data.pixels([2, 5], SIDE), FLOATS[[2, 5]])
    torch.testing.assert_close(data.pixels([2], 4), torch.nn.functional.avg_pool2d(FLOATS[[2]], 2))
    assert float(data.pixels([2], 12).abs().max()) <= 1


def test_other_shapes_are_cropped_at_the_centre_and_grey_becomes_rgb() -> None:
    wide = torch.rand(1, 3, 4, 10) * 2 - 1
    assert torch.equal(Items({"image": wide}).pixels([0], 4), wide[..., 3:7])
    grey = torch.rand(1, 1, 4, 4) * 2 - 1
    assert torch.equal(Items({"image": grey}).pixels([0], 4), grey.expand(1, 3, 4, 4))
    assert torch.equal(Items({"image": [BYTES[0][..., :1]]}).images([0], 8)[0, 2], torch.from_numpy(BYTES[0][..., 0]))


def test_the_image_is_the_roots_entry_or_that_called_image() -> None:
    columns = {"photo": FLOATS, "image": FLOATS.flip(0)}
    assert torch.equal(Items(columns, "photo").pixels([0], SIDE), FLOATS[:1])
    assert torch.equal(Items(columns, "picture").pixels([0], SIDE), FLOATS[-1:])
    assert Items(columns, "photo").fields == ["image"]


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (torch.rand(3, 8, 8) * 255, "items, item 0: 'image' holds numbers from "),
        (torch.full((3, 8, 8), torch.nan), "holds numbers from nan to nan; images should be in [-1, 1] or uint8"),
        (torch.zeros(4, 8, 8), "item 0: 'image' is not an image: of shape [4, 8, 8]\n  expected a tensor [3, h, w]"),
        (torch.zeros(8, 8), "is not an image: of shape [8, 8]"),
        (np.zeros((8, 8, 3), np.float32), "is not an image: of shape [8, 8, 3]"),
        ("photo.png", "is not an image: of type str"),
    ],
)
def test_what_is_no_image(image, expected) -> None:
    assert expected in refusal(lambda: Items([{"image": image}]).pixels([0], 8))


# ------------------------------------------------------------ labels, texts, vectors


def test_labels_texts_and_names() -> None:
    for data in both(kind=["b", "a", "b"], number=[2, 0, 2], tensor=torch.tensor([1, 0, 1]), name=["x", "y", "z"]):
        assert data.categories("kind") == (["a", "b"], [1, 0, 1])
        assert data.categories("number") == (["0", "1", "2"], [2, 0, 2])
        assert data.categories("tensor") == (["0", "1"], [1, 0, 1])
        assert data.field("kind") == ["b", "a", "b"] and data.field("tensor") == ["1", "0", "1"]
        assert data.names == ["x", "y", "z"] and data.fields == ["kind", "number", "tensor"]
        assert data.description == "items: 3 items"


def test_columns_of_numbers() -> None:
    for data in both(v=VECTORS, w=[[1, 2], [3, 4], [5, 6]] * 2, t=np.ones((ROWS, 2, 3)), x=list(VECTORS.numpy())):
        assert torch.equal(data.column("v"), VECTORS) and torch.equal(data.column("x"), VECTORS)
        assert data.column("w").shape == (ROWS, 2) and data.column("w").dtype == torch.float32
        assert data.column("t").shape == (ROWS, 2, 3)


def test_mistakes_in_items() -> None:
    data = Items([{"image": FLOATS[0], "label": 1.5, "v": [1.0, 2.0]}, {"image": FLOATS[0], "label": -1, "v": [1.0]}])
    assert "items, item 0 has no 'lable'; did you mean 'label'?" in refusal(lambda: data.field("lable"))
    assert "item 0: 'label' is not a label: 1.5\n  expected a text, or a whole" in refusal(
        lambda: data.categories("label")
    )
    assert "item 1: 'v' has shape [1], but that of the first item [2]" in refusal(lambda: data.column("v"))
    assert "'v' is not made of numbers" in refusal(lambda: Items({"v": ["a", "b"]}).column("v"))
    assert "item 1: 'v' is not finite" in refusal(lambda: Items({"v": [1.0, np.inf]}).column("v"))
    assert "is not a label: -2" in refusal(lambda: Items({"n": [-2]}).categories("n"))
    assert "item 0 has no 'image'; did you mean 'imag'?" in refusal(lambda: Items({"imag": FLOATS}).pixels([0], 8))


def test_mistakes_in_datasets() -> None:
    text = refusal(lambda: Items([(FLOATS[0], 3)]))
    assert "items, item 0 is of type tuple\n  expected a mapping of names to values, such as {'image'" in text
    assert "expected columns of equal length, not {'a': 2, 'b': 1}" in refusal(lambda: Items({"a": [1, 2], "b": [1]}))
    assert "there are no items" in refusal(lambda: Items([])) and "there are no items" in refusal(lambda: Items({}))
    assert "items: generator is not a map-style dataset" in refusal(lambda: Items(x for x in ()))


def test_the_fingerprint_follows_what_is_told() -> None:
    base = {"image": FLOATS, "kind": list("ababab")}
    other = {**base, "image": FLOATS + torch.eye(ROWS)[3][:, None, None, None] * 1e-3}
    kinds = [Items(base), Items(other), Items(base, name="mine"), Items(Rows(**base)), Items({"image": FLOATS})]
    kinds += [Items({k: v[:5] for k, v in base.items()}), Items({**base, "kind": list("ababaa")})]
    assert len({data.digest for data in kinds}) == len(kinds)
    assert Items(dict(base)).digest == Items(base).digest == pickle.loads(pickle.dumps(Items(base))).digest


# ------------------------------------------------------------ training and evaluation


def batches(data: Items, root: Variable | None, *wanted: Variable, spec: AugmentSpec = STILL, **fields) -> Batches:
    return Batches(data, root, wanted, {}, {}, fields, spec, 0)


def test_a_batch_of_columns() -> None:
    data = Items(Rows(image=list(FLOATS), kind=list("ababab"), v=list(VECTORS), number=[3] * ROWS))
    label, number, vector = Variable.label("kind", 2), Variable.label("n", 9), Variable.vector("v", 5)
    made = batches(data, ROOT, ROOT, label, number, vector, n="number")
    samples = [3, 7, 0]
    found, batch = made.rows(samples), made(samples)
    assert batch.keys() == {"image", "kind", "n", "v"}
    assert torch.equal(batch["image"], FLOATS[found]) and torch.equal(batch["v"], VECTORS[found])
    assert batch["kind"].tolist() == [row % 2 for row in found] and batch["n"].tolist() == [3, 3, 3]


def test_without_an_image() -> None:
    data = Items({"v": VECTORS, "t": torch.ones(ROWS, 2, 3)})
    made = batches(data, None, Variable.vector("v", 5), Variable.tokens("t", 2, 3))
    assert torch.equal(made([0, 1])["v"], VECTORS[made.rows([0, 1])]) and made([0])["t"].shape == (1, 2, 3)


def test_mistakes_in_batches(tmp_path) -> None:
    data = Items({"v": VECTORS, "kind": [0, 1, 2, 3, 4, 5]})
    text = refusal(lambda: batches(data, None, Variable.vector("v", 4)))
    assert "'v' of the data has shape [5], but variable 'v' [4]" in text
    text = refusal(lambda: batches(data, None, Variable.label("kind", 4)))
    assert "label 'kind' has 4 classes, but the data has labels up to 5\n  set its shape to [6] or more" in text
    assert "has no 'w'; known: v, kind" in refusal(lambda: batches(data, None, Variable.vector("w", 4)))
    assert "'image' is not the data's own image" in refusal(lambda: batches(data, None, ROOT))
    (tmp_path / "0.png").write_bytes(png(BYTES[0]))
    files = open_data(DataSpec(path=str(tmp_path)))
    text = refusal(lambda: Batches(files, None, [Variable.vector("v", 4)], {}, {}, {}, STILL, 0))
    assert "the data has no 'v' that is a list of as many numbers for every image" in text


def test_augmentation_is_drawn_by_the_items_names() -> None:
    spec = AugmentSpec(probability=0.7, variants=3)
    order = [4, 2, 0, 5, 1, 3]
    mixed = Items({"image": FLOATS[order], "name": [str(i) for i in order]})
    plain, other = batches(Items({"image": FLOATS}), ROOT, ROOT, spec=spec), batches(mixed, ROOT, ROOT, spec=spec)
    samples = list(range(ROWS))
    one, two = plain(samples), other(samples)
    pairs = [(i, j) for i in samples for j in samples if plain.rows([i])[0] == order[other.rows([j])[0]]]
    same = [torch.equal(one["image"][i], two["image"][j]) for i, j in pairs]
    assert len(pairs) == ROWS and any(same), "equal wherever the same variant was drawn"


def test_embeddings_of_items_are_cached(tmp_path) -> None:
    from chaindiff.encoders.base import Encoder

    class Mean(Encoder):
        name, of, features_identity = "mean", "image", {"kind": "mean"}

        def features(self, x):
            return x.mean((2, 3))

    data = Items({"image": FLOATS})
    cache = EmbeddingCache(tmp_path, Mean(), data, STILL, SIDE)
    assert list(cache.build())[-1] == (ROWS, ROWS)
    torch.testing.assert_close(cache["features"][[5, 1]], FLOATS[[5, 1]].mean((2, 3)))
    assert EmbeddingCache(tmp_path, Mean(), Items({"image": FLOATS * 0.5}), STILL, SIDE).folder != cache.folder


def test_encoders_read_items() -> None:
    small = VariableSpec(kind="image", shape=[3, 4, 4], encoder={"kind": "resize", "of": "image"})
    encoder = build_encoder("small", {"image": VariableSpec(kind="image", shape=[3, 8, 8]), "small": small})
    made = Batches(
        Items({"image": FLOATS}), ROOT, [Variable.image("small", 3, 4)], {"small": encoder}, {}, {}, STILL, 0
    )
    assert torch.equal(made([2])["small"], torch.nn.functional.avg_pool2d(FLOATS[made.rows([2])], 2))


def test_evaluation_reads_items(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text("""
name: r
data: {path: nowhere}
variables:
  image: {kind: image, shape: [3, 8, 8]}
  small: {kind: image, shape: [3, 4, 4], encoder: {kind: resize, of: image}}
  v: {kind: vector, shape: [5]}
  kind: {kind: label, shape: [2]}
stages:
  small:
    given: [kind]
    network: {kind: unet, channels: 16, mult: [1], blocks: 1, attention: []}
    train: {images: 8}
""")
    assembly = Assembly(load_recipe("r.yaml"))
    data = Items(Rows(image=list(FLOATS), v=list(VECTORS), kind=list("ababab")))
    values = DataValues(assembly, data, tmp_path)
    assert torch.equal(values.of("image", [3]), FLOATS[[3]]) and torch.equal(values.of("v", [3, 1]), VECTORS[[3, 1]])
    assert values.of("kind", [0, 1]).tolist() == [0, 1] and values.of("small", [0]).shape == (1, 3, 4, 4)


def test_it_is_a_public_name() -> None:
    assert cd.Items is Items
