"""`chaindiff evaluate` on a tiny chain: rows, oracles, sweeps, what is done once only, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from chaindiff import cli
from chaindiff.chain.chain import Chain
from chaindiff.data import open_data
from chaindiff.edm.random import Draws
from chaindiff.encoders.clip_emoji import open_clip_folder, open_clip_tokenizer
from chaindiff.evaluation.captions import captions
from chaindiff.evaluation.evaluate import Group, Rows, Sweep, link_rows, measure_group
from chaindiff.evaluation.features import extractor
from chaindiff.evaluation.oracle import DataValues, oracle
from chaindiff.evaluation.report import provenance
from chaindiff.evaluation.rows import BATCH, CHUNK, Row
from chaindiff.evaluation.study import Study
from chaindiff.evaluation.tables import (
    figures_table,
    number,
)
from chaindiff.io import tensorfile
from chaindiff.io.digest import digest
from chaindiff.io.errors import UserError
from chaindiff.recipe.assembly import Assembly
from chaindiff.show.images import to_uint8
from chaindiff.specs.load import load_recipe
from chaindiff.specs.recipe import DataSpec

RECIPE = """
name: tiny
data: {{path: {data}, split: train}}
variables:
  photo: {{kind: image, shape: [3, 16, 16]}}
  image: {{kind: image, shape: [3, 8, 8], encoder: {{kind: resize, of: photo}}}}
  small: {{kind: image, shape: [3, 4, 4], encoder: {{kind: resize, of: image}}}}
  group: {{kind: label, shape: [3], source: empirical}}
stages:
  small:
    given: [group]
    network: &network {{kind: unet, channels: 16, mult: [1], blocks: 1, attention: [], dropout: 0.0}}
    train: &train {{images: 16, batch: 8, execution: eager, log_every: 1}}
    sample: {{steps: 2}}
  image:
    given: [small, group]
    network: *network
    train: *train
    sample: {{steps: 2}}
