"""Nothing runs, is fetched or is embedded that the user did not ask for; what is shown cannot move the terminal."""

# ruff: noqa: F811 (`tiny` is a fixture)

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import EpsImagePlugin, Image
from test_encoders import refusal, specs, tiny  # noqa: F401

import chaindiff as cd
from chaindiff import cli
from chaindiff.data import open_data
from chaindiff.encoders import build_encoder
from chaindiff.encoders.clip_config import ClipConfig
from chaindiff.encoders.clip_emoji import CLIP_EMOJI
from chaindiff.encoders.clip_files import pinned
from chaindiff.evaluation.report import sections
from chaindiff.io import tensorfile
from chaindiff.io.digest import file_digest
from chaindiff.io.errors import UserError, in_lines, note
from chaindiff.io.progress import say
from chaindiff.recipe.assembly import Assembly
from chaindiff.recipe.samples import read_image
from chaindiff.specs.load import PACKAGE, load_recipe
from chaindiff.specs.lock import write_lock
from chaindiff.specs.validate import validate
from chaindiff.specs.yaml import wrap

RECIPE = """
name: small
data: {path: emoji64}
variables:
  photo: {kind: image, shape: [3, 64, 64]}
  image: {kind: image, shape: [3, 8, 8], encoder: {kind: resize, of: photo}}
  clip: {kind: vector, shape: [8], encoder: {kind: open_clip, of: photo, model: "hf-hub:org/name"}}
stages:
  image:
    given: [clip]
    network: {kind: unet, channels: 16, mult: [1], blocks: 1, attention: [], dropout: 0.0}
    train: {images: 16, batch: 8}
"""
CODE = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\nclass Evil: pass\n"
COMMITS = "a" * 40, "b" * 40


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(RECIPE)
    note.cache_clear()
    return tmp_path


