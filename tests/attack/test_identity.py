"""Nothing is silently something else: encoders and data are known by what they hold, not by where they lie."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import chaindiff as cd
from chaindiff import cli
from chaindiff.chain.variable import Variable
from chaindiff.data import open_data
from chaindiff.encoders import build_encoder
from chaindiff.io import tensorfile
from chaindiff.io.digest import file_digest
from chaindiff.io.errors import UserError
from chaindiff.recipe.assembly import Assembly
from chaindiff.recipe.given import read_given
from chaindiff.specs.load import load_recipe
from chaindiff.specs.training import AugmentSpec
from chaindiff.training.cache import EmbeddingCache

IMAGES = 9
MODEL = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 8, "layers": 1, "width": 16, "patch_size": 8, "head_width": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
WEIGHTS = "open_clip_model.safetensors"
VECTORS = {"kind": "file", "path": "clip.safetensors", "scaling": "raw"}
RECIPE = """\
name: chain
data: {path: images}
variables:
  image: {kind: image, shape: [3, 8, 8]}
  clip: {kind: vector, shape: [8], encoder: {kind: open_clip, of: image, model: models/one, scaling: raw}}
stages:
  clip:
    network: {kind: prior, width: 16, depth: 1, heads: 2}
    augment: {flip: false}
    train: {images: 16, batch: 8, execution: eager}
    sample: {steps: 2}
  image:
    given: [clip]
    network: {kind: unet, channels: 16, mult: [1], blocks: 1, attention: []}
    augment: {flip: false}
    train: {images: 16, batch: 8, execution: eager}
    sample: {steps: 2}
