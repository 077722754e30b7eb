"""Recipes with one thing wrong, and what is said: where, what, the nearest valid name. Never a traceback."""

# ruff: noqa: E501 (a table of mistakes has one a line)

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

import pytest
from recipe_text import LINES, changed, message, write

from chaindiff import cli
from chaindiff.specs.link import LinkSpec
from chaindiff.specs.load import load_recipe


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refused(capsys):
    """`chaindiff COMMAND r.yaml ...`, which must end with one message and status 2: the message."""

    def call(*arguments: str, file: str = "r.yaml") -> str:
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        out, err = capsys.readouterr()
        assert (ended.value.code, out) == (2, "")
        assert err.startswith("error: ") and file in err and "Traceback" not in err
        assert len(err) < 5000
        return err

    return call


# ---------------------------------------------------------------- files

# A bomb of seven doublings of a tenfold list, and aliases that build depth rather than size.
BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 8)
)
TOWER = "a0: &a0 {b: 1}\n" + "".join(f"a{i}: &a{i} {{b: *a{i - 1}}}\n" for i in range(1, 80))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "r.yaml: is empty"),
        (b"# only a comment\n", "r.yaml: is empty"),
        (b"- a\n- b\n", "r.yaml:1: should hold fields (`name: value`), not a list"),
        (b"hello", "r.yaml:1: should hold fields (`name: value`), not 'hello'"),
        (b"name: a\n\x89PNG\r\n\x1a\n", "r.yaml:2: is not a text file in UTF-8"),
        (b"name: a\nb: \x00\n", "r.yaml:2: contains the control character '\\x00', so it is not text"),
        (b"name: a\ndata:\n\tpath: x\n", "r.yaml:3: a tab cannot indent YAML; use spaces"),
        (b"name: a\ndata: {}\nname: b\n", "r.yaml:3: 'name' is given twice; first at r.yaml:1"),
        (b"name: a\ndata: {path: [}\n", "r.yaml:2: is not valid YAML: did not find expected node content"),
        (b"name: 'a\n\n", "is not valid YAML: found unexpected end of stream"),
        (b"a: *b\n", "r.yaml:1: the alias *b is undefined: no &b ends before it"),
        (b"a: &a\n  b: *a\n", "r.yaml:2: the alias *a is undefined"),
        (BOMB.encode(), "r.yaml:5: holds more than 100000 values, counting what aliases repeat"),
        (TOWER.encode(), "is nested more than 50 levels deep"),
        (b"a: " + b"[" * 400_000, "r.yaml:1: is nested more than 50 levels deep"),
        (b"a: " + b"{b: " * 60, "r.yaml:1: is nested more than 50 levels deep"),
        (b"a: " + b"x" * 1_000_001, "r.yaml: is larger than 1 MB"),
        (b"a: 1\n---\nb: 2\n", "r.yaml:2: holds more than one document (`---`)"),
        (b"a: 1\nb: !!python/object/apply:os.system [ls]\n", "r.yaml:2: the tag 'tag:yaml.org,2002:python/object"),
        (b"? [a, b]\n: 1\n", "r.yaml:1: a field's name should be plain text"),
        (b"a: &a {b: 1}\nc:\n  <<: *a\n", "r.yaml:3: merge keys (`<<`) are not read"),
        (b"a: " + b"9" * 5000, "r.yaml:1: is too large: whole numbers"),
        (b"a: 0x" + b"F" * 5000, "r.yaml:1: is too large: whole numbers"),
        (b"a: -9223372036854775809", "r.yaml:1: is too large: whole numbers"),
        (b"a: " + b"[" * 10_000_000, "r.yaml: is larger than 1 MB"),
        (LINES.encode("utf-16"), "r.yaml:1: is not a text file in UTF-8\n  save it in UTF-8"),
        (LINES.encode("utf-16-le"), "r.yaml:1: contains the control character '\\x00', so it is not text"),
        ("name: a\ndescription: caf\u00e9\n".encode("latin-1"), "r.yaml:2: is not a text file in UTF-8"),
        ("name: a\nb: \u0081\n".encode(), "r.yaml:2: contains the control character '\\x81', so it is not text"),
        ("name: a\nb: \uffff\n".encode(), "r.yaml:2: contains the control character '\\uffff', so it is not text"),
        (b"a: &a [1, *a]\n", "r.yaml:1: the alias *a is undefined"),
        (b"a: 1\n!!python/name:os.system b: 2\n", "r.yaml:2: the tag 'tag:yaml.org,2002:python/name:os.system' has no"),
        (b"a: !!int '3'\n", "r.yaml:1: the tag 'tag:yaml.org,2002:int' has no meaning here"),
        (b"a: 1\n  b: 2\n", "r.yaml:2: is not valid YAML: mapping values are not allowed"),
        (b"name:small\n", "r.yaml:1: should hold fields (`name: value`), not 'name:small'"),
        (b"~\n", "r.yaml:1: should hold fields (`name: value`), not nothing"),
        (b"%YAML 9.9\n---\na: 1\n", "r.yaml:1: is not valid YAML: found incompatible YAML document"),
        (b"x" * 900_000, "not 'xxx"),
        (b"a: " + b"x" * 900_000, "r.yaml:1: unknown field 'a'"),
        (b"? " + b"x" * 900_000 + b"\n: 1\n", "r.yaml:1: unknown field 'xxx"),
        (b'"[key]": 1\n', "r.yaml:1: unknown field '[key]'"),
    ],
    ids=lambda value: repr(value[:40]),
)
def test_files_that_are_no_recipe(here, refused, content, expected):
    (here / "r.yaml").write_bytes(content)
    assert expected in refused("show", "r.yaml")