@pytest.fixture
def chaindiff(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[Any, str, str]]:
    """`chaindiff ...`: its exit status and what it printed."""

    def call(*words: str | Path) -> tuple[Any, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main([*map(str, words)])
        return (ended.value.code, *capsys.readouterr())

    return call


def train(run: Path, scale: float = 1.0, **overrides: Any) -> Path:
    """Weights such as training would leave in a run, with what was fitted for its encoder."""
    assembly = Assembly(load_recipe("small.yaml", **overrides), run)
    part, path = assembly.stages["image"], run / "stages/image/weights.safetensors"
    stage = part.build()
    tensors = {name: scale * tensor for name, tensor in stage.state_dict().items()}
    tensorfile.save(path, tensors, {**part.metadata(), "images": "16"})
    fitted = run / "encoders" / assembly.encoders["clip"].file_name
    tensorfile.save(fitted, {}, {"digest": "fitted"})
    write_lock(run, assembly.recipe, {"weights": {"image": file_digest(path)}})
    return path


# ------------------------------------------------------------ 1. models


def model(folder: Path, source: Path, **text: Any) -> Path:
    """A copy of a model's folder whose configuration says more."""
    shutil.copytree(source, folder)
    said = json.loads((folder / "open_clip_config.json").read_text())
    said["model_cfg"]["text_cfg"] |= text
    (folder / "open_clip_config.json").write_text(json.dumps(said))
    (folder / "evil.py").write_text(CODE)
    return folder


def asks_for_code(folder: Path, file: str, auto: dict[str, Any]) -> None:
    said = json.loads((folder / file).read_text())
    said.pop("tokenizer_class", None)
    (folder / file).write_text(json.dumps(said | {"auto_map": auto, "model_type": "evil"}))


def no_question(*_: object) -> str:
    raise AssertionError("nobody is asked whether code may run")


def test_a_model_folder_does_not_allow_its_own_code(tmp_path: Path) -> None:
    folder = model(tmp_path / "model", CLIP_EMOJI, tokenizer_kwargs={"trust_remote_code": True})
    asks_for_code(folder, "tokenizer_config.json", {"AutoTokenizer": ["evil.Evil", None]})
    said = refusal(lambda: build_encoder("clip", specs(folder, 128, "text", scaling="raw"))(["a cat"]))
    assert "model_cfg.text_cfg.tokenizer_kwargs: unknown field 'trust_remote_code'" in said
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("file, auto", [
    ("tokenizer_config.json", {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}),
    ("config.json", {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}),
])  # fmt: skip
def test_no_code_comes_with_a_tokenizer_or_a_text_model(
    file: str, auto: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", no_question)
    folder = model(tmp_path / "model", CLIP_EMOJI)
    asks_for_code(folder, file, auto)
    encoder = build_encoder("clip", specs(folder, 128, "text", scaling="raw"))
    if file == "config.json":
        said = refusal(lambda: encoder(["a cat"]))
        assert "the model comes with Python code to run, which chaindiff never does" in said
    else:  # transformers has a tokenizer of its own for these files
        assert encoder(["a cat"]).shape == (1, 128)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("place, field, value, message", [
    ("model_cfg.vision_cfg", "timm_model_name", "hf-hub:evil/net", "'hf-hub:evil/net' is not a name"),
    ("model_cfg.vision_cfg", "timm_model_name", "local-dir:/tmp", "'local-dir:/tmp' is not a name"),
    ("model_cfg.text_cfg.tokenizer_kwargs", "cache_dir", "/tmp", "unknown field 'cache_dir'"),
    ("model_cfg.text_cfg", "pretrained", "x", "unknown field 'pretrained'"),
    ("model_cfg", "weights", "x", "unknown field 'weights'"),
    ("preprocess_cfg", "code", "x", "unknown field 'code'"),
])  # fmt: skip
def test_a_configuration_is_data(place: str, field: str, value: str, message: str, tmp_path: Path, tiny: Path) -> None:
    folder = model(tmp_path / "model", tiny, tokenizer_kwargs={})
    said = json.loads((folder / "open_clip_config.json").read_text())
    inner = said
    for part in place.split("."):
        inner = inner[part]
    inner[field] = value
    (folder / "open_clip_config.json").write_text(json.dumps(said))
    assert f"{place}" in (told := refusal(lambda: build_encoder("clip", specs(folder)))) and message in told


def test_what_open_clip_itself_ships_is_allowed() -> None:
    for name in open_clip.list_models():
        validate(ClipConfig, wrap({"model_cfg": open_clip.get_model_config(name)}, name))


@pytest.fixture
def hub(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub that holds two commits of org/name; the branch `main` is at the first."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub/models--org--name"
    for commit in COMMITS:
        shutil.copytree(tiny, repository / "snapshots" / commit)
    path = repository / "snapshots" / COMMITS[1] / "open_clip_model.safetensors"
    tensors, about = tensorfile.load(path)
    tensorfile.save(path, {name: tensor + 1 for name, tensor in tensors.items()}, about)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(COMMITS[0])
    return repository


def test_a_revision_of_the_hub_can_be_pinned(hub: Path, here: Path) -> None:
    def digest(name: str) -> str:
        return build_encoder("clip", specs(name)).files.digest

    first, second = (file_digest(hub / "snapshots" / commit / "open_clip_model.safetensors") for commit in COMMITS)
    assert digest("hf-hub:org/name") == digest(f"hf-hub:org/name@{COMMITS[0]}") == first
    assert digest(f"hf-hub:org/name@{COMMITS[1]}") == second != first
    assert "has its own weights" in refusal(lambda: build_encoder("clip", specs("hf-hub:org/name", pretrained="x")))
    # A run keeps to the commit that it has used, wherever the branch goes.
    used = pinned(load_recipe("small.yaml").recipe.variables["clip"].encoder)
    assert used == f"hf-hub:org/name@{COMMITS[0]}"
    write_lock(here, load_recipe("small.yaml").recipe, {"models": {"clip": used}})
    (hub / "refs/main").write_text(COMMITS[1])
    for source, expected in ((here / "small.yaml", second), (here, first)):
        assert build_encoder("clip", Assembly(load_recipe(source)).coders).files.digest == expected
    other = load_recipe(here, [f"variables.clip.encoder.model=hf-hub:org/name@{COMMITS[1]}"])
    assert build_encoder("clip", Assembly(other).coders).files.digest == second


def test_the_lock_names_the_commit(hub: Path, here: Path) -> None:
    from chaindiff.recipe.execution import lock_of

    assembly = Assembly(load_recipe("small.yaml"), here / "run")
    lock = lock_of(assembly, assembly.chain().plan(["clip"], ["photo"]), {}, {}, {})
    assert lock["models"] == {"clip": f"hf-hub:org/name@{COMMITS[0]}"}


def test_downloads_are_announced(
    tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[str] = []

    def fetch(repository: str, local_files_only: bool = False, **_: Any) -> str:
        if local_files_only:
            raise LocalEntryNotFoundError("not here")
        asked.append(capsys.readouterr().out)
        return str(tiny)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.setattr("open_clip.download_pretrained", lambda tag: fetch("") + "/open_clip_model.safetensors")
    build_encoder("clip", specs("hf-hub:org/name@v1"))
    build_encoder("clip", specs("ViT-B-32", 512, pretrained="openai"))
    assert asked[0] == "downloading the model 'org/name' at v1 from https://huggingface.co/org/name\n"
    assert asked[1].startswith("weights 'openai' of 'ViT-B-32': from https://huggingface.co/timm/vit_base_patch32_clip")
    # The names in a folder's configuration are no wish of the user's.
    folder = model(tiny.with_name("named"), tiny, hf_tokenizer_name="evil/tokenizer")
    refusal(lambda: build_encoder("clip", specs(folder, kind="text", scaling="raw"))(["a cat"]))
    assert len(asked) == 2


# ------------------------------------------------------------ 2. recipes and locks


def test_what_shadows_a_shipped_recipe_is_announced(here: Path, chaindiff: Callable) -> None:
    (here / "vcdm_emoji.yaml").write_text(RECIPE)
    status, out, told = chaindiff("show", "vcdm_emoji", "--json")
    assert (status, json.loads(out)["name"]) == (0, "small")
    assert told == "note: the recipe 'vcdm_emoji' is vcdm_emoji.yaml, not the shipped one of that name\n"
    assert chaindiff("show", "vcdm_emoji")[2] == ""  # once
    assert chaindiff("show", "edm_emoji16")[2] == "" == chaindiff("show", here / "vcdm_emoji.yaml")[2]


def test_what_shadows_a_shipped_card_is_announced(here: Path, chaindiff: Callable) -> None:
    (here / "stages").mkdir()
    copy = Path(shutil.copy(PACKAGE.parent / "stages/ddpmpp_emoji16.yaml", here / "stages"))
    assert chaindiff("show", "vcdm_emoji16")[2] == "", "the same words shadow nothing"
    copy.write_text(copy.read_text() + "# mine\n")
    status, _, told = chaindiff("show", "vcdm_emoji16")
    expected = "note: the card 'ddpmpp_emoji16' is stages/ddpmpp_emoji16.yaml, not the shipped one of that name\n"
    assert (status, told) == (0, expected)


def test_a_shipped_name_runs_no_code(here: Path, chaindiff: Callable) -> None:
    (here / "evil.py").write_text(CODE)
    (here / "vcdm_emoji.yaml").write_text(RECIPE.replace("kind: unet", 'kind: "evil:Evil"').split("channels")[0] + "}")
    text = (here / "vcdm_emoji.yaml").read_text().replace(", }", "}\n    train: {images: 16, batch: 8}\n")
    (here / "vcdm_emoji.yaml").write_text(text)
    for command in ("run", "train", "sample", "plan", "show"):
        status, _, told = chaindiff(command, "vcdm_emoji")
        assert status == (0 if command == "show" else 2) and (command == "show" or "--allow-code" in told)
    assert not (here / "ran").exists()


def test_weights_that_are_not_those_of_the_lock_are_refused(here: Path) -> None:
    run = here / "run"
    path = train(run)
    assert Assembly(load_recipe(run)).stages["image"].weights() == path
    locked = (run / "recipe.lock.yaml").read_text()
    train(run, scale=2)  # somebody's
    (run / "recipe.lock.yaml").write_text(locked)
    part = Assembly(load_recipe(run)).stages["image"]
    told = refusal(part.weights)
    assert "is not the file that this run was made with: its sha256 is" in told and "run/recipe.lock.yaml:" in told
    way = re.search(r"--set (\S+)", told)
    assert way is not None
    assert Assembly(load_recipe(run, [way[1]])).stages["image"].weights() == path
    part.unlock()  # as training does
    assert part.weights() == path == Assembly(load_recipe(run)).stages["image"].weights()
    assert load_recipe(run).recipe == load_recipe("small.yaml").recipe


# ------------------------------------------------------------ 3. images


def test_postscript_is_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", no_question)
    monkeypatch.setattr(EpsImagePlugin.EpsImageFile, "_open", no_question)
    path = tmp_path / "x.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n")
    assert "the format is unknown" in refusal(lambda: open_data(str(tmp_path)).images([0], 8))
    assert "not a readable image" in refusal(lambda: read_image(path))


def test_every_image_is_opened_with_a_list_of_formats(tmp_path: Path) -> None:
    code = {path: path.read_text() for path in (*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "tools").glob("*.py"))}
    assert [path.name for path, text in code.items() for _ in re.findall(r"\bImage\.open\(", text)] == ["images.py"]
    for suffix in ("png", "jpg", "webp", "gif", "bmp", "tiff", "ppm"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / f"x.{suffix}")
    assert open_data(str(tmp_path)).images(range(7), 8).shape == (7, 3, 8, 8)


# ------------------------------------------------------------ 4. places


def test_weights_beside_a_run_are_not_taken(here: Path) -> None:
    planted = train(here / "shared/planted")
    chain = Assembly(load_recipe("small.yaml"), here / "shared/mine")
    assert chain.stages["image"].find_weights() is None
    assert chain.encoders["clip"].path.parent == here / "shared/mine/encoders"
    assert "--set stages.image.weights=RUN" in refusal(chain.stages["image"].weights)
    # Unless the user names the place.
    named = Assembly(load_recipe("small.yaml", ["stages.image.weights=shared/planted"]), here / "shared/mine")
    assert named.stages["image"].weights().resolve() == planted
    assert named.encoders["clip"].path.resolve() == next((here / "shared/planted/encoders").iterdir())


def test_a_run_that_trained_another_stage_is_refused(here: Path) -> None:
    path = train(here / "other", stages={"image": {"train": {"images": 24}}})
    assembly = Assembly(load_recipe("small.yaml", ["stages.image.weights=other"]), here / "mine")
    told = refusal(assembly.stages["image"].weights)
    assert "no stage of the run other was trained like this one, on the same data" in told
    named = load_recipe("small.yaml", [f"stages.image.weights={path}"])
    assert Assembly(named, here / "mine").stages["image"].weights() == path


@pytest.mark.parametrize("file", ["../../secret.png", "{outside}/secret.png", "link.png", "folder/secret.png", "pipe"])
def test_a_page_embeds_files_of_its_own_run_alone(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import os

    run, secret = tmp_path / "run", tmp_path / "secret.png"
    (run / "evaluation").mkdir(parents=True)
    secret.write_bytes(b"secret")
    (run / "evaluation/link.png").symlink_to(secret)
    (run / "evaluation/folder").symlink_to(tmp_path)
    os.mkfifo(run / "evaluation/pipe")
    (run / "evaluation/own.png").write_bytes(b"own")

    def shown(name: str) -> list[bytes]:
        part = {"title": "t", "note": "", "table": [], "pictures": {"x": name}}
        (run / "metrics.json").write_text(json.dumps({"parts": [part], "figures": []}))
        return [picture.png for section in sections(run) for picture in section.pictures]

    assert shown("own.png") == [b"own"]
    assert shown(file.format(outside=tmp_path)) == []
    assert "is no file of this run" in " ".join(capsys.readouterr().out.split())


# ------------------------------------------------------------ 5. the terminal

BAD = "\x1b[2J\x9b31m\x7f\u202egpj\u2066\x07\r\ud800"
QUOTED = r"\x1b[2J\x9b31m\x7f\u202egpj\u2066\x07\r\ud800"


def test_control_characters_are_quoted(capsys: pytest.CaptureFixture[str]) -> None:
    error = UserError(f"a {BAD}", f"b {BAD}", in_lines(f"c {BAD}", "  second line, naïve, 日本"))
    assert str(error) == f"b {QUOTED}: a {QUOTED}\n  c {QUOTED}\n  second line, naïve, 日本"
    say(f"a {BAD}")
    assert capsys.readouterr().out == f"a {QUOTED}\n"


def test_a_name_ends_no_line_of_a_message(here: Path, chaindiff: Callable) -> None:
    """A line that only looks like one of ours: in errors, in what commands say, and in tables."""
    forged = "x\nerror: run this\n  and this"
    assert str(UserError(forged, forged, forged)).count("\n") == 1
    (here / f"{forged}.safetensors").write_bytes(b"none")
    (here / "recipes").mkdir()
    (here / f"recipes/{forged}.yaml").write_text("name: [")
    said = [
        chaindiff("list"),
        chaindiff("sample", "small.yaml", "--set", f"stages.image.weights={forged}.safetensors"),
        chaindiff("show", forged),
        chaindiff("import", f"{forged}.pkl"),
        chaindiff("compare", forged, forged),
    ]
    shown = r"x\nerror: run this\n  and this"
    assert not [(out, error) for _, out, error in said if shown not in out + error]
    assert not [line for _, *texts in said for text in texts for line in text.splitlines() if line == "error: run this"]


def test_an_empty_folder_is_no_folder(here: Path, chaindiff: Callable) -> None:
    """`--out ""`, as of a variable of the shell that is not set, is not the current folder."""
    before = sorted(here.rglob("*"))
    for command in ("run", "train", "sample", "evaluate"):
        status, _, error = chaindiff(command, "small.yaml", "--out", "")
        assert status == 2 and error == (
            "error: the folder's name is empty\n  write its path; a dot is the current folder\n"
        )
    with pytest.raises(UserError, match="the folder's name is empty"):
        cd.load("small.yaml").save("")
    with pytest.raises(UserError, match="the folder's name is empty"):
        Assembly(load_recipe("small.yaml"), "")  # pyright: ignore[reportArgumentType]
    assert sorted(here.rglob("*")) == before


def test_names_of_others_do_not_reach_the_terminal(here: Path, chaindiff: Callable) -> None:
    (here / "data").mkdir()
    (here / "data/\x1b[2J.png").write_bytes(b"none")
    (here / "evil.pkl").write_bytes(b"\x80\x04c__builtin__\x1b[2J\neval\n.")
    (here / "recipes").mkdir()
    (here / "recipes/x\x1b[2J.yaml").write_text("name: a")
    (here / "runs/x\x1b[2J").mkdir(parents=True)
    (here / "runs/x\x1b[2J/recipe.lock.yaml").write_text("name: a")
    said = [
        chaindiff("list"),
        chaindiff("show", "smal"),
        chaindiff("import", "evil.pkl"),
        chaindiff("train", "small.yaml", "--set", "data.path=data", "--set", "data.where={a: b\\e}"),
        chaindiff("compare", "y", "z"),
    ]
    assert not [text for one in said for text in one[1:] if "\x1b" in text]
    assert r"\x1b[2J" in said[0][1] and r"\x1b[2J" in said[2][2]