sample: {{want: [image], count: 4, batch: 4, execution: eager}}
evaluate: {{count: 260, judges: ["pixels:2"]}}
"""


UNTOLD = 5  # the image without a caption


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    data, rng, rows = folder / "data", np.random.default_rng(0), []
    data.mkdir()
    for index in range(24):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(data / f"{index:02d}.png")
        split = "train" if index < 16 else "test"
        row = {"file_name": f"{index:02d}.png", "group": "abc"[index % 3], "split": split}
        if index != UNTOLD:
            row["caption"] = (
                f"{['red', 'green', 'blue', 'old'][index % 4]} {['heart', 'cat', 'car'][index % 3]} {index}"
            )
        rows.append(json.dumps(row))
    (data / "metadata.jsonl").write_text("\n".join(rows))
    path = folder / "tiny.yaml"
    path.write_text(RECIPE.format(data=data))
    return path


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    return ended.value.code


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    assert command("train", str(recipe), "--out", str(out)) == 0
    sweep = "stages.image.sample.steps=1,2"
    assert command("evaluate", str(recipe), "--links", "--sweep", sweep, "--out", str(out)) == 0
    return out


def test_every_figure_says_what_it_is(run):
    found = json.loads((run / "metrics.json").read_text())
    rows = {figure["row"] for figure in found["figures"]}
    assert rows == {"tiny", "the whole chain", "small from the data", "steps 1", "steps 2"}
    for figure in found["figures"]:
        assert figure["split"] == "train" and figure["count"] == 260 and figure["seed"] == 0
        assert figure["in_chain"] is False and "16 images" in figure["reference"]
    assert {f["metric"] for f in found["figures"]} == {
        "fd", "kid", "precision", "recall", "density", "coverage", "swd",
    }  # fmt: skip


def test_every_figure_says_what_training_cost(recipe, run):
    """Against a count of a forward and backward pass: a little less than three of a forward one, since no gradient of
    the first layers' inputs is taken."""
    row = Row("tiny", load_recipe(recipe), "image", run / "evaluation", out=run)
    counted = 0
    for name in ("small", "image"):
        stage = row.assembly.stages[name].build()
        batch = {v.name: torch.zeros(1, *v.shape) for v in row.assembly.stages[name].variables if v.kind == "image"}
        batch["group"] = torch.zeros(1, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            stage(batch, Draws([0], 0, name)).mean().backward()
        counted += 16 * counter.get_total_flops()
    about = json.loads((run / "metrics.json").read_text())["figures"][0]
    assert about["training images"] == {"small": 16, "image": 16}
    assert about["training pflop"] == row.training_pflop == pytest.approx(counted / 1e15, rel=0.15)
    assert about["training pflop"] > counted / 1e15
    part = Row("part", load_recipe(recipe), "image", run / "evaluation", oracle=["small"], out=run)
    assert part.training_images == {"image": 16} and 0 < part.training_pflop < row.training_pflop


def test_training_is_what_the_weights_saw_and_not_what_the_recipe_asks(tmp_path):
    loaded = load_recipe("vcdm_emoji16")
    shipped = Row("shipped", loaded, "image16", tmp_path)
    assert list(shipped.training_images.items()) == [("clip", 300_032), ("image16", 600_064)]  # whole batches
    assert [loaded.recipe.stages[n].train.images for n in ("clip", "image16")] == [300_000, 600_000]
    tensors, kept = tensorfile.load(shipped.assembly.stages["clip"].weights())
    begun = {"stage": json.dumps({**json.loads(kept["stage"]), "init": "other"})}
    for name, changes in (("imported", {"imported": "{}", "images": "0"}), ("begun", begun)):
        tensorfile.save(tmp_path / f"{name}.safetensors", tensors, {**kept, **changes})
        weights = {"stages": {"clip": {"weights": str(tmp_path / f"{name}.safetensors")}}}
        row = Row(name, loaded.override(weights), "image16", tmp_path)
        assert row.training_images == {"clip": None, "image16": 600_064} and row.training_pflop is None


def test_the_page_shows_tables_plots_and_neighbours(run):
    page = (run / "report.html").read_text()
    for part in ("What each link costs", "Link by link", "Memorisation, by pixels", "pixels:2: weights", "steps 1"):
        assert part in page
    titles = [part["title"] for part in json.loads((run / "metrics.json").read_text())["parts"]]
    assert titles[0] == "Quality of 'image'" and "stages.image.sample.steps" in titles


def test_what_was_done_is_not_done_again(recipe, run):
    before = {path: path.stat().st_mtime_ns for path in (run / "evaluation" / "rows").rglob("*.safetensors")}
    metrics = (run / "metrics.json").read_bytes()
    sweep = "stages.image.sample.steps=1,2"
    assert command("evaluate", str(recipe), "--links", "--sweep", sweep, "--out", str(run)) == 0
    after = {path: path.stat().st_mtime_ns for path in (run / "evaluation" / "rows").rglob("*.safetensors")}
    assert before == after and (run / "metrics.json").read_bytes() == metrics


def test_rows_of_equal_settings_share_their_samples(run):
    # "tiny", "the whole chain" and "steps 2" are one row; "steps 1" and the oracle's are two more.
    assert len(list((run / "evaluation" / "rows").iterdir())) == 3


def test_an_interrupted_row_goes_on_with_the_same_samples(recipe, run, tmp_path):
    loaded = load_recipe(recipe)
    whole = Row("whole", loaded, "image", tmp_path / "a", 2 * CHUNK, out=run)
    list(whole.draw())
    parts = Row("parts", loaded, "image", tmp_path / "b", 2 * CHUNK, out=run)
    drawing = parts.draw()
    assert [next(drawing) for _ in range(3)] == [(0, 2 * CHUNK), (BATCH, 2 * CHUNK), (CHUNK, 2 * CHUNK)]
    drawing.close()
    again = Row("parts", loaded, "image", tmp_path / "b", 2 * CHUNK, out=run)
    assert [done for done, _ in again.draw()] == [CHUNK, CHUNK + BATCH, 2 * CHUNK]
    assert torch.equal(whole.samples("image")[:], again.samples("image")[:])
    fewer = Row("fewer", loaded, "image", tmp_path / "b", 30, out=run)
    assert list(fewer.draw()) == fewer.store.missing() == [] and len(fewer.samples("image")[:]) == 30


def test_oracles_are_values_of_one_image(recipe, run, tmp_path):
    assembly = Assembly(load_recipe(recipe), run)
    values = DataValues(assembly, assembly.data, tmp_path)
    drawn = oracle(values, ["small", "group", "photo"], 40, seed=3)
    assert drawn["small"].shape == (40, 3, 4, 4) and drawn["group"].shape == (40,)
    expected = torch.nn.functional.avg_pool2d(drawn["photo"], 4)  # two halvings by box filters
    assert torch.allclose(drawn["small"], expected, atol=1e-5)
    pixels = values.of("photo", range(16))
    labels = assembly.data.categories("group")[1]
    for photo, group in zip(drawn["photo"], drawn["group"], strict=True):
        row = (pixels - photo).flatten(1).abs().sum(1).argmin()
        assert torch.equal(pixels[row], photo) and labels[row] == group
    counts = torch.bincount((drawn["photo"][:32, None] - pixels).flatten(2).abs().sum(2).argmin(1))
    assert counts.tolist() == [2] * 16  # whole passes over the data


def test_a_link_s_oracle_brings_the_label_of_the_same_image(recipe, run, tmp_path):
    make = Rows(load_recipe(recipe), "image", tmp_path, 10, [0], run)
    group = link_rows(make, make("")[0].assembly)
    assert [rows[0].label for rows in group.rows] == ["the whole chain", "small from the data"]
    assert set(group.rows[1][0].plan.plan.given) == {"small", "group"}
    assert group.rows[1][0].plan.running == ["image"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--sweep", "stages.image.sample.stps=1,2"), "unknown field 'stps'; did you mean 'steps'?"),
        (("--sweep", "stages.image.sample.steps"), "expected NAME=VALUE after --sweep"),
        (("--of", "clip"), "no stage of this recipe generates an image of that name"),
        (("--judge", "pixls"), "there is no feature extractor 'pixls'; did you mean 'pixels'?"),
        (("--baseline", "edm_emoji16"), "that recipe generates no 'image', but image16"),
        (("--oracle", "smal"), "no variable 'smal' in this chain"),
        (("--given", "group=d"), "--given group: 'd' is not a class of group; known: a, b, c"),
        (("--given", "gruop=a"), "there is no variable 'gruop'; did you mean 'group'?"),
        (("--given", "group=a", "--links"), "--links: the given 'group' and the data's values would be of different"),
        (("--given", "group=a", "--oracle", "small"), "leave out --oracle small, or what is given: --set sample.given"),
        (("--given", "photo=p.png"), "no stage samples 'image', which is measured: it follows from what is given"),
        (
            ("--given", "group=a", "--of", "small", "--given", "image=p.png"),
            "no stage samples 'small', which is measured",
        ),
    ],
)
def test_mistakes_are_explained(recipe, run, capsys, arguments, expected):
    assert command("evaluate", str(recipe), "--out", str(run), *arguments) == 2
    assert expected in capsys.readouterr().err


