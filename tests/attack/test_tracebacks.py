"""Whatever somebody else's file or a slip of the keyboard says, the answer is one message with a way out."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_bad_files import status

import chaindiff
from chaindiff.encoders.clip_emoji import CLIP_EMOJI
from chaindiff.io import tensorfile
from chaindiff.io.errors import UserError

NOBODY = "~nosuchuser/x"
JUDGED = ("--set", "evaluate.judges=['pixels:2']", "--count", "6")
DEEP = "[" * 100_000


def vector(**encoder: Any) -> tuple[str, ...]:
    """Options by which the stage `image` is given a vector of an encoder."""
    spec = {"kind": "vector", "shape": [4], "encoder": encoder}
    return "--set", f"variables.v={json.dumps(spec)}", "--set", "stages.image.given=[v]", "--stage", "image"


# ---------------------------------------------------------------- paths


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("sample", ("--set", f"stages.image.weights={NOBODY}.safetensors")),
        ("train", ("--stage", "image", "--set", f"stages.image.init={NOBODY}.safetensors", "--fresh")),
        ("train", ("--fresh", "--set", f"data.path={NOBODY}")),
        ("sample", ("--given", f"image={NOBODY}.npy", "--want", "small")),
        ("train", vector(kind="file", path=f"{NOBODY}.npy")),
        ("train", vector(kind="open_clip", of="image", model=NOBODY)),
        ("train", vector(kind="open_clip", of="image", model="ViT-B-32", pretrained=NOBODY)),
    ],
    ids=["weights", "init", "data", "given", "vectors", "model", "pretrained"],
)
def test_a_home_that_is_not_known(explained, recipe, run, command, options):
    message = explained(command, recipe, "--out", run, *options)
    assert f"{NOBODY}" in message and "the home directory is not known" in message
    assert "write the path in full" in message or "tiny.yaml" in message or "--set" in message


def test_a_home_that_is_not_known_of_a_snapshot_and_of_the_cache(explained, recipe, monkeypatch):
    assert f"error: {NOBODY}.pkl: the home directory is not known\n" in explained("import", f"{NOBODY}.pkl")
    monkeypatch.setenv("CHAINDIFF_CACHE", NOBODY)
    assert f"{NOBODY}: the home directory is not known\n" in explained("plan", recipe)


@pytest.mark.parametrize("out", ["", ".", "/"])
def test_a_directory_where_a_file_is_to_be_written(explained, out):
    assert "it is a directory\n  give the name of a file" in explained("schema", "--out", out)


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("sample.rho=1e-308", "rho: 1e-308 is too small"),
        ("sample.rho=0.001", "rho: 0.001 is too small"),
        ("sample.sigma_max=1e308", "sigma_max: should be at most 1e+12"),
        ("train.optimizer.lr=1e300", "lr: should be at most 1e+12"),
    ],
)
def test_numbers_beyond_all_numbers(explained, recipe, setting, expected):
    assert expected in explained("plan", recipe, "--set", f"stages.image.{setting}")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--sweep", "f=[[1]]"), "unknown field 'f'"),
        (("--sweep", "stages.image.sample.steps=[[1]]"), "steps: expected a whole number, not a list"),
        (("--sweep", "stages.image.sample.steps={}"), "steps: expected a whole number"),
        (("--oracle", "image"), "no stage samples 'image'"),
        (("--oracle", "photo"), "no stage samples 'image'"),
        (("--oracle", "nothing"), "'nothing'"),
        (("--judge", f"pixels:{'9' * 5000}"), "expected pixels:SIDE"),
    ],
)
def test_evaluations_that_mean_nothing(explained, recipe, run, options, expected):
    assert expected in explained("evaluate", recipe, "--out", run, *JUDGED, *options)


@pytest.mark.parametrize("text", [r'"a\0b"', r'"~\0"', r'"\ud800/x"'])
def test_paths_that_no_file_can_have(explained, recipe, run, text):
    for field in ("data.path", "stages.image.weights"):
        message = explained("train", recipe, "--out", run, "--stage", "image", "--set", f"{field}={text}", "--fresh")
        assert "no file has such a name" in message or "not valid YAML" in message
    assert explained("sample", recipe, "--out", run, "--want", "small", "--given", f"image={text}")


# ---------------------------------------------------------------- what files say of themselves


def rewrite(path: Path, tensors: Callable[[dict], dict] = dict, **entries: str | None) -> None:
    """Another file in its place, with some entries of its metadata changed or (None) left out."""
    held, kept = load_file(path), tensorfile.metadata(path) | entries
    save_file(tensors(held), path, {name: value for name, value in kept.items() if value is not None})


ENTRIES = [
    {"images": "many"},
    {"images": "-8"},
    {"images": "9" * 5000},
    {"images": "NaN"},
    {"total": "-1"},
    {"total": "x"},
    {"stage": DEEP},
    {"stage": "[]"},
    {"stage": '{"given": 3}'},
    {"stage": '{"given": [3]}'},
    {"variables": DEEP},
    {"variables": '{"image": {"identity": 3}}'},
    {"variables": '{"image": []}'},
    {"sigma_data": "NaN"},
    {"precondition": "3"},
    {"data": "[]"},
]


def said(entries: dict[str, str]) -> str:
    return " ".join(f"{name}={value[:30]}" for name, value in entries.items())


@pytest.mark.parametrize("entries", ENTRIES, ids=said)
def test_metadata_of_weights(explained, recipe, run, monkeypatch, capsys, entries):
    path = run / "stages/image/weights.safetensors"
    rewrite(path, **entries)
    for command in (("train",), ("train", "--more", "8"), ("sample", "--set", f"stages.image.weights={path}")):
        message = explained(command[0], recipe, "--out", run, *command[1:])
        assert f"{path} is damaged: {next(iter(entries))}" in message and "copy or download it again" in message
    (run.parent / "runs").mkdir()
    run.rename(run.parent / "runs/tiny")
    monkeypatch.chdir(run.parent)
    assert status("list", "weights") == 0
    assert "stages/image/weights.safetensors  (not a complete weights file)" in capsys.readouterr().out


@pytest.mark.parametrize("entries", ENTRIES, ids=said)
def test_metadata_of_weights_to_begin_from(explained, recipe, run, tmp_path, entries):
    path = Path(shutil.copy(run / "stages/image/weights.safetensors", tmp_path / "w.safetensors"))
    rewrite(path, **entries)
    message = explained("plan", recipe, "--set", f"stages.image.init={path}")
    assert f"{path} is damaged: {next(iter(entries))}" in message


@pytest.mark.parametrize("entries", [e for e in ENTRIES if "images" in e or "total" in e], ids=said)
def test_metadata_of_a_state(explained, recipe, run, entries):
    path = run / "stages/image/state.safetensors"
    rewrite(path, **entries)
    message = explained("train", recipe, "--stage", "image", "--out", run)
    assert f"{path} is damaged: {next(iter(entries))}" in message and "delete it to retrain" in message


def test_weights_that_do_not_say_how_many_images_they_saw(recipe, run):
    rewrite(run / "stages/image/weights.safetensors", images=None)
    assert status("sample", recipe, "--out", run, "--replace") == 0  # another file, as its digest says


OPTIMIZERS = {
    "a word": ("optimizer.x.step", torch.ones(())),
    "beyond": ("optimizer.9999.step", torch.ones(())),
    "before": ("optimizer.-1.step", torch.ones(())),
    "no name": ("optimizer.0", torch.ones(())),
    "another name": ("optimizer.0.momentum", torch.ones(())),
    "another shape": ("optimizer.0.exp_avg", torch.ones(3)),
    "no moment": ("optimizer.0.exp_avg", None),
    "no step": ("optimizer.0.step", None),
    "several steps": ("optimizer.0.step", torch.ones(3)),
    "a step before the first": ("optimizer.0.step", torch.zeros(())),
    "a step beyond all": ("optimizer.0.step", torch.full((), torch.inf)),
}


@pytest.mark.parametrize("case", OPTIMIZERS)
def test_the_optimizer_of_a_state(explained, recipe, run, case):
    path, (name, value) = run / "stages/image/state.safetensors", OPTIMIZERS[case]
    rewrite(path, lambda held: {k: v for k, v in (held | {name: value}).items() if v is not None}, total="999")
    message = explained("train", recipe, "--stage", "image", "--out", run)
    assert f"{path}: the optimizer's state " in message or f"{path} is a training state with an impossible" in message
    assert "delete it to retrain" in message


@pytest.mark.parametrize(
    "line",
    [b"}", b"3}", b"{}", b'{"images": "x"}', b'[{"images": 3}]', b'{"images": null}', b"\xff\xfe}", b"9" * 5000,
     DEEP.encode(), b'{"images": ' + b"9" * 5000 + b"}"],
    ids=lambda line: repr(line[:15]),
)  # fmt: skip
def test_odd_lines_of_metrics_are_dropped(recipe, run, line):
    path = run / "stages/image/metrics.jsonl"
    before = path.read_bytes()
    path.write_bytes(line + b"\n" + before + line)
    assert status("train", recipe, "--stage", "image", "--out", run, "--more", "4") == 0
    assert path.read_bytes().startswith(before) and path.read_bytes().count(b"\n") == before.count(b"\n") + 1


FIGURE = {"row": "a", "of": "image", "metric": "kid", "value": 1, "reference": "r", "count": 3, "seed": 0}


@pytest.mark.parametrize(
    "content",
    [DEEP, "[]", "3", '{"parts": 3, "figures": []}', '{"parts": [{"title": 3}], "figures": []}',
     json.dumps({"parts": [], "figures": [{**FIGURE, "of": []}]}), json.dumps({"parts": [], "figures": [[]]})],
    ids=lambda text: text[:30],
)  # fmt: skip
def test_a_damaged_evaluation(explained, recipe, run, finished, capsys, content):
    (run / "metrics.json").write_text(content)
    assert "metrics.json: is not the output of an evaluation\n  delete it" in explained("compare", run, finished)
    (run / "report.html").unlink()
    assert status("run", recipe, "--out", run) == 0, "what was sampled is shown all the same"
    assert "the page shows no evaluation: " in capsys.readouterr().out and (run / "report.html").exists()


def test_figures_that_are_not_finite_are_shown(run, finished, capsys):
    for folder in (run, finished.parent / "other"):
        shutil.copytree(finished, folder, dirs_exist_ok=True)
        (folder / "metrics.json").write_text(
            json.dumps({"parts": [], "figures": [{**FIGURE, "value": float("nan"), "encoder": "e"}]})
        )
    assert status("compare", run, folder) == 0 and "nan" in capsys.readouterr().out


def test_a_damaged_figure_of_an_evaluation_is_measured_again(recipe, run, tmp_path):
    for index in range(8):
        shutil.copy(recipe.parent / f"data/{index % 4}.png", tmp_path / f"{index}.png")
    (tmp_path / "dataset.json").write_text(json.dumps([[f"{index}.png", index % 2] for index in range(8)]))
    weights = f"stages.image.weights={run / 'stages/image/weights.safetensors'}"
    options = (f"data.path={tmp_path}", weights, "evaluate.held_out=null", "variables.group.of=group")
    command = ("evaluate", recipe, "--out", run, *JUDGED, *(part for option in options for part in ("--set", option)))
    assert status(*command) == 0
    before = json.loads((run / "metrics.json").read_text())
    for path in (run / "evaluation/figures").iterdir():
        path.write_text(DEEP)
    assert status(*command) == 0
    assert json.loads((run / "metrics.json").read_text()) == before


@pytest.mark.parametrize("content", [DEEP, "[]", "{}", '{"variables": [{}]}', '{"sources": 3, "variables": []}'])
def test_a_damaged_chain(tmp_path, content):
    (tmp_path / "chain.json").write_text(content)
    with pytest.raises(UserError, match=r"chain\.json is not what saving a chain leaves"):
        chaindiff.load(tmp_path)


# ---------------------------------------------------------------- configurations of open_clip


def clip_folder(folder: Path, change: Callable[[dict], Any]) -> Path:
    """The embedded model with another configuration."""
    folder.mkdir()
    for file in CLIP_EMOJI.iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((CLIP_EMOJI / "open_clip_config.json").read_text())
    content = change(config) or config
    (folder / "open_clip_config.json").unlink()
    (folder / "open_clip_config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def put(path: str, value: Any) -> Callable[[dict], None]:
    def change(config: dict) -> None:
        *way, last = path.split(".")
        for key in way:
            config = config[key]
        config[last] = value

    return change


CONFIGS = {
    "preprocess_cfg": [None, [], "x"],
    "preprocess_cfg.mean": [[0.5] * 5, "half", [0.5, 0.5, "x"], [0.5, 0.5, float("nan")], None],
    "preprocess_cfg.std": [[0.5, 0.5, 0], [0.5] * 2],
    "preprocess_cfg.interpolation": ["none", 3],
    "model_cfg": [None, [], {}],
    "model_cfg.embed_dim": [None, "128", 0, -5, 1e9, float("nan"), 10**30],
    "model_cfg.vision_cfg": [None, [], 3],
    "model_cfg.vision_cfg.image_size": [0, -5, "96", float("nan"), [96], [96, 0], None, 10**9],
    "model_cfg.vision_cfg.layers": [10**9],
    "model_cfg.text_cfg": [None, 3],
}


@pytest.mark.parametrize(
    ("entry", "value"), [(k, v) for k, values in CONFIGS.items() for v in values], ids=lambda v: str(v)[:20]
)
def test_a_configuration_of_open_clip(explained, recipe, run, tmp_path, entry, value):
    folder = clip_folder(tmp_path / "clip", put(entry, value))
    message = explained("train", recipe, "--out", run, *vector(kind="open_clip", of="image", model=str(folder)))
    detail = message.partition(f"{folder}/open_clip_config.json is not a model's configuration: ")[2]
    assert any(word in detail for word in ("_cfg", "embed_dim", entry.split(".")[-1]))
    message = explained("evaluate", recipe, "--out", run, *JUDGED, "--judge", f"open_clip:{folder}")
    assert "open_clip_config.json is not a model's configuration: " in message


@pytest.mark.parametrize("content", [DEEP, "", "null", '{"model_cfg": {"embed_dim": 1, "embed_dim": ' + "9" * 5000])
def test_a_configuration_of_open_clip_that_is_none(explained, recipe, run, tmp_path, content):
    folder = clip_folder(tmp_path / "clip", lambda _: content or " ")
    message = explained("train", recipe, "--out", run, *vector(kind="open_clip", of="image", model=str(folder)))
    assert f"{folder}/open_clip_config.json is not a model's configuration: " in message


# ---------------------------------------------------------------- pickles, vectors, labels


@pytest.mark.parametrize("protocol", [2, 4])
def test_integers_of_thousands_of_digits_in_a_pickle(explained, tmp_path, protocol):
    for value in (10**5000, -(10**5000), {"ema": 10**400}, {10**5000: 1}):
        (tmp_path / "x.pkl").write_bytes(pickle.dumps(value, protocol))
        assert "a whole number of " in explained("import", tmp_path / "x.pkl")


def test_names_of_vectors_that_nest_too_deep(explained, recipe, run, tmp_path):
    save_file({"features": torch.zeros(4, 4)}, tmp_path / "v.safetensors", {"names": DEEP})
    message = explained("train", recipe, "--out", run, *vector(kind="file", path=str(tmp_path / "v.safetensors")))
    assert "v.safetensors is not a complete file of numbers: " in message


def test_classes_of_thousands_of_digits(recipe, run, tmp_path):
    data = Path(shutil.copytree(recipe.parent / "data", tmp_path / "data"))
    rows = [{"file_name": f"{i}.png", "group": str(i % 2) * 5000} for i in range(4)]
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert status("sample", recipe, "--out", run, "--set", f"data.path={data}", "--given", "group=1") in (0, 2)


def test_arrays_with_odd_headers(explained, recipe, run, tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((1, 3, 8, 8)))
    content = (tmp_path / "x.npy").read_bytes()
    for old, new in ((b"(1, 3, 8, 8)", b"(1, 3, 8, -8"), (b"False", b"[[[[["), (b"<f8", b"<O8"), (b"<f8", b"<M8")):
        (tmp_path / "x.npy").write_bytes(content.replace(old, new))
        given = f"image={tmp_path / 'x.npy'}"
        assert "x.npy" in explained("sample", recipe, "--out", run, "--want", "small", "--given", given)
