"""`chaindiff compare`: settings that differ, figures side by side, and what is not alike is not passed off as alike."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from chaindiff.commands.compare import ABSENT, compare, differences
from chaindiff.evaluation.provenance import Figure
from chaindiff.io.errors import UserError
from chaindiff.specs.load import load_recipe
from chaindiff.specs.lock import write_lock


def make(name: str, *changes: str, recipe: str = "vcdm_emoji16", figures: list[dict] | None = None) -> Path:
    """A run with a lock and, if there are figures, an evaluation."""
    folder = Path("runs") / name
    folder.mkdir(parents=True)
    write_lock(folder, load_recipe(recipe, changes=list(changes)).recipe, {})
    if figures is not None:
        (folder / "metrics.json").write_text(json.dumps({"parts": [], "figures": figures}))
    return folder


def figure(value: float, seed: int = 0, row: str = "chain", of: str = "image16", **about) -> dict:
    about = {"metric": "kid", "encoder": "j", "reference": "d", "split": "train", "count": 100, **about}
    found = Figure(value=value, low=value - 0.00196, high=value + 0.00196, seed=seed, **about).model_dump()
    return {"row": row, "of": of, "from data": [], **found}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_settings_that_differ_by_their_dotted_names():
    make("a", "name=one", "description=x", "evaluate.count=7")
    make("b", "stages.*.sample.steps=9", "sample.given.clip=p.png", "stages.image16.given.0.dropout=0.5")
    make("c", recipe="edm_emoji16")
    found = compare(["a", "runs/b"])
    assert found.settings == {
        "stages.clip.sample.steps": [18, 9],
        "stages.image16.given.0.dropout": [0.0, 0.5],
        "stages.image16.sample.steps": [10, 9],
        "sample.given.clip": [ABSENT, "p.png"],
    }
    assert str(found).splitlines()[:2] == [
        "setting                         a    runs/b",
        "stages.clip.sample.steps        18   9",
    ]
    assert found.facts()["settings"]["sample.given.clip"] == {"runs/b": "p.png"}
    three = compare(["a", "b", "c"]).settings
    assert three["stages.clip"][2] is ABSENT and three["stages.clip"][0]["sample"]["steps"] == 18
    assert three["stages.image16.sample.steps"] == [10, 9, 10]


def test_lists_are_named_item_by_item_where_they_hold_fields():
    values = [{"g": [{"n": 1, "k": [1]}], "w": [1]}, {"g": [{"n": 2, "k": [1]}], "w": [2]}]
    assert dict(differences(values)) == {"g.0.n": [1, 2], "w": [[1], [2]]}
    assert dict(differences([values[0], {"g": [], "w": [1]}])) == {"g": [values[0]["g"], []]}


def test_figures_are_means_over_seeds():
    make("a", figures=[figure(0.01), figure(0.03, seed=1), figure(0.5, row="steps 1"), figure(0.1, metric="fd")])
    make("b", figures=[figure(0.04, row="other"), figure(0.4, row="steps 1"), figure(0.2, row="only here")])
    found = compare(["a", "b"])
    assert [(f["row"], f["metric"], f["means"], f["unlike"]) for f in found.figures] == [
        ("the chain", "kid", {"a": 0.02, "b": 0.04}, {}),
        ("steps 1", "kid", {"a": 0.5, "b": 0.4}, {}),
    ]
    assert found.figures[0]["seeds"] == {"a": [0, 1], "b": [0]}
    text = str(found).splitlines()
    assert text[0] == "no setting differs"
    assert [" ".join(line.split()) for line in text[3:]] == [
        "the chain KID x1000 j of 'image16' 20.0 ± 19.6 40.0 ± 1.96",
        "steps 1 KID x1000 j of 'image16' 500 ± 1.96 400 ± 1.96",
    ]


@pytest.mark.parametrize(
    ("about", "told"),
    [
        ({"count": 50}, "count 100, 50"),
        ({"reference": "other"}, "reference d, other"),
        ({"encoder_identity": "abc"}, "encoder_identity null, abc"),
        ({"split": "test", "resize": "PIL"}, "split train, test; resize null, PIL"),
    ],
)
def test_figures_that_were_not_measured_alike_say_in_what(about, told):
    make("a", figures=[figure(0.01)])
    make("b", figures=[figure(0.02, **about)])
    found = compare(["a", "b"])
    assert set(found.figures[0]["unlike"]) == set(about)
    head, line = str(found).splitlines()[-2:]
    assert head.endswith("not measured alike") and line.endswith(f"  {told}")


def test_values_from_the_data_are_told():
    make("a", figures=[figure(0.01)])
    make("b", figures=[{**figure(0.01), "from data": ["clip"]}])
    assert compare(["a", "b"]).figures[0]["unlike"] == {"from data": {"a": [], "b": ["clip"]}}


def test_other_variables_are_not_compared():
    make("a", figures=[figure(0.01)])
    make("b", figures=[figure(0.01, of="image")])
    found = compare(["a", "b"])
    assert found.figures == []
    assert found.notes == ["the runs have no figure in common: measure the same variable by the same judges"]


def test_settings_are_shown_of_runs_that_were_not_evaluated():
    make("vcdm_emoji16")
    make("b", "sample.count=3", figures=[figure(0.01)])
    make("c", "sample.count=3")
    text = str(compare(["vcdm_emoji16", "b", "c"]))
    assert text.splitlines() == [
        "setting       vcdm_emoji16  b  c",
        "sample.count  64            3  3",
        "",
        "vcdm_emoji16 was not evaluated; evaluate it: chaindiff evaluate runs/vcdm_emoji16",
        "c was not evaluated; evaluate it: chaindiff evaluate runs/c",
    ]


def refusal(*names: str) -> str:
    with pytest.raises(UserError) as error:
        compare(names)
    return str(error.value)


def test_mistakes():
    make("first")
    folder = make("second")
    Path("empty").mkdir()
    hint = "a run is a directory with recipe.lock.yaml; `chaindiff list runs` shows those under runs"
    assert refusal("frist", "second") == f"there is no run 'frist'; did you mean 'first'?\n  {hint}"
    assert refusal("first", "empty").startswith("there is no run 'empty'; known: first, second")
    for names in (["first"], ["first", "runs/first"]):
        assert refusal(*names) == "compare takes two or more different runs\n  chaindiff compare RUN RUN"
    for broken in ("[", "{}", '{"figures": [{"row": "a"}]}', '{"figures": 3}'):
        (folder / "metrics.json").write_text(broken)
        assert refusal("first", "second") == (
            "runs/second/metrics.json: is not the output of an evaluation\n  delete it and evaluate the run again"
        )


def test_as_json_without_torch():
    make("a", figures=[figure(0.01)])
    make("b", "sample.count=3", figures=[figure(0.02)])
    code = (
        "import sys\nfrom chaindiff.cli import main\ntry: main(['compare', 'a', 'b', '--json'])\n"
        "finally: print([n for n in ('torch', 'numpy', 'PIL') if n in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "[]\n")
    found = json.loads(done.stdout)
    assert found["settings"] == {"sample.count": {"a": 64, "b": 3}} and found["runs"] == ["a", "b"]
    assert found["figures"][0]["means"] == {"a": 0.01, "b": 0.02} and found["notes"] == []