def test_what_lies_in_the_place_of_a_file(here, refused):
    (here / "r.yaml").mkdir()
    assert "error: r.yaml is a directory, not a recipe\n" in refused("show", "r.yaml")
    (here / "loop.yaml").symlink_to("loop.yaml")
    assert "error: loop.yaml cannot be read: Too many levels of symbolic links" in refused(
        "show", "loop.yaml", file="loop.yaml"
    )
    (here / "gone.yaml").symlink_to("nowhere.yaml")
    assert "error: gone.yaml is a link to nowhere.yaml, which does not exist" in refused(
        "show", "gone.yaml", file="gone.yaml"
    )
    os.mkfifo(here / "pipe.yaml")
    assert "error: pipe.yaml is not a regular file" in refused("show", "pipe.yaml", file="pipe.yaml")
    (here / "a_run").mkdir()
    text = refused("show", "a_run", file="a_run")
    assert text == (
        "error: a_run is a directory without recipe.lock.yaml, so it is not a run\n"
        "  name a recipe, or the directory of a run\n"
    )
    assert "there is no recipe 'nowhere.yaml'" in refused("show", "nowhere.yaml", file="nowhere.yaml")


def test_a_file_without_permission(monkeypatch, refused):
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.chdir(folder)
        os.chmod(folder, 0o755)
        write(Path(folder), LINES).chmod(stat.S_IWUSR)
        user = os.geteuid()
        os.seteuid(user or 65534)  # the superuser may read anything, so become nobody
        try:
            assert refused("show", "r.yaml") == "error: r.yaml: cannot be read: Permission denied\n"
        finally:
            os.seteuid(user)
            monkeypatch.undo()


def test_a_card_is_no_recipe_and_a_recipe_is_no_card(here, refused):
    write(here, "network: {kind: unet}\ntrain: {images: 5}\n", "stages/card.yaml")
    assert refused("show", "stages/card.yaml", file="card.yaml") == (
        "error: stages/card.yaml:1: is a stage card, not a recipe\n  a stage of a recipe takes it by `use: card`\n"
    )
    write(here, LINES, "stages/whole.yaml")
    write(here, changed("given: [clip]", "use: whole"))
    assert refused("show", "r.yaml", file="stages/whole.yaml") == (
        "error: stages/whole.yaml:1: is a recipe, not a stage card: it has a field 'data'\n"
        "  copy the stage that you want into a stage card\n"
    )
    write(here, "", "stages/empty.yaml")
    write(here, changed("given: [clip]", "use: empty"))
    assert refused("show", "r.yaml", file="stages/empty.yaml") == "error: stages/empty.yaml: is empty\n"
    (here / "stages" / "folder.yaml").mkdir()
    write(here, changed("given: [clip]", "use: folder.yaml"))
    assert "r.yaml:17: folder.yaml is a directory, not a card" in refused("show", "r.yaml")


