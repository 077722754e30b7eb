"""Data sets: folders, zips, metadata, filters, decoding."""

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
from image_files import lines, noise, png, refusal, write, zipped
from PIL import Image

from chaindiff.data import open_data
from chaindiff.data.items import Items
from chaindiff.specs.recipe import DataSpec


@pytest.fixture
def files() -> dict[str, bytes | str]:
    rows = [
        {"file_name": "a/0.png", "caption": "red cat", "style": "flat", "split": "train", "tags": ["cat", "red"]},
        {"file_name": "a/1.png", "caption": "dog", "style": "round", "split": "train", "tags": ["dog"]},
        {"file_name": "b/2.png", "caption": "blue cat", "style": "flat", "split": "test", "tags": ["cat"]},
    ]
    images = {row["file_name"]: png(noise(8, 8, seed)) for seed, row in enumerate(rows)}
    return {**images, "metadata.jsonl": lines(*rows)}


# -- opening


def test_folder_and_zip_agree(tmp_path, files):
    folder = open_data(DataSpec(path=str(write(tmp_path / "set", files))))
    archive = open_data(DataSpec(path=str(zipped(tmp_path / "set.zip", files))))
    for data in (folder, archive):
        assert data.names == ["a/0.png", "a/1.png", "b/2.png"]
        assert data.field("caption") == ["red cat", "dog", "blue cat"]
        assert data.field("tags") == ["cat, red", "dog", "cat"]
        for index in range(3):
            np.testing.assert_array_equal(data.images([index], 8)[0].permute(1, 2, 0), noise(8, 8, index))
    assert archive.description == "set: 3 images at 8 x 8"


def test_edm_zip(tmp_path):
    labels = [["0/b.png", 10], ["0/a.png", 9], ["0/c.png", 10]]
    files = {name: png(noise(4, 4, cls)) for name, cls in labels}
    data = open_data(
        DataSpec(path=str(zipped(tmp_path / "x.zip", {**files, "dataset.json": json.dumps({"labels": labels})})))
    )
    assert data.field("label") == ["9", "10", "10"]
    assert data.categories("label") == (["9", "10"], [0, 1, 1])
    plain = open_data(DataSpec(path=str(zipped(tmp_path / "y.zip", {**files, "dataset.json": '{"labels": null}'}))))
    assert plain.fields == []


def test_embedded_set_opens_without_torch():
    code = """
import sys
from chaindiff.data import open_data
from chaindiff.specs.recipe import DataSpec
data = open_data(DataSpec(path="emoji64"))
print(len(data), data.resolution, data.categories("style")[0], len(data.digest), "torch" in sys.modules)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "5014 64 ['fluent3d', 'fluentflat', 'google', 'twitter'] 64 False"


def test_plain_folder_hidden_files_and_order(tmp_path):
    image = png(noise(4, 4))
    data = open_data(
        DataSpec(path=str(write(tmp_path, {"z.PNG": image, "sub/y.png": image, ".x.png": image, "notes.txt": "hello"})))
    )
    assert data.names == ["sub/y.png", "z.PNG"]


def test_metadata_in_a_subfolder_is_relative_to_it(tmp_path):
    files = {"train/0.png": png(noise(4, 4)), "train/metadata.jsonl": lines({"file_name": "0.png", "text": "one"})}
    assert open_data(DataSpec(path=str(write(tmp_path, files)))).field("text") == ["one"]


def test_labels_that_are_vectors(tmp_path):
    """As EDM's data sets may have them, for `label: {kind: vector, ...}`."""
    labels = [["0/b.png", [0.5, -1]], ["0/a.png", [2, 0.25]]]
    files = {name: png(noise(4, 4)) for name, _ in labels} | {"dataset.json": json.dumps({"labels": labels})}
    data = open_data(str(zipped(tmp_path / "x.zip", files)))
    assert data.column("label").tolist() == [[2, 0.25], [0.5, -1]]
    for odd in ([0.5], [0.5, float("nan")], 3):
        files["dataset.json"] = json.dumps({"labels": [["0/b.png", odd], labels[1]]})
        message = refusal(zipped(tmp_path / "y.zip", files), lambda data: data.column("label"))
        assert "the data has no 'label' that is a list of as many numbers for every image" in message


