"""`chaindiff evaluate` on a tiny chain: rows, oracles, sweeps, what is done once only, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from chaindiff import cli
from chaindiff.assemble import Assembly
from chaindiff.evaluation.evaluate import Rows, Sweep, link_rows
from chaindiff.evaluation.oracle import DataValues, oracle
from chaindiff.evaluation.provenance import Figure
from chaindiff.evaluation.rows import CHUNK, Row
from chaindiff.evaluation.tables import Measured, Results, difference, figures_table, link_costs, markdown, number
from chaindiff.specs.errors import UserError
from chaindiff.specs.load import load_recipe

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


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    data, rng, rows = folder / "data", np.random.default_rng(0), []
    data.mkdir()
    for index in range(24):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(data / f"{index:02d}.png")
        split = "train" if index < 16 else "test"
        rows.append(json.dumps({"file_name": f"{index:02d}.png", "group": "abc"[index % 3], "split": split}))
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
    assert next(drawing) == 0 and next(drawing) == CHUNK
    drawing.close()
    again = Row("parts", loaded, "image", tmp_path / "b", 2 * CHUNK, out=run)
    assert list(again.draw()) == [CHUNK, 2 * CHUNK]
    for left, right in zip(whole.chunks("image"), again.chunks("image"), strict=True):
        assert torch.equal(left, right)
    fewer = Row("fewer", loaded, "image", tmp_path / "b", 30, out=run)
    assert fewer.done() == 30 and sum(len(c) for c in fewer.chunks("image")) == 30


def test_oracles_are_values_of_one_image(recipe, run, tmp_path):
    assembly = Assembly(load_recipe(recipe), run)
    values = DataValues(assembly, assembly.data, tmp_path)
    drawn = oracle(values, ["small", "group", "photo"], 40, seed=3)
    assert drawn["small"].shape == (40, 3, 4, 4) and drawn["group"].shape == (40,)
    expected = torch.nn.functional.avg_pool2d(drawn["photo"], 4)  # two halvings by box filters
    assert torch.allclose(drawn["small"], expected, atol=1e-5)
    pixels = values.pixels(range(16))
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
    assert list(Sweep.parse("a.b=1,2").overrides()) == [(1, {"a": {"b": 1}}), (2, {"a": {"b": 2}})]


# ---------------------------------------------------------------- tables


def row(label: str, *values: float, judge: str = "j", count: int = 100) -> Measured:
    about = [{"count": count, "gflops": 1.0, "seconds per image": 0.5, "seed": s} for s in range(len(values))]
    figures = [
        [Figure(metric="kid", value=v, low=v - 0.00196, high=v + 0.00196, reference="d", count=count, encoder=judge,
                seed=s)]
        for s, v in enumerate(values)
    ]  # fmt: skip
    return Measured(label, about, figures)


def test_links_costs_add_up_to_the_whole():
    rows = [row("the whole chain", 0.03), row("clip from the data", 0.02), row("clip, small from the data", 0.005)]
    table = link_costs(Results("links", "links", rows), ["clip", "small"])
    values = [float(line[1].split(" ")[0]) for line in table[1:]]
    assert values == [10.0, 15.0, 5.0, 30.0]
    assert table[1][1] == "10.0 ± 2.77"  # 1000 x 1.96 x sqrt(2) x 0.001


def test_errors_come_of_seeds_or_of_the_figures_own_intervals():
    # Intervals of half-width 1.96 x 0.001 on each: 0.001 / sqrt(4). Scatter 0, then large.
    assert row("a", 0.02, 0.02, 0.02, 0.02).error("kid", "j") == pytest.approx(0.001 / 2, rel=1e-3)
    assert row("a", 0.01, 0.03).error("kid", "j") == pytest.approx(0.01)


def test_unlike_figures_have_no_difference():
    with pytest.raises(UserError, match="count is 100 in one and 200 in the other"):
        difference(row("a", 0.02), row("b", 0.01, count=200), "kid", "j")


def test_numbers_have_three_digits_and_tables_are_markdown():
    assert [number(v) for v in (0.0123456, 1.5, 123.4, 98765.4, 0.0, -2.0)] == [
        "0.0123", "1.50", "123", "98765", "0", "-2.00",
    ]  # fmt: skip
    text = markdown(figures_table(Results("t", "main", [row("a", 0.02, 0.03)])))
    assert text.splitlines()[0] == "| row | KID x1000 j | samples | GFLOP a sample | images/s |"
    assert "| a | 25.0 ± 9.80 | 2 x 100 | 1.00 | 2.00 |" in text