def test_very_many_encoders_in_a_row(here, refused):
    chain = "".join(
        f"  v{i}: {{kind: image, shape: [3, 8, 8], encoder: {{kind: resize, of: v{i - 1}}}}}\n" for i in range(1, 1500)
    )
    write(
        here,
        changed(
            "  category: ",
            "  v0: {kind: image, shape: [3, 8, 8], encoder: {kind: resize, of: image}}\n" + chain + "  category: ",
        ),
    )
    assert "encoders are chained more than 50 deep" in refused("show", "r.yaml")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ["--want", "category"],
            "r.yaml: nothing can produce 'category': no stage, encoder or source produces 'category'",
        ),
        ([], "r.yaml: nothing can produce 'image': stage 'image' needs 'clip'; stage 'clip' needs 'category'; "),
        (
            ["--set", "variables.category.source=uniform", "--given", "image16=x.png"],
            "r.yaml: source 'category' would sample 'category' without regard to 'image16', which is given and depends on it",
        ),
    ],
)
def test_requests_that_cannot_be_answered_name_the_recipe(here, refused, options, expected):
    write(here, LINES)
    assert expected in refused("plan", "r.yaml", *options)


@pytest.mark.parametrize("command", ["plan", "sample"])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--want", "imag"], "--want: sample.want.0: there is no variable 'imag'; did you mean 'image'?"),
        (["--given", "clpi=x.npy"], "--given: sample.given.clpi: there is no variable 'clpi'; did you mean 'clip'?"),
        (["--given", "category=9"], "--given: sample.given.category: 9 is not one of 9 classes, numbered from 0"),
    ],
)
def test_requests_of_unknown_things_name_the_option(here, refused, command, options, expected):
    write(here, LINES)
    assert expected in refused(command, "r.yaml", *options, file=options[0])


# ---------------------------------------------------------------- messages