sample: {count: 2, batch: 2, execution: eager}
"""


def picture(path: Path, seed: int) -> None:
    """An image file whose size says nothing of its content."""
    path.write_bytes(b"P6 8 8 255\n" + np.random.default_rng(seed).bytes(8 * 8 * 3))


def model(folder: Path, seed: int) -> None:
    import open_clip

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": MODEL}))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        save_file(open_clip.CLIP(**MODEL).state_dict(), folder / WEIGHTS)


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    model(folder / "one", 0)
    model(folder / "two", 1)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch, models) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(models, "models")
    Path("images").mkdir()
    for seed in range(IMAGES):
        picture(Path(f"images/{seed}.ppm"), seed)
    for seed, name in enumerate(("clip", "other")):
        save_file({"features": torch.from_numpy(np.random.default_rng(seed).normal(0, 0.5, (IMAGES, 8))).float()},
                  f"{name}.safetensors")  # fmt: skip
    Path("r.yaml").write_text(RECIPE)
    return tmp_path


def assembly(**encoder) -> Assembly:
    return Assembly(load_recipe("r.yaml", changes=[f"variables.clip.encoder.{k}={v}" for k, v in encoder.items()]))


def from_file() -> None:
    """The recipe with vectors of a file in place of an encoder."""
    said = json.dumps(VECTORS)
    Path("r.yaml").write_text(RECIPE.replace("{kind: open_clip, of: image, model: models/one, scaling: raw}", said))


def chaindiff(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    return ended.value.code


def overwrite(path: Path, write) -> None:
    """Other content in the same file, of the same size and time."""
    before = path.stat()
    write(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size


def contents() -> dict[str, str]:
    return {str(path): file_digest(path) for path in Path("runs").rglob("*.safetensors")}


# ------------------------------------------------------------ encoders (item 11)


def test_other_encoder_weights_at_the_same_path_are_refused(here, capsys) -> None:
    assert chaindiff("train", "r.yaml") == 0
    before = contents()
    overwrite(Path("models/one") / WEIGHTS, lambda path: shutil.copyfile(Path("models/two") / WEIGHTS, path))
    for command in (["sample"], ["run"], ["train"], ["train", "--more", "16"], ["evaluate"]):
        capsys.readouterr()
        assert chaindiff(command[0], "r.yaml", *command[1:]) == 2, command
        assert "the weights of the encoder of 'clip'" in capsys.readouterr().err
    with pytest.raises(UserError, match="the weights of the encoder of 'clip'"):
        assembly().chain(["image"])
    assert contents() == before


def test_the_same_encoder_at_another_path_is_the_same(here) -> None:
    assert chaindiff("train", "r.yaml") == 0
    shutil.copytree("models/one", "elsewhere/model")
    moved = assembly(model="elsewhere/model")
    assert moved.variables["clip"].identity == assembly().variables["clip"].identity
    assert moved.stages["image"].weights() == assembly().stages["image"].weights()
    assert assembly(model=here / "models/one").stages["image"].find_weights() is not None
    assert assembly(model="models/two").stages["image"].find_weights() is None
    assert assembly(model="clip_emoji").variables["clip"].identity != assembly().variables["clip"].identity


def test_a_weights_file_of_a_named_model_is_known_by_its_content(here) -> None:
    shutil.copyfile(Path("models/two") / WEIGHTS, "a.safetensors")
    shutil.copyfile(Path("models/two") / WEIGHTS, "b.safetensors")
    one, same, tag = (assembly(model="ViT-B-32", pretrained=p) for p in ("a.safetensors", "b.safetensors", "openai"))
    assert one.variables["clip"].identity == same.variables["clip"].identity != tag.variables["clip"].identity
    assert one.encoders["clip"].files == same.encoders["clip"].files != assembly().encoders["clip"].files
    assert tag.encoders["clip"].files == {}, "nothing is fetched to tell"


@pytest.mark.parametrize("name", ["open_clip_config.json", "tokenizer.json", "vocab.txt", "config.json"])
def test_tokenizer_and_configuration_belong_to_an_encoder(here, name) -> None:
    Path("r.yaml").write_text(
        RECIPE.replace("  clip: {kind", "  text: {kind: text}\n  clip: {kind", 1).replace("of: image,", "of: text,")
    )
    (Path("models/one") / name).touch()
    before = assembly().encoders["clip"].files
    features = build_encoder("clip", assembly().recipe.variables).features_identity if "clip_config" not in name else {}
    with (Path("models/one") / name).open("a") as file:
        file.write("\n")
    assert assembly().encoders["clip"].files != before
    if features:
        assert build_encoder("clip", assembly().recipe.variables).features_identity != features


def test_other_vectors_at_the_same_path_are_refused(here, capsys) -> None:
    from_file()
    assert chaindiff("train", "r.yaml") == 0
    overwrite(Path("clip.safetensors"), lambda path: shutil.copyfile("other.safetensors", path))
    for command in ("sample", "run", "train"):
        capsys.readouterr()
        assert chaindiff(command, "r.yaml") == 2
        assert "the vectors of 'clip'" in capsys.readouterr().err
    Path("clip.safetensors").unlink()  # weights are used without the vectors
    assert chaindiff("sample", "r.yaml") == 0


def test_statistics_of_another_fit_are_refused(here) -> None:
    Path("r.yaml").write_text(RECIPE.replace(", scaling: raw", ""))
    assert chaindiff("train", "r.yaml") == 0
    path = assembly().encoders["clip"].path
    tensors, kept = tensorfile.load(path)
    tensorfile.save(path, tensors, {**kept, "digest": "0" * 64})
    with pytest.raises(UserError, match="the statistics of 'clip'"):
        assembly().stages["image"].weights()


def test_given_numbers_that_say_they_are_of_another_encoder_are_refused(here) -> None:
    assert chaindiff("run", "r.yaml", "--set", "sample.want=[image, clip]") == 0
    sampled = Path("runs/chain/samples/clip/000000.safetensors")
    assert len(read_given(assembly(), {"clip": str(sampled)})["clip"]) == 2
    for identity in ("another's", tensorfile.metadata(sampled)["identity"]):
        save_file(load_file(sampled), "given.safetensors", {"identity": identity})
        with pytest.raises(UserError, match=r"given\.safetensors is of another 'clip'"):
            read_given(assembly(model="models/two"), {"clip": "given.safetensors"})
    save_file(load_file(sampled), "plain.safetensors")
    assert len(read_given(assembly(), {"clip": "plain.safetensors"})["clip"]) == 2


def test_a_file_of_vectors_that_says_what_it_is_is_believed(here) -> None:
    from_file()
    vectors = load_file("clip.safetensors")
    save_file(vectors, "clip.safetensors", {"identity": "dino"})
    names = assembly().data.names
    for said, fits in ((None, True), ("dino", True), ("clip", False)):
        encoder = build_encoder("clip", assembly(**({"identity": said} if said else {})).recipe.variables)
        if fits:
            assert len(encoder.rows_of(names)) == IMAGES
            continue
        with pytest.raises(UserError, match=r"clip\.safetensors says that it holds 'dino', not 'clip'"):
            encoder.rows_of(names)


def test_stages_of_two_encoders_make_no_chain_in_python(here) -> None:
    assert chaindiff("train", "r.yaml", "--stage", "clip") == 0
    other = ("--out", "runs/other", "--set", "variables.clip.encoder.model=models/two")
    assert chaindiff("train", "r.yaml", "--stage", "image", *other) == 0
    clip = cd.load_stage("runs/chain/stages/clip/weights.safetensors")
    image = cd.load_stage("runs/other/stages/image/weights.safetensors")
    assert clip.target.identity == image.given[0].identity
    with pytest.raises(UserError, match="from the rest of the chain: its encoder has other weights"):
        cd.Chain([clip, image])


# ------------------------------------------------------------ data (item 12)


def test_other_images_at_the_same_path_are_other_data(here, capsys) -> None:
    assert chaindiff("train", "r.yaml") == 0
    before = contents()
    overwrite(Path("images/3.ppm"), lambda path: picture(path, 100))
    for command in (["run"], ["train"], ["sample"], ["train", "--more", "16"]):
        capsys.readouterr()
        assert chaindiff(command[0], "r.yaml", *command[1:]) == 2, command
        assert "the data" in capsys.readouterr().err
    assert contents() == before
    assert chaindiff("train", "r.yaml", "--fresh") == 0
    assert contents() != before


def test_continuing_with_fewer_images_is_refused(here, capsys) -> None:
    assert chaindiff("train", "r.yaml") == 0
    Path("images/3.ppm").unlink()
    assert chaindiff("train", "r.yaml", "--more", "16") == 2
    assert f"the data ({IMAGES} rows then, {IMAGES - 1} now)" in capsys.readouterr().err
    shutil.rmtree("images")  # samples need none
    assert chaindiff("sample", "r.yaml") == 0


def test_other_captions_are_other_data_and_the_same_embeddings(here) -> None:
    def metadata(word: str):
        lines = [json.dumps({"file_name": f"{i}.ppm", "caption": f"{word} {i}"}) for i in range(IMAGES)]
        Path("images/metadata.jsonl").write_text("\n".join(lines))
        return open_data("images")

    one, other = metadata("one"), metadata("two")
    assert one.digest == other.digest and one.content != other.content


def test_times_places_and_packing_are_no_content(here) -> None:
    data = open_data("images")
    for path in Path("images").iterdir():
        os.utime(path, (1e9, 1e9))
    shutil.copytree("images", "copy")
    shutil.make_archive("packed", "zip", "images")
    found = {open_data(path).content for path in ("images", "copy", "packed.zip")}
    assert found == {data.content}


def test_images_are_read_once_for_their_digest(here, monkeypatch) -> None:
    from chaindiff.data.sources import Folder

    monkeypatch.setattr("chaindiff.data.sources.SETTLED", -1)
    content, read = open_data("images").content, []
    monkeypatch.setattr(Folder, "read", lambda self, name, own=Folder.read: read.append(name) or own(self, name))
    assert open_data("images").content == content and read == []
    overwrite(Path("images/3.ppm"), lambda path: picture(path, 100))
    assert open_data("images").content != content and read == ["3.ppm"]
    for path in Path(os.environ["CHAINDIFF_CACHE"]).glob("checksums/*"):
        path.write_text('{"3.ppm": 3}')
    assert open_data("images").content != content


def test_a_cache_of_embeddings_is_never_read_for_other_images(here) -> None:
    def cache() -> EmbeddingCache:
        encoder = build_encoder("clip", assembly().recipe.variables)
        return EmbeddingCache(here / "cache", encoder, open_data("images"), AugmentSpec(flip=False), 8)

    list(cache().build())
    assert not cache().missing()
    overwrite(Path("images/3.ppm"), lambda path: picture(path, 100))
    assert cache().missing()


def test_a_file_of_the_same_size_and_time_is_read_again(here) -> None:
    path = Path("models/one") / WEIGHTS
    before = file_digest(path)
    overwrite(path, lambda path: shutil.copyfile(Path("models/two") / WEIGHTS, path))
    assert file_digest(path) != before


def test_training_in_python_goes_on_with_the_same_data_only(here) -> None:
    def train(rows: int, seed: int, images: int) -> None:
        values = torch.from_numpy(np.random.default_rng(seed).normal(0, 0.5, (rows, 4))).float()
        network = {"kind": "prior", "width": 16, "depth": 1, "heads": 2}
        stage = cd.Diffusion(Variable.vector("x", 4), network=network)
        cd.train(stage, {"x": values}, folder="here", images=images, batch=8, execution="eager")

    train(8, 0, 16)
    train(8, 0, 16)
    for rows, seed in ((8, 1), (7, 0)):
        with pytest.raises(UserError, match="the data"):
            train(rows, seed, 16)


# ------------------------------------------------------------ what stays


def test_a_plan_reads_neither_data_nor_weights(here, monkeypatch) -> None:
    assert chaindiff("train", "r.yaml") == 0

    def refuse(*_):
        raise AssertionError("a plan hashes nothing")

    for place in ("io.digest.file_digest", "recipe.encoder.file_digest", "data.sources.Folder.stamps"):
        monkeypatch.setattr(f"chaindiff.{place}", refuse)
    assert chaindiff("plan", "r.yaml") == 0
    assert (
        chaindiff("plan", "r.yaml", "--set", "data.path=nowhere", "--set", "variables.clip.encoder.model=no/where") == 0
    )


def test_weights_from_before_that_say_nothing_of_content_are_taken(here) -> None:
    assert chaindiff("train", "r.yaml") == 0
    for path in Path("runs/chain/stages").glob("*/weights.safetensors"):
        tensors, kept = tensorfile.load(path)
        tensorfile.save(path, tensors, {k: v for k, v in kept.items() if k != "content"})
    overwrite(Path("images/3.ppm"), lambda path: picture(path, 100))
    assert chaindiff("sample", "r.yaml") == 0