def test_a_stage_without_weights_is_named(recipe, tmp_path, capsys):
    assert command("evaluate", str(recipe), "--out", str(tmp_path / "empty" / "run")) == 2
    assert "stage 'small' has no weights yet" in capsys.readouterr().err


def test_sweeps_take_lists_and_single_values():
    assert Sweep.parse("a.b=1,2").values == (1, 2)
    assert Sweep.parse("a.b=[0.5, x]").values == (0.5, "x")
    assert Sweep.parse("a.b=3").values == (3,)
    assert Sweep.parse("a.b=1,2") == Sweep("a.b", (1, 2))


# ---------------------------------------------------------------- given values


def given(recipe, run, folder, **values) -> Row:
    loaded = load_recipe(recipe).override({"sample": {"given": values}})
    (row,) = Rows(loaded, "image", folder, 6, [0], run)("tiny")
    return row


def test_rows_are_sampled_given_what_the_recipe_gives(recipe, run, tmp_path, monkeypatch):
    free, one, other, several = (
        given(recipe, run, tmp_path, **values)
        for values in ({}, {"group": "b"}, {"group": "c"}, {"group": ["a", "b", "c", 0]})
    )
    assert one.label == "tiny, given group b" and one.given == {"group": "b"} and one.from_data == []
    assert len({row.key for row in (free, one, other, several)}) == 4
    assert given(recipe, run, tmp_path, group=1).key == one.key  # the same class
    seen = []

    def request(chain, count, given, **settings):
        seen.append(given["group"])
        raise KeyboardInterrupt

    monkeypatch.setattr(Chain, "request", request)
    for row in (one, several):
        with pytest.raises(KeyboardInterrupt):
            list(row.draw())
    assert seen[0].tolist() == [1] and seen[1].tolist() == [0, 1, 2, 0] * (CHUNK // 4) + [0, 1]  # in turn


def test_evaluate_given_as_json(recipe, run, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(run / "stages", out / "stages")
    options = ["--given", "group=b", "--baseline", str(recipe), "--sweep", "stages.*.sample.steps=1,2"]
    assert command("evaluate", str(recipe), "--count", "30", *options, "--out", str(out), "--json") == 0
    said, messages = capsys.readouterr()
    found = json.loads(said)
    assert found["metrics"] == str(out / "metrics.json") and Path(found["page"]).is_file()
    assert found["figures"] == json.loads((out / "metrics.json").read_text())["figures"]
    assert {f["row"]: f["nfe"]["small"] for f in found["figures"]} == {
        "tiny, given group b": 3,
        "steps 1, given group b": 1,
        "steps 2, given group b": 3,
    }
    assert all(figure["given"] == {"group": "b"} for figure in found["figures"])
    assert "Quality of 'image'" in messages and load_recipe(out).recipe.sample.given == {"group": "b"}


def test_a_given_value_that_changes_nothing_is_refused(recipe, run, tmp_path):
    loaded = load_recipe(
        recipe, changes=["stages.image.given=[small]", "sample.given.group=a", "sample.given.small=s.npy"]
    )
    with pytest.raises(UserError, match="the given 'group' has no effect on 'image'") as error:
        Rows(loaded, "image", tmp_path, 6, [0], run)("tiny")[0].plan  # noqa: B018
    assert error.value.hint == "leave it out: --set sample.given.group=null"


# ---------------------------------------------------------------- captions

CLIP = "open_clip:clip_emoji"


def test_alignment_is_with_the_caption_of_the_image_that_a_sample_was_made_for(recipe, run, tmp_path):
    loaded = load_recipe(recipe)
    row = Row("given small", loaded, "image", tmp_path, 30, seed=2, oracle=["small"], out=run)
    free = Row("free", loaded, "image", tmp_path, 30, out=run)
    list(row.draw()), list(free.draw())
    study = Study(tmp_path, [CLIP], held_out=None)
    found = {f.metric: f for f in study.figures(row) if f.encoder == CLIP}

    # Which image each sample was made for, by its pixels; texts by open_clip itself.
    data = row.assembly.data
    photos = oracle(DataValues(row.assembly, data, tmp_path), ["photo"], 30, seed=2)["photo"]
    own = data.images(range(16), 16).float() / 127.5 - 1
    images = (photos[:, None] - own).flatten(2).abs().sum(2).argmin(1)
    with torch.no_grad():
        texts = open_clip_folder().float().encode_text(open_clip_tokenizer()(data.field("caption")))
    told = images != UNTOLD
    assert 0 < told.sum() < 30
    clip = extractor(CLIP)
    small = to_uint8(DataValues(row.assembly, data, tmp_path).of("image", range(16)))
    for metric, seen in (
        ("alignment", clip(row.samples("image")[:])),
        ("alignment_data", clip(small)[images]),
    ):
        cosines = torch.nn.functional.cosine_similarity(seen, texts[images])[told]
        assert found[metric].value == pytest.approx(cosines.mean().item(), abs=1e-5)
        spread = 2 * 1.96 * cosines.std().item() / len(cosines) ** 0.5
        assert found[metric].high - found[metric].low == pytest.approx(spread, rel=0.3)
        assert found[metric].split == "train" and "16 images" in found[metric].reference

    # Samples that nothing was given are made for no image; their figures are kept under the names of old.
    assert {f.metric for f in study.figures(free)}.isdisjoint(found.keys() & {"alignment", "alignment_data"})
    old = digest([free.key, 30, study.data(free, None).key, CLIP, clip.identity])
    assert (tmp_path / "figures" / f"{old}.json").exists()
    results = measure_group(Group("t", "links", [[row], [free]]), study)
    table = figures_table(results)
    column = table[0].index(f"alignment with captions {CLIP}")
    assert table[1][column].startswith(number(found["alignment"].value)) and table[2][column] == "-"
    assert "caption of the image that it was made for" in provenance(results.rows)


def test_other_captions_are_measured_anew(recipe, run, tmp_path, monkeypatch):
    row = Row("given small", load_recipe(recipe), "image", tmp_path, 8, oracle=["small"], out=run)
    list(row.draw())
    study, found = Study(tmp_path, [CLIP], held_out=None), []
    for texts in (["cat"] * 16, ["red heart"] * 16, ["cat"] * 16, [""] * 16):
        monkeypatch.setattr(row.assembly.data, "field", lambda name, texts=texts: texts)
        found.append({f.metric: f.value for f in study.figures(row)})
    assert found[0] == found[2] and found[0]["alignment"] != found[1]["alignment"]
    assert found[0]["cmmd"] == found[1]["cmmd"] and "alignment" not in found[3]


def test_captions_are_the_recipe_s_texts_or_a_field_of_a_usual_name(recipe, run, tmp_path):
    assembly = Assembly(load_recipe(recipe), run)
    found = captions(assembly, assembly.data)
    assert found is not None and found[:2] == ["red heart 0", "green cat 1"] and found[UNTOLD] == ""
    declared = load_recipe(recipe).override({"variables": {"said": {"kind": "text", "of": "group", "source": "given"}}})
    assert captions(Assembly(declared, run), assembly.data) == assembly.data.field("group")
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    assert captions(assembly, open_data(DataSpec(path=str(tmp_path)))) is None