MISTAKES = [
    (changed("model: clip_emoji", "model: clip_emogi"), "r.yaml:8: variables.clip.encoder.model: there is no open_clip model 'clip_emogi'; did you mean 'clip_emoji'?"),
    (changed("model: clip_emoji", "model: hf-hub:ViT-L-14"), "r.yaml:8: variables.clip.encoder.model: expected hf-hub:ORG/NAME or hf-hub:ORG/NAME@REVISION, not 'hf-hub:ViT-L-14'"),
    (changed("model: clip_emoji", "model: ViT-L14"), "r.yaml:8: variables.clip.encoder.model: there is no open_clip model 'ViT-L14'; did you mean 'ViT-L-14'?"),
    # fields and their types
    (changed("name: small\n", ""), "r.yaml:1: missing field 'name'"),
    (changed("  image:\n    given", "  image:\n    gvien"), "r.yaml:17: stages.image: unknown field 'gvien'; did you mean 'given'?"),
    (changed("channels: 32", "chanels: 32"), "r.yaml:20: stages.image.network: unknown field 'chanels'; did you mean 'channels'?"),
    (changed("channels: 32", "width: 32"), "r.yaml:20: stages.image.network: unknown field 'width'; known: kind, arch, channels"),
    (changed("      kind: unet\n", ""), "r.yaml:18: stages.image.network: missing field 'kind'; known: unet, prior"),
    (changed("kind: unet", "kind: unett"), "r.yaml:19: stages.image.network.kind: unknown kind 'unett'; did you mean 'unet'?"),
    (changed("kind: unet", "kind: gan"), "r.yaml:19: stages.image.network.kind: unknown kind 'gan'; known: unet, prior"),
    (changed("{steps: 18}", "{steps: many}"), "r.yaml:24: stages.image.sample.steps: expected a whole number, not 'many'"),
    (changed("{steps: 18}", "{steps: '18'}"), "r.yaml:24: stages.image.sample.steps: expected a whole number, not '18'"),
    (changed("{steps: 18}", "{steps: true}"), "r.yaml:24: stages.image.sample.steps: expected a whole number, not true"),
    (changed("{steps: 18}", "{steps: 1.5}"), "r.yaml:24: stages.image.sample.steps: expected a whole number, not 1.5"),
    (changed("{steps: 18}", "{steps: }"), "r.yaml:24: stages.image.sample.steps: expected a whole number, not nothing"),
    (changed("{steps: 18}", "{steps: 0}"), "r.yaml:24: stages.image.sample.steps: should be above 0, not 0"),
    (changed("{steps: 18}", "{sigma_max: .inf}"), "r.yaml:24: stages.image.sample.sigma_max: should be a finite number, not inf"),
    (changed("{steps: 18}", "{solver: huen}"), "stages.image.sample.solver: 'huen' is not one of euler, heun, dpmpp_2m, ddim; did you mean 'heun'?"),
    (changed("{steps: 18}", "18"), "r.yaml:24: stages.image.sample: expected fields (a mapping), not 18"),
    (changed("[1, 2]", "2"), "r.yaml:21: stages.image.network.mult: expected a list, not 2"),
    (changed("      channels: 32", "      dropout: 1.5"), "r.yaml:20: stages.image.network.dropout: should be at most 1, not 1.5"),
    (changed("{images: 1000}\n    sample", "{images: 1000, optimizer: {betas: [0.9]}}\n    sample"), "r.yaml:23: stages.image.train.optimizer.betas: missing item 2 of the list"),
    (changed("want: [image]", "exact: on"), "r.yaml:25: sample.exact: expected true or false, not 'on'"),
    (changed("want: [image]", "exact: 1"), "r.yaml:25: sample.exact: expected true or false, not 1"),
    (changed("name: small", "name: so small"), "r.yaml:1: name: 'so small' is not a name: letters, digits and underscores"),
    (changed("path: emoji64", "path: 64"), "r.yaml:2: data.path: expected text, not 64"),
    (changed("  category:", "  cate gory:"), "r.yaml:10: variables.cate gory: 'cate gory' is not a name"),
    (changed("{kind: label, shape: [9]}", ""), "r.yaml:10: variables.category: expected fields (a mapping), not nothing"),
    (changed("kind: label", "kind: lable"), "variables.category.kind: 'lable' is not one of image, map, vector, tokens, label, text; did you mean 'label'?"),
    (changed("kind: open_clip", "kind: openclip"), "r.yaml:8: variables.clip.encoder.kind: unknown kind 'openclip'; did you mean 'open_clip'?"),
    (changed("given: [clip]", "given: [{variabel: clip}]"), "r.yaml:17: stages.image.given.0: unknown field 'variabel'; did you mean 'variable'?"),
    (changed("given: [clip]", "given: [{variabel: clip}]"), "r.yaml:17: stages.image.given.0: missing field 'variable'"),
    (changed("given: [clip]", "given: [3]"), "r.yaml:17: stages.image.given.0: expected fields (a mapping), not 3"),
    (changed("given: [clip]", "ues: card"), "r.yaml:17: stages.image: unknown field 'ues'; did you mean 'use'?"),
    (changed("given: [clip]", "generates: [image, clip]"), "stages.image.network.kind: a unet generates one variable, not 2; use a joint network"),
    (changed("name: small", "name: small\nlock: 3"), "r.yaml:2: lock: expected fields (a mapping), not 3"),
    # variables
    (changed("shape: [9]", "shape: [9, 2]"), "r.yaml:10: variables.category.shape: expected [number of classes] for kind label, not [9, 2]"),
    (changed("shape: [3, 32, 32]", "shape: [3, 32, 16]"), "r.yaml:4: variables.image.shape: images are square, not 32 x 16"),
    (changed("model: clip_emoji, of: image", "model: clip_emoji, of: imgae"), "r.yaml:8: variables.clip.encoder.of: there is no variable 'imgae'; did you mean 'image'?"),
    (changed("model: clip_emoji, of: image", "model: clip_emoji, of: category"), "variables.clip.encoder.of: open_clip maps an image or a text to a vector, or an image to a map, not a label to a vector"),
    (changed("resize, of: image", "resize, of: clip"), "r.yaml:9: variables.image16.encoder.of: resize maps an image to an image, not a vector to an image"),
    (changed("resize, of: image", "resize, of: image16"), "r.yaml:9: variables.image16.encoder: encoders form a cycle: image16 -> image16"),
    (changed("[3, 16, 16]", "[1, 16, 16]"), "r.yaml:9: variables.image16.encoder.of: 'image' has 3 channels, but this variable has 1"),
    (changed("[3, 16, 16]", "[3, 64, 64]"), "r.yaml:9: variables.image16.encoder.of: resize only shrinks images, but 'image' is 32 pixels wide"),
    (changed("of: image}\n  image16", "of: image, reduce: {kind: pca, k: 64}}\n  image16"), "variables.clip.encoder.reduce.k: 64 components do not fit a vector of shape [128]"),
    (changed(", encoder: {kind: resize, of: image}}", "}"), "r.yaml:9: variables.image16: images without an encoder are read from the data, and 'image' already is\n  give one"),
    (changed("    encoder: {kind: open_clip, model: clip_emoji, of: image}\n", ""), "r.yaml:5: variables.clip: stage 'clip' trains with 'clip', which needs an encoder: data has no vector"),
    (changed("[3, 32, 32]}", "[3, 32, 32], of: x}"), "r.yaml:4: variables.image.of: only a label, a text or a vector is read from a field"),
    (changed("    shape: [128]", "    shape: [128]\n    source: uniform"), "r.yaml:8: variables.clip.source: only a label can be drawn uniformly"),
    # stages
    (changed("  image:\n    given", "  imgae:\n    given"), "r.yaml:16: stages.imgae: there is no variable 'imgae'; did you mean 'image'?\n  by default a stage generates the variable"),
    (changed("given: [clip]", "generates: [picture]"), "r.yaml:17: stages.image.generates: there is no variable 'picture'"),
    (changed("given: [clip]", "generates: [clip]"), "r.yaml:17: stages.image.generates: stage 'clip' already generates 'clip'"),
    (changed("given: [clip]", "given: [clipp]"), "r.yaml:17: stages.image.given.0: there is no variable 'clipp'; did you mean 'clip'?"),
    (changed("given: [clip]", "given: [clip, image]"), "r.yaml:17: stages.image.given.1: the stage generates 'image' itself, so it cannot be conditioned on it"),
    (changed("given: [clip]", "given:\n    - clip\n    - clip"), "r.yaml:19: stages.image.given.1: 'clip' is given twice"),
    (changed("given: [category]", "given: [image]"), "r.yaml:13: stages.clip.given: stages form a cycle: clip -> image -> clip"),
    (changed("given: [category]", "given: [image16]"), "r.yaml:13: stages.clip.given.0: a prior takes no images"),
    (changed("{kind: label, shape: [9]}", "{kind: text}"), "r.yaml:13: stages.clip.given.0: a network cannot take text; give a variable that encodes 'category'"),
    (changed("{kind: prior, width: 64}", "{kind: unet}"), "r.yaml:14: stages.clip.network.kind: a unet generates images and maps, not a vector; use a prior or a transformer"),
    (changed("  image:\n    given", "  category:\n    given"), "r.yaml:19: stages.category.network.kind: a unet generates images and maps, not a label"),
    (changed("width: 64", "width: 60"), "r.yaml:14: stages.clip.network.width: should be even and a multiple of heads (8), not 60"),
    (changed("[1, 2]", "[1, 2, 2, 2, 2, 2, 2]"), "stages.image.network.mult: 7 levels halve the image 6 times, but 32 pixels do not allow it"),
    (changed("[1, 2]", "[]"), "r.yaml:21: stages.image.network.mult: expected at least 1 item, not 0"),
    (changed("[16]", "[16, 8]"), "r.yaml:22: stages.image.network.attention: 8 is not one of this network's resolutions: 32, 16"),
    (changed("kind: unet", "kind: unet\n      arch: adm").replace("[1, 2]", "[1, 1]"), "r.yaml:21: stages.image.network.channels: adm has attention heads of 64 channels, which does not divide 32"),
    (changed("{steps: 18}", "{guidance: 2}"), "r.yaml:24: stages.image.sample.guidance: 2 needs unconditional predictions, but no link of this stage has `dropout`"),
    (changed("given: [clip]", "given: [{variable: clip, noise: 0.1}]").replace("{steps: 18}", "{links: {clip: {noise: 0.5}}}"), "stages.image.sample.links.clip.noise: 0.5 is above 0.1, the largest level in training"),
    (changed("given: [clip]", "given: [{variable: clip, null: learned}]"), "r.yaml:17: stages.image.given.0.null: is never used"),
    (changed("{steps: 18}", "{sigma_min: 90}"), "stages.image.sample.sigma_min: 90 should be below sigma_max, 80"),
    (changed("{steps: 18}", "{churn: {min: 3, max: 2}}"), "stages.image.sample.churn.min: 3 should not be above churn.max, 2"),
    (changed("{images: 1000}\n    sample", "{images: 1000, batch: 10, accumulate: 3}\n    sample"), "stages.image.train.accumulate: 3 micro-batches do not divide a batch of 10"),
    # sampling
    (changed("want: [image]", "want: [imag]"), "r.yaml:25: sample.want.0: there is no variable 'imag'; did you mean 'image'?"),
    (changed("want: [image]", "given: {categry: 1}"), "r.yaml:25: sample.given.categry: there is no variable 'categry'; did you mean 'category'?"),
    (changed("want: [image]", "given: {category: 9}"), "r.yaml:25: sample.given.category: 9 is not one of 9 classes, numbered from 0"),
]  # fmt: skip


