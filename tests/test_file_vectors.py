"""Vectors from a file: rows by order or by name, in training, statistics and evaluation; and what is refused."""

# ruff: noqa: E501 (a table of mistakes has one a line)

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import noise, png
from recipe_text import message, write
from safetensors.torch import save_file

from chaindiff import cli
from chaindiff.chain.variable import Variable
from chaindiff.commands.smoke import smoke_version
from chaindiff.encoders import FileVectors, build_encoder
from chaindiff.evaluation.oracle import DataValues
from chaindiff.io import tensorfile
from chaindiff.io.errors import UserError
from chaindiff.recipe.assembly import Assembly
from chaindiff.recipe.training import prepare
from chaindiff.specs.load import load_recipe
from chaindiff.specs.recipe import OpenClipSpec, VariableSpec

IMAGES, WIDTH = 9, 6
NAMES = [f"{index}.png" for index in range(IMAGES)]
RECIPE = """\
name: vectors
data: {path: images}
variables:
  image: {kind: image, shape: [3, 8, 8]}
  clip: {kind: vector, shape: [6], encoder: {kind: file, path: clip.safetensors}}
stages:
  clip:
    network: {kind: prior, width: 16, depth: 1, heads: 2}
    train: {images: 16, batch: 8, execution: eager}
    sample: {steps: 2}
  image:
    given: [clip]
    network: {kind: unet, channels: 16, mult: [1], blocks: 1, attention: []}
    augment: {probability: 0.5, variants: 3}
    train: {images: 16, batch: 8, execution: eager}
    sample: {steps: 2}
sample: {count: 2, batch: 2, execution: eager}
"""


def numbers(seed: int = 0, rows: int = IMAGES, width: int = WIDTH) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(3, 2, (rows, width))).float()


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    for seed, name in enumerate(NAMES):
        (Path("images") / name).write_bytes(png(noise(8, 8, seed)))
    save_file({"features": numbers()}, "clip.safetensors")
    write(tmp_path, RECIPE)
    return tmp_path


def encoder(path: str = "clip.safetensors", kind: str = "vector", shape: int = WIDTH, **said) -> FileVectors:
    spec = VariableSpec(kind=kind, shape=[shape], encoder={"kind": "file", "path": path, **said})
    built = build_encoder("clip", {"clip": spec})
    assert isinstance(built, FileVectors)
    return built


def rows(path: str, names: list[str] = NAMES, **said) -> torch.Tensor:
    features = encoder(path, **said).rows_of(names)
    assert len(features) == len(names)
    values = features[range(len(names))]
    assert torch.equal(torch.cat(list(features.split(4))), values)
    return values


def chaindiff(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    return ended.value.code


# ------------------------------------------------------------ files


@pytest.mark.parametrize("tensor", ["features", "clip", "whatever"])
def test_rows_in_the_order_of_the_images(here, tensor) -> None:
    save_file({tensor: numbers(1)}, "a.safetensors")
    assert torch.equal(rows("a.safetensors"), numbers(1))
    save_file({"features": numbers(2), "clip": numbers(3), "other": numbers(4)}, "b.safetensors")
    assert torch.equal(rows("b.safetensors"), numbers(2))


def test_rows_by_name(here) -> None:
    mixed = [NAMES[i] for i in (3, 1, 8, 0, 7, 5, 2, 4, 6)]
    values = torch.cat([torch.stack([numbers()[NAMES.index(name)] for name in mixed]), numbers(5, 2)])
    save_file({"features": values}, "n.safetensors", {"names": json.dumps([*mixed, "more.png", "still more.png"])})
    assert torch.equal(rows("n.safetensors"), numbers())
    assert torch.equal(rows("n.safetensors", NAMES[4:6]), numbers()[4:6])


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, ">f4", np.int32, np.uint8])
def test_rows_of_numpy(here, kind) -> None:
    array = (numbers().abs() * 8).numpy().astype(kind)
    np.save("a.npy", array)
    before = Path("a.npy").read_bytes()
    assert torch.equal(rows("a.npy"), torch.from_numpy(array.astype(np.float32)))
    assert Path("a.npy").read_bytes() == before


def refusal(path: str, names: list[str] = NAMES, **said) -> str:
    with pytest.raises(UserError) as caught:
        encoder(path, **said).rows_of(names)
    assert caught.value.where in ("variables.clip.encoder.path", "variables.clip.shape")
    return str(caught.value)


def test_a_file_that_is_not_there(here) -> None:
    assert "there is no file none.safetensors" in refusal("none.safetensors")