def test_some_of_the_classes_of_a_network(tmp_path):
    """Numbers are classes of a label of more; without a size, or as many as there are, they are numbered in order."""
    labels = [["a.png", 7], ["b.png", 3], ["c.png", 7]]
    files = {name: png(noise(4, 4)) for name, _ in labels} | {"dataset.json": json.dumps({"labels": labels})}
    data = open_data(str(write(tmp_path, files)))
    assert data.categories("label", 10) == ([str(number) for number in range(10)], [7, 3, 7])
    assert data.categories("label", 2) == data.categories("label") == (["3", "7"], [1, 0, 1])
    assert data.categories("label", 5) == (["3", "7"], [1, 0, 1])  # which the column then refuses: 7 is no class of 5


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_table_of_metadata(tmp_path, end):
    rows = ["file_name,caption,style", '0.png,"red, with a ""quote""",flat', "1.png,dog,"]
    files = {"train/0.png": png(noise(4, 4)), "train/1.png": png(noise(4, 4, 1)), "train/metadata.csv": end.join(rows)}
    data = open_data(str(write(tmp_path, files)))
    assert data.field("caption") == ['red, with a "quote"', "dog"] and data.field("style") == ["flat", ""]
    assert data.fields == ["caption", "style"]  # where there is metadata, folders say nothing


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("name,caption\n0.png,cat", "metadata.csv:2: each row must have a `file_name`"),
        ("file_name,caption\n0.png,cat,dog", "and as many cells as the head"),
        ("file_name,caption\n0.png", "and as many cells as the head"),
        ('file_name,caption\n0.png,"cat', "not a table of comma-separated values"),
        ("file_name,caption\n9.png,cat", "the metadata names '9.png', which does not exist"),
    ],
)
def test_tables_that_do_not_fit(tmp_path, table, message):
    assert message in refusal(write(tmp_path, {"0.png": png(noise(4, 4)), "metadata.csv": table}))


def test_folders_are_splits_and_classes(tmp_path):
    names = ["Train/cat/0.png", "Train/dog/1.png", "val/dog/2.png", "testing/cat/3.png"]
    folder = str(write(tmp_path / "a", {name: png(noise(4, 4, seed)) for seed, name in enumerate(names)}))
    assert open_data(folder, split="train").names == names[:2]
    assert [len(open_data(folder, split=split)) for split in ("validation", "test")] == [1, 1]
    assert open_data(folder, split="test").categories("label") == (["cat", "dog"], [0])
    assert (
        open_data(folder).content
        == open_data(str(zipped(tmp_path / "a.zip", {n: png(noise(4, 4, s)) for s, n in enumerate(names)}))).content
    )
    plain = open_data(str(write(tmp_path / "b", {"x.png": png(noise(4, 4)), "cats/y.png": png(noise(4, 4))})))
    assert plain.field("label") == ["cats", ""]
    assert "x.png: needs one value of 'label' to be a label" in refusal(tmp_path / "b", lambda d: d.categories("label"))


# -- filters


def test_split_and_where(tmp_path, files):
    path = str(write(tmp_path, files))
    assert open_data(DataSpec(path=path, split="train")).names == ["a/0.png", "a/1.png"]
    assert open_data(DataSpec(path=path, where={"style": ["round", "flat"]}, split="test")).names == ["b/2.png"]
    assert open_data(DataSpec(path=path, where={"tags": "cat"})).names == ["a/0.png", "b/2.png"]


def test_categories_mean_the_same_in_every_split(tmp_path, files):
    data = open_data(DataSpec(path=str(write(tmp_path, files)), split="test"))
    assert data.categories("style") == (["flat", "round"], [0])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"where": {"stile": "flat"}}, "no field 'stile'; did you mean 'style'?"),
        ({"where": {"style": "flatt"}}, "no image has style 'flatt'; did you mean 'flat'?"),
        ({"split": "validation"}, "no image has split 'validation'; known: test, train"),
        ({"split": "test", "where": {"style": "round"}}, "no image has split 'test'"),
        ({"where": {"style": "round", "tags": "red"}}, "no image matches {'style': 'round', 'tags': 'red'}"),
    ],
)
def test_filter_mistakes(tmp_path, files, options, message):
    assert message in refusal(DataSpec(path=str(write(tmp_path, files)), **options))


def test_unknown_field(tmp_path, files):
    message = refusal(write(tmp_path, files), lambda data: data.field("captoin"))
    assert "did you mean 'caption'?" in message and "metadata.jsonl" in message


def test_label_needs_one_value(tmp_path, files):
    message = refusal(write(tmp_path, files), lambda data: data.categories("tags"))
    assert "a/0.png: needs one value of 'tags' to be a label; it has 2" in message


# -- pixels


def test_grey_stays_grey(tmp_path):
    """One channel holds the pixels of a grey image, and Rec. 601's luma of another; three hold them thrice."""
    grey, colour = noise(8, 8)[..., 0], noise(8, 8, 1)
    data = open_data(str(write(tmp_path, {"a.png": png(grey), "b.png": png(colour)})))
    one, three = data.images([0, 1], 8, 1), data.images([0, 1], 8)
    np.testing.assert_array_equal(one[0, 0], grey)
    np.testing.assert_array_equal(three[0], np.stack([grey] * 3))
    np.testing.assert_allclose(one[1, 0].numpy(), colour @ [0.299, 0.587, 0.114], atol=1)
    items = Items({"image": [Image.fromarray(grey), Image.fromarray(colour)]})
    np.testing.assert_allclose(items.images([0, 1], 8, 1).numpy().astype(int), one.numpy().astype(int), atol=1)
    assert data.images([], 8, 1).shape == items.images([], 8, 1).shape == (0, 1, 8, 8)