# What a person may well write, and YAML or the schema reads otherwise.
MORE = [
    # shapes and types
    (changed("path: emoji64", "pth: emoji64"), "r.yaml:2: data: unknown field 'pth'; did you mean 'path'?"),
    (changed("data: {path: emoji64}", "data: emoji64"), "r.yaml:2: data: expected fields (a mapping), not 'emoji64'"),
    (changed("path: emoji64", "path: emoji64, where: {style: 3}"), "r.yaml:2: data.where.style: expected text or a list, not 3"),
    (changed("path: emoji64", "path: emoji64, where: {style: [3]}"), "r.yaml:2: data.where.style.0: expected text, not 3"),
    (changed("stages:\n", "stagse:\n"), "r.yaml:11: unknown field 'stagse'; did you mean 'stages'?"),
    (changed("network: {kind: prior, width: 64}", "network: prior"), "r.yaml:14: stages.clip.network: expected fields (a mapping), not 'prior'"),
    (changed("kind: unet", "kind: [unet]"), "r.yaml:19: stages.image.network.kind: unknown kind"),
    (changed("kind: unet", "kind: unet\n      prior: 3"), "r.yaml:20: stages.image.network: unknown field 'prior'; known: kind, arch"),
    (changed("given: [clip]", "given: clip"), "r.yaml:17: stages.image.given: expected a list, not 'clip'"),
    (changed("given: [clip]", "given: {variable: clip}"), "r.yaml:17: stages.image.given: expected a list, not a mapping"),
    (changed("given: [clip]", "given: [[clip]]"), "r.yaml:17: stages.image.given.0: expected fields (a mapping), not a list"),
    (changed("given: [clip]", "given: [~]"), "r.yaml:17: stages.image.given.0: expected fields (a mapping), not nothing"),
    (changed("given: [clip]", "given: [{variable: clip, dropuot: 1}]"), "stages.image.given.0: unknown field 'dropuot'; did you mean 'dropout'?"),
    (changed("given: [clip]", "given: [{variable: clip, null: zero}]"), "stages.image.given.0.null: 'zero' is not one of zeros, learned; did you mean 'zeros'?"),
    (changed("given: [clip]", "given: [{variable: clip, dropout: true}]"), "stages.image.given.0.dropout: expected a number, not true"),
    (changed("given: [clip]", "given: [{variable: clip, dropout: yes}]"), "stages.image.given.0.dropout: expected a number, not 'yes'"),
    (changed("given: [clip]", "given: [{variable: clip, noise: -1}]"), "stages.image.given.0.noise: should be at least 0, not -1"),
    (changed("given: [clip]", "generates: image"), "r.yaml:17: stages.image.generates: expected a list or a mapping of names, not 'image'"),
    (changed("given: [clip]", "generates: []"), "r.yaml:17: stages.image.generates: expected at least 1 item, not 0"),
    (changed("  image:\n    given", "  clip:\n    given"), "r.yaml:16: 'clip' is given twice; first at r.yaml:12"),
    (changed("of: image}\n  image16", "of: image, reduce: {kind: pac, k: 128}}\n  image16"), "variables.clip.encoder.reduce.kind: unknown kind 'pac'; did you mean 'pca'?"),
    (changed("of: image}\n  image16", "of: image, reduce: pca}\n  image16"), "variables.clip.encoder.reduce: expected fields (a mapping), not 'pca'"),
    (changed("name: small", "name: 2024"), "r.yaml:1: name: expected text, not 2024"),
    (changed("name: small", "name:"), "r.yaml:1: name: expected text, not nothing"),
    (changed("name: small", "name: 'a\\nb'"), "r.yaml:1: name: 'a\\\\nb' is not a name"),
    (changed("name: small", "name: " + "x " * 9000), "r.yaml:1: name: 'x x x"),
    (changed("  category:", "  '[key]':"), "r.yaml:10: variables.[key]: '[key]' is not a name"),
    (changed("  category: {kind: label, shape: [9]}", "  '[key]': {kind: 3}"), "r.yaml:10: variables.[key].kind: 3 is not one of image"),
    # numbers
    (changed("{steps: 18}", "{sigma_max: .nan}"), "r.yaml:24: stages.image.sample.sigma_max: should be a finite number, not nan"),
    (changed("{steps: 18}", "{sigma_max: 1e999}"), "r.yaml:24: stages.image.sample.sigma_max: should be a finite number, not inf"),
    (changed("{steps: 18}", "{steps: 1e999}"), "r.yaml:24: stages.image.sample.steps: should be a finite number, not inf"),
    (changed("{steps: 18}", "{steps: .nan}"), "r.yaml:24: stages.image.sample.steps: should be a finite number, not nan"),
    (changed("{steps: 18}", "{steps: -3}"), "r.yaml:24: stages.image.sample.steps: should be above 0, not -3"),
    (changed("{steps: 18}", "{steps: 9_000_000_000}"), "r.yaml:24: stages.image.sample.steps: should be at most 100000, not 9000000000"),
    (changed("{steps: 18}", "{guidance: 0}"), "r.yaml:24: stages.image.sample.guidance: should be above 0, not 0"),
    (changed("{steps: 18}", "{churn: {amuont: 3}}"), "r.yaml:24: stages.image.sample.churn: unknown field 'amuont'; did you mean 'amount'?"),
    (changed("{kind: prior, width: 64}", "{kind: prior, depth: 1000000000}"), "r.yaml:14: stages.clip.network.depth: should be at most 1000, not 1000000000"),
    (changed("channels: 32", "channels: 33"), "r.yaml:20: stages.image.network.channels: should be even, not 33"),
    (changed("shape: [9]", "shape: [10_000_000_000]"), "r.yaml:10: variables.category.shape.0: should be at most 1000000, not 10000000000"),
    (changed("shape: [9]", "shape: [0]"), "r.yaml:10: variables.category.shape.0: should be above 0, not 0"),
    (changed("shape: [9]", "shape: 9"), "r.yaml:10: variables.category.shape: expected a list, not 9"),
    (changed("{images: 1000}\n    sample", "{images: -1}\n    sample"), "r.yaml:23: stages.image.train.images: should be at least 0, not -1"),
    (changed("{images: 1000}\n    sample", "{images: 1000, optimizer: {betas: [0.9, 1.0]}}\n    sample"), "r.yaml:23: stages.image.train.optimizer.betas.1: should be below 1, not 1.0"),
    (changed("{images: 1000}\n    sample", "{images: 1000, optimizer: {betas: [0.9, 0.9, 0.9]}}\n    sample"), "r.yaml:23: stages.image.train.optimizer.betas: expected at most 2 items, not 3"),
    (changed("{images: 1000}\n    sample", "{images: 1000, optimizer: {kind: sgd}}\n    sample"), "r.yaml:23: stages.image.train.optimizer.kind: 'sgd' is not one of adam, adamw"),
    (changed("want: [image]", "count: 1e400"), "r.yaml:25: sample.count: should be a finite number, not inf"),
    (changed("want: [image]", "count: 99999999999999999999999"), "r.yaml:25: is too large: whole numbers"),
    (changed("want: [image]", "batch: 1_000_000_000_000"), "r.yaml:25: sample.batch: should be at most 1000000, not 1000000000000"),
    # variables
    (changed("[3, 32, 32]", "[2, 32, 32]").replace("[3, 16, 16]", "[2, 16, 16]"), "r.yaml:4: variables.image.shape: images of the data have 3 channels (RGB) or 1 (grey), not 2"),
    (changed("[3, 32, 32]}", "[3, 32, 32], source: empirical}"), "r.yaml:4: variables.image.source: only a label can be drawn from the data, not an image"),
    (changed("shape: [9]}", "shape: [9], source: no}"), "r.yaml:10: variables.category.source: 'no' is not one of empirical, uniform, given"),
    (changed("encoder: {kind: resize, of: image}}", "encoder: {kind: resize, of: b}}\n  b: {kind: image, shape: [3, 16, 16], encoder: {kind: resize, of: image16}}"), "encoders form a cycle: image16 -> b -> image16"),
    (changed("of: image}\n  image16", "of: image, interpolation: lanczos}\n  image16"), "variables.clip.encoder.interpolation: 'lanczos' is not one of bilinear, bicubic"),
    # links
    (changed("given: [clip]", "given: [{variable: image16, keep: [1]}]"), "stages.image.given.0.keep: counts the entries of a vector, but 'image16' is an image"),
    (changed("given: [clip]", "given: [{variable: clip, keep: [8, 129]}]"), "stages.image.given.0.keep: 129 is more than the 128 entries of 'clip'"),
    (changed("given: [clip]", "given: [{variable: clip, keep: [0]}]"), "stages.image.given.0.keep: with 0 alone the value is never given"),
    (changed("given: [clip]", "given: [{variable: clip, keep: [8]}]").replace("{steps: 18}", "{links: {clip: {keep: 9}}}"), "stages.image.sample.links.clip.keep: 9 was not trained: it should be in the link's `keep`, one of [8]"),
    (changed("{steps: 18}", "{links: {clip: {keep: 9}}}"), "stages.image.sample.links.clip.keep: 9 was not trained: it should be in the link's `keep`, which this link does not set"),
    (changed("{steps: 18}", "{links: {category: {keep: 9}}}"), "stages.image.sample.links.category: the stage is not given 'category'; known: clip"),
    (changed("{steps: 18}", "{guidance: {clip: 2}}"), "stages.image.sample.guidance.clip: needs a prediction without 'clip', which has no `dropout`"),
    (changed("given: [clip]", "given: [{variable: clip, sample_noise: 0.1}]"), "stages.image.given.0: unknown field 'sample_noise'; it is now sample.links.clip.noise"),
    (changed("{steps: 18}", "{links: {clip: {absent: true}}}"), "stages.image.sample.links.clip.absent: the value is never absent in training"),
    (changed("{steps: 18}", "{links: {clip: {noise: 0.1}}}"), "stages.image.sample.links.clip.noise: 0.1 is above 0, the largest level in training (`noise`)"),
    # sampling
    (changed("want: [image]", "want: image"), "r.yaml:25: sample.want: expected a list, not 'image'"),
    (changed("want: [image]", "wnat: [image]"), "r.yaml:25: sample: unknown field 'wnat'; did you mean 'want'?"),
    (changed("want: [image]", "given: [clip]"), "r.yaml:25: sample.given: expected fields (a mapping), not a list"),
    (changed("want: [image]", "given: {category: -1}"), "r.yaml:25: sample.given.category: -1 is not one of 9 classes, numbered from 0"),
    (changed("want: [image]", "given: {category: true}"), "r.yaml:25: sample.given.category: expected a class's name or number, or a list of them, not true"),
    (changed("want: [image]", "given: {category: [1, [2]]}"), "r.yaml:25: sample.given.category: expected a class's name or number, or a list of them, not a list"),
    (changed("want: [image]", "given: {category: [1, 9]}"), "r.yaml:25: sample.given.category: 9 is not one of 9 classes, numbered from 0"),
    (changed("want: [image]", "given: {category: []}"), "r.yaml:25: sample.given.category: expected a class's name or number, or a list of them, not a list"),
    (changed("want: [image]", "given: {category: }"), "r.yaml:25: sample.given.category: expected a class's name or number, or a list of them, not nothing"),
    (changed("want: [image]", "given: {image: 3}"), "r.yaml:25: sample.given.image: expected a file or folder, not 3"),
    (changed("want: [image]", "given: {clip: [0.1, 0.2]}"), "r.yaml:25: sample.given.clip: expected a file or folder, not a list"),
    # the whole
    (LINES[: LINES.index("stages:")] + "stages: {}\n", "r.yaml:11: stages: a chain needs at least one stage"),
    (LINES[: LINES.index("stages:")] + "stages: []\n", "r.yaml:11: stages: expected fields (a mapping), not a list"),
    (LINES[: LINES.index("    network:\n")], "r.yaml:16: stages.image: missing field 'network'"),
    (LINES[: LINES.index("channels: 32")], "r.yaml:16: stages.image: missing field 'train'"),
]  # fmt: skip