def test_files_of_something_else(here) -> None:
    Path("a.safetensors").write_bytes(Path("clip.safetensors").read_bytes()[:-9])
    assert "a.safetensors is not a complete file of numbers: " in refusal("a.safetensors")
    np.save("a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    text = refusal("a.npy")
    assert "a.npy is not a complete file of numbers: " in text and "pickled objects are never read" in text
    Path("b.npy").write_bytes(b"\x80\x04]\x94.")
    assert "b.npy is not a complete file of numbers: " in refusal("b.npy")
    np.save("c.npy", np.array([["a"]]))
    assert "c.npy is not a complete file of numbers: its dtype is <U1" in refusal("c.npy")
    save_file({"features": numbers()}, "n.safetensors", {"names": "[1]"})
    assert "`names` in the metadata of n.safetensors is not a JSON list of file names" in refusal("n.safetensors")


def test_numbers_that_do_not_fit(here) -> None:
    np.save("a.npy", numbers().numpy()[None])
    assert "a.npy holds numbers of shape [1, 9, 6]; expected [rows, width]" in refusal("a.npy")
    text = refusal("clip.safetensors", shape=5)
    assert "variable 'clip' has shape [5], but the vectors in clip.safetensors have 6 numbers\n  set shape: [6]" in text
    text = refusal("clip.safetensors", NAMES[:7])
    assert "clip.safetensors has 9 rows, but the data has 7 images\n  rows follow the order" in text
    save_file({"clop": numbers(), "other": numbers(1)}, "two.safetensors")
    assert "holds no tensor 'features' or 'clip'; did you mean 'clop'?" in refusal("two.safetensors")
    broken = numbers()
    broken[4, 2] = torch.nan
    save_file({"features": broken}, "nan.safetensors")
    assert "the vector of the image '4.png' in nan.safetensors is not finite" in refusal("nan.safetensors")


def test_names_that_do_not_fit(here) -> None:
    save_file({"features": numbers()}, "n.safetensors", {"names": json.dumps([*NAMES[:6], "x", "y", "z"])})
    text = refusal("n.safetensors")
    assert "n.safetensors has no row for the image '6.png' and 2 more\n  its `names` look like '0.png'" in text
    assert "no row for the image 'a.png'\n" in refusal("n.safetensors", [*NAMES[:6], "a.png"])
    save_file({"features": numbers()}, "n.safetensors", {"names": json.dumps(NAMES[:8])})
    assert "n.safetensors has 9 rows, but its metadata has 8 `names`" in refusal("n.safetensors")
    save_file({"features": numbers()}, "n.safetensors", {"names": json.dumps([*NAMES[:8], "3.png"])})
    assert "has '3.png' more than once" in refusal("n.safetensors")


# ------------------------------------------------------------ chains


def test_a_plan_needs_no_file(here, capsys) -> None:
    Path("clip.safetensors").unlink()
    assert chaindiff("plan", "r.yaml") == 0
    assert "clip -> image" in capsys.readouterr().out
    assert chaindiff("train", "r.yaml") == 2
    error = capsys.readouterr().err
    assert "r.yaml:5: variables.clip.encoder.path: there is no file clip.safetensors" in error


def test_batches_hold_the_rows_of_their_images_standardised(here) -> None:
    batches = prepare(Assembly(load_recipe("r.yaml")), "image")
    samples = list(range(30))
    values, found = batches(samples)["clip"], batches.rows(samples)
    wanted = (numbers() - numbers().mean(0)) / numbers().std(0, correction=0) * 0.5
    torch.testing.assert_close(values, wanted[found], rtol=1e-4, atol=1e-5)


def test_principal_components_clusters_and_raw_vectors(here) -> None:
    asked = {"variables": {"clip": {"shape": [2], "encoder": {"reduce": {"kind": "pca", "k": 2}}}}}
    values = prepare(Assembly(load_recipe("r.yaml", **asked)), "clip")(list(range(IMAGES)))["clip"]
    torch.testing.assert_close(values.std(0, correction=0), torch.full((2,), 0.5), rtol=1e-4, atol=0)
    batches = prepare(Assembly(load_recipe("r.yaml", changes=["variables.clip.encoder.scaling=raw"])), "clip")
    assert torch.equal(batches([0, 1, 2])["clip"], numbers()[batches.rows([0, 1, 2])])
    group = {"kind": "label", "shape": [2], "encoder": {"kind": "file", "path": "clip.safetensors"}}
    group["encoder"]["reduce"] = {"kind": "kmeans", "k": 2}
    loaded = load_recipe("r.yaml", variables={"group": group}, stages={"image": {"given": ["group"]}})
    assembly = Assembly(loaded)
    labels = prepare(assembly, "image")(list(range(IMAGES)))["group"]
    assert sorted(set(labels.tolist())) == [0, 1] and assembly.columns["group"].counts.sum() == IMAGES


def test_the_data_s_own_values_of_it(here) -> None:
    assembly = Assembly(load_recipe("r.yaml"))
    batches = prepare(assembly, "image")
    values = DataValues(assembly, assembly.data, here / "values")
    found = batches.rows([3, 4])
    assert torch.equal(values.of("clip", found), batches([3, 4])["clip"])


def test_trained_and_given_and_two_contents_refused(here, capsys) -> None:
    assert chaindiff("train", "r.yaml") == 0
    Path("clip.safetensors").rename("moved.safetensors")
    assert chaindiff("sample", "r.yaml") == 0, "sampling needs no file"
    save_file({"clip": torch.zeros(2, WIDTH)}, "given.safetensors")
    weights = ["--set", "stages.image.weights=runs/vectors"]
    assert chaindiff("sample", "r.yaml", "--out", "runs/given", "--given", "clip=given.safetensors", *weights) == 0
    capsys.readouterr()
    assert chaindiff("sample", "r.yaml", "--out", "runs/photo", "--given", "clip=images/0.png", *weights) == 2
    error = capsys.readouterr().err
    assert "--given clip: images/0.png cannot be encoded: 'clip' is of clip.safetensors, which knows only" in error
    assert "give numbers: a .safetensors or .npy file with [rows, 6]" in error
    save_file({"features": numbers(1)}, "clip.safetensors")
    assert chaindiff("train", "r.yaml", "--stage", "clip", "--fresh") == 2, "its statistics are of other vectors"
    assert "these statistics were not fitted for the encoder of 'clip'" in capsys.readouterr().err
    next(Path("runs/vectors/encoders").iterdir()).unlink()
    assert chaindiff("train", "r.yaml", "--stage", "clip", "--fresh") == 0
    assert chaindiff("sample", "r.yaml", "--out", "runs/vectors") == 2
    assert (
        "stages/image/weights.safetensors was trained on other content than is there now: the vectors of 'clip'"
        in capsys.readouterr().err
    )


def test_it_encodes_nothing(here) -> None:
    with pytest.raises(UserError, match=r"'clip' comes from the file clip\.safetensors, which cannot encode anything"):
        encoder()(torch.zeros(1, 3, 8, 8))
    producers = Assembly(load_recipe("r.yaml")).chain().producers
    assert [p.kind for p in producers] == ["stage", "stage"], "no observation"


def test_identity_is_what_the_numbers_are_not_where_they_lie(here) -> None:
    def identity(path: str = "clip.safetensors", **said) -> str:
        spec = VariableSpec(kind="vector", shape=[6], encoder={"kind": "file", "path": path, **said})
        return Variable.from_specs("clip", {"clip": spec}).identity

    assert identity() == identity("else/where/clip.safetensors")
    assert identity("a.npy", identity="v1") == identity("b.safetensors", identity="v1")
    assert len({identity(), identity("a.npy"), identity(identity="v1"), identity(scaling="raw")}) == 4
    one = Assembly(load_recipe("r.yaml")).encoders["clip"].digest
    save_file({"features": numbers(1)}, "clip.safetensors")
    assert Assembly(load_recipe("r.yaml")).encoders["clip"].digest != one


def test_smoke_embeds_the_smoke_data_instead(here) -> None:
    asked = [
        "variables.clip.encoder.scaling=raw",
        "variables.clip.shape=[2]",
        "variables.clip.encoder.reduce={kind: pca, k: 2}",
    ]
    spec = smoke_version(load_recipe("r.yaml", changes=asked)).recipe.variables["clip"]
    assert isinstance(spec.encoder, OpenClipSpec) and (spec.encoder.of, spec.encoder.scaling) == ("image", "raw")
    assert spec.encoder.reduce is not None and spec.shape == [2]
    assert smoke_version(load_recipe("r.yaml")).recipe.variables["clip"].shape == [128]


MISTAKES = [
    ("path: clip.safetensors", "path: clip.npz", "r.yaml:5: variables.clip.encoder.path: expected a .safetensors or .npy file, not 'clip.npz'"),
    ("path: clip.safetensors", "pth: clip.npy", "r.yaml:5: variables.clip.encoder: unknown field 'pth'; did you mean 'path'?"),
    ("path: clip.safetensors", "of: image, path: a.npy", "r.yaml:5: variables.clip.encoder: unknown field 'of'"),
    ("path: clip.safetensors", "path: a.npy, reduce: {kind: pca, k: 3}", "variables.clip.encoder.reduce.k: 3 components do not fit a vector of shape [6]"),
    ("{kind: vector, shape: [6]", "{kind: image, shape: [3, 8, 8]", "r.yaml:5: variables.clip.encoder.kind: a file provides vectors, maps, or labels by clustering vectors, not an image"),
    ("{kind: vector, shape: [6]", "{kind: label, shape: [6]", "variables.clip.encoder.reduce: a label is the nearest cluster of an embedding"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "expected"), MISTAKES, ids=[expected[:60] for *_, expected in MISTAKES])
def test_mistakes_are_explained_with_their_place(here, old, new, expected) -> None:
    assert RECIPE.count(old) == 1
    write(here, RECIPE.replace(old, new))
    assert expected in message("r.yaml")


def test_weights_say_which_content_they_were_trained_on(here) -> None:
    assembly = Assembly(load_recipe("r.yaml"))
    prepare(assembly, "clip")
    kept = assembly.stages["clip"].metadata()["variables"]["clip"]
    assert kept["fitted"] == assembly.encoders["clip"].digest != ""
    assert tensorfile.metadata(assembly.encoders["clip"].path)["rows"] == str(IMAGES)