@pytest.mark.parametrize("side, size, kernel", [(32, 8, "BOX"), (30, 8, "BICUBIC"), (8, 12, "BICUBIC")])
def test_crop_and_resize_as_pil(tmp_path, side, size, kernel):
    pixels = noise(side, side + 7)
    data = open_data(DataSpec(path=str(write(tmp_path, {"a.png": png(pixels)}))))
    middle = Image.fromarray(pixels[:, 3 : 3 + side])
    expected = np.asarray(middle.resize((size, size), Image.Resampling[kernel]))
    assert data.resolution == side
    np.testing.assert_array_equal(data.images([0], size)[0].permute(1, 2, 0), expected)


def test_modes_become_rgb(tmp_path):
    clear = np.zeros((4, 4, 4), np.uint8)
    half = np.full((4, 4, 4), 128, np.uint8) * np.array([0, 0, 0, 1], np.uint8)
    grey = noise(4, 4)[..., 0]
    deep = grey.astype(np.uint16) * 256 + 7
    files = {"0.png": png(clear), "1.png": png(half), "2.png": png(grey), "3.png": png(deep)}
    images = open_data(DataSpec(path=str(write(tmp_path, files)))).images(range(4), 4).numpy()
    assert (images[0] == 255).all()
    assert (images[1] == 127).all()
    for image in images[2:]:
        np.testing.assert_array_equal(image, np.broadcast_to(grey, (3, 4, 4)))


def test_photographs_stand_upright(tmp_path):
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif, quality=95)
    image = open_data(DataSpec(path=str(tmp_path))).images([0], 8)[0, 0]
    assert image[:, 4:].min() > 200 and image[:, :4].max() < 50


def test_resolution_is_the_smallest(tmp_path):
    files = {"a.png": png(noise(9, 20)), "b.png": png(noise(12, 7))}
    assert open_data(DataSpec(path=str(write(tmp_path, files)))).resolution == 7


def test_memory_and_pickle(tmp_path, files):
    path = zipped(tmp_path / "a.zip", files)
    data = open_data(DataSpec(path=str(path)))
    first = data.images([2, 0, 2], 8)
    again = pickle.loads(pickle.dumps(data))
    assert again.names == data.names and again.digest == data.digest
    assert (again.images([2, 0, 2], 8) == first).all()
    path.unlink()
    assert (data.images([0, 2], 8) == first[[1, 0]]).all()  # decoded once, kept


def test_a_large_set_is_not_kept_in_memory(tmp_path, files, monkeypatch):
    data = open_data(DataSpec(path=str(zipped(tmp_path / "a.zip", files))))
    kept = data.images([1, 0], 8)
    monkeypatch.setattr("chaindiff.data.images.MEMORY_BYTES", 10)
    fresh = pickle.loads(pickle.dumps(data))
    assert (fresh.images([1, 0], 8) == kept).all() and fresh.images([], 8).shape == (0, 3, 8, 8)
    assert not fresh._memory


def test_forked_workers_read_the_same_zip():
    from torch.utils.data import DataLoader, Dataset

    data = open_data(DataSpec(path="emoji64", split="test"))
    data._decode(0, 8)  # the parent's file is open and somewhere in the middle

    class Rows(Dataset):
        def __len__(self):
            return 64

        def __getitem__(self, index):
            return data.images([index], 8)[0]

    import torch

    got = torch.cat(list(DataLoader(Rows(), batch_size=8, num_workers=2, multiprocessing_context="fork")))
    assert (got == data.images(range(64), 8)).all()


def test_digest_follows_content_and_selection(tmp_path, files):
    digest = {}
    digest["all"] = open_data(DataSpec(path=str(zipped(tmp_path / "a.zip", files)))).digest
    digest["copy"] = open_data(DataSpec(path=str(zipped(tmp_path / "b.zip", files)))).digest
    digest["train"] = open_data(DataSpec(path=str(tmp_path / "a.zip"), split="train")).digest
    changed = {**files, "a/0.png": png(noise(8, 8, 99))}
    digest["changed"] = open_data(DataSpec(path=str(zipped(tmp_path / "c.zip", changed)))).digest
    assert digest["all"] == digest["copy"]
    assert len({digest["all"], digest["train"], digest["changed"]}) == 3