def test_the_unspoiled_recipe_loads(here):
    write(here, LINES)
    assert load_recipe("r.yaml").recipe.stages["image"].given == [LinkSpec(variable="clip")]


@pytest.mark.parametrize(("text", "expected"), MISTAKES + MORE, ids=[expected[:60] for _, expected in MISTAKES + MORE])
def test_mistakes_are_explained_with_their_place(here, refused, text, expected):
    write(here, text)
    assert expected in refused("show", "r.yaml")


def test_all_mistakes_are_listed_at_once(here):
    write(here, LINES.replace("channels", "chanels").replace("steps: 18", "steps: many").replace("name", "nmae"))
    assert message("r.yaml").splitlines() == [
        "4 mistakes",
        "  r.yaml:1: missing field 'name'",
        "  r.yaml:20: stages.image.network: unknown field 'chanels'; did you mean 'channels'?",
        "  r.yaml:24: stages.image.sample.steps: expected a whole number, not 'many'",
        "  r.yaml:1: unknown field 'nmae'; did you mean 'name'?",
    ]


def test_a_long_list_of_mistakes_is_cut(here):
    write(here, LINES + "".join(f"extra{i}: 1\n" for i in range(15)))
    lines = message("r.yaml").splitlines()
    assert lines[0] == "15 mistakes" and lines[-1] == "  and 5 more" and len(lines) == 12
