"""Files that were cut short, flipped or left behind: they are found, made again or passed over, and said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
import torch
from exact import normal
from safetensors import safe_open
from torch import Tensor

from chaindiff.chain.diffusion import Diffusion
from chaindiff.chain.variable import Variable
from chaindiff.evaluation.report import sections
from chaindiff.io import files, tensorfile
from chaindiff.io.errors import UserError
from chaindiff.io.shards import Shards
from chaindiff.recipe.samples import Samples
from chaindiff.specs.network import PriorSpec
from chaindiff.specs.training import EmaSpec, TrainSpec
from chaindiff.training.loop import train


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


# ------------------------------------------------------------ files that are whole


@pytest.mark.parametrize("write", ["text", "tensors"])
def test_a_file_and_its_folder_are_on_the_disk_before_it_counts(tmp_path, monkeypatch, write) -> None:
    done: list[str] = []
    sync, replace = os.fsync, os.replace

    def synced(handle: int) -> None:
        done.append("folder" if Path(f"/proc/self/fd/{handle}").resolve().is_dir() else "file")
        sync(handle)

    def replaced(before: str, after: str | Path) -> None:
        done.append("rename")
        replace(before, after)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    if write == "text":
        files.write_whole(tmp_path / "new" / "folder" / "x", "text")
    else:
        tensorfile.save(tmp_path / "new" / "folder" / "x", {"a": torch.zeros(3)}, {})
    assert done == ["file", "rename", "folder", "folder", "folder"], "the file, then all folders that had a new entry"


def test_a_temporary_file_is_nobody_elses(tmp_path) -> None:
    """Another user of the folder cannot have it written through a link."""
    (tmp_path / "theirs").write_text("kept")
    (tmp_path / f".x.{os.getpid()}.tmp").symlink_to(tmp_path / "theirs")
    files.write_whole(tmp_path / "x", "new")
    assert (tmp_path / "theirs").read_text() == "kept" and (tmp_path / "x").read_text() == "new"
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o666 & ~os.umask(os.umask(0o22))


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path) -> None:
    program = "import sys, time; from pathlib import Path; from chaindiff.io.files import whole\n"
    program += (
        "with whole(Path(sys.argv[1])) as file: file.write(b'half'); file.flush(); print(flush=True); time.sleep(99)"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", program, tmp_path / name], stdout=subprocess.PIPE)
        for name in ("killed", "living")
    ]
    try:
        for writer in writers:
            assert writer.stdout is not None and writer.stdout.readline()
        writers[0].kill()
        writers[0].wait()
        ours = b'\x40\0\0\0\0\0\0\0{"__metadata__":{"identity":"i"}'
        for name, content, age in [
            (".tmpOldOur", ours, 7200),
            (".tmpNewOur", ours, 0),
            (".tmpOthers", b"\x40\0\0\0\0\0\0\0{", 7200),
            (".notes.tmp", ours, 7200),
        ]:
            (tmp_path / name).write_bytes(content)
            os.utime(tmp_path / name, (time.time() - age,) * 2)
        os.mkfifo(tmp_path / ".x.0123456789abcdef.chaindiff.tmp")
        files.remove_leftovers.cache_clear()
        files.write_whole(tmp_path / "x", "new")
        left = sorted(path.name.partition(".chaindiff")[0][:8] for path in tmp_path.iterdir())
        assert left == sorted([".living.", ".tmpNewO", ".tmpOthe", ".notes.t", ".x.01234", "x"])
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()


# ------------------------------------------------------------ content, not existence


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "text"])
def test_a_damaged_picture_is_no_sample(tmp_path, damage) -> None:
    samples = Samples(tmp_path, [Variable.image("image", 3, 8)], 5, 2)
    for first in (0, 2, 4):
        samples.write(first, {"image": torch.rand(min(2, 5 - first), 3, 8, 8) * 2 - 1})
    samples.write_grids()
    assert samples.complete
    path = tmp_path / "image" / "000003.png"
    content = path.read_bytes()
    if damage == "flipped":
        flip(path, len(content) // 2)
    else:
        path.write_bytes({"empty": b"", "cut": content[:-20], "text": b"no picture"}[damage])
    assert samples.missing() == [range(2, 4)] and not samples.complete
    path.write_bytes(content)
    assert samples.complete
    samples.grids[0].write_bytes(b"")
    assert not samples.complete


def test_a_flipped_bit_in_a_shard_is_found_on_reading(tmp_path) -> None:
    shards = Shards(tmp_path, "key", 6, 2)
    for first in (0, 2, 4):
        shards.write(first, {"a": torch.rand(2, 50), "b": torch.arange(2)})
    assert shards.missing() == []
    whole = shards.path(2).read_bytes()
    said = whole.index(b'"crc32":"') + 9
    for at in (len(whole) - 1, len(whole) - 100, whole.index(b'"key"') + 1, *range(said, said + 8)):
        shards.path(2).write_bytes(whole)
        flip(shards.path(2), at)
        os.utime(shards.path(2), ns=(at, at))
        assert shards.missing() == [range(2, 4)], at
        with pytest.raises(UserError, match=r"000002\.safetensors is missing or damaged"):
            _ = shards["a"][:]
    assert torch.equal(shards["b"][:2], torch.arange(2)), "the others are read"


def test_a_shard_is_looked_into_once(tmp_path, monkeypatch) -> None:
    shards = Shards(tmp_path, "key", 2, 2)
    shards.write(0, {"a": torch.rand(2, 50)})
    for _ in range(5):
        assert len(shards["a"][:]) == 2
    opened: list[Path] = []
    monkeypatch.setattr(tensorfile.zlib, "crc32", lambda *arguments: opened.append(tmp_path))
    assert len(shards["a"][:]) == 2 and not opened


# ------------------------------------------------------------ training states


def stage() -> Diffusion:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Diffusion(Variable.vector("v", 4), network=PriorSpec(kind="prior", width=16, depth=1, heads=2))


def vectors(samples: list[int]) -> dict[str, Tensor]:
    return {"v": torch.stack([normal((4,), "v", s).float() / 2 for s in samples])}


def trained(folder: Path, steps: int = 99, total: int = 64) -> Path:
    """Trains for so many steps of 8 images, to 64 in all, with a checkpoint every 16."""
    spec = TrainSpec(
        images=total, batch=8, execution="eager", log_every=1, checkpoint_every=16, ema=EmaSpec(half_life=16)
    )
    about = {"identity": "i", "total": str(total)}
    for number, _ in enumerate(train(stage(), vectors, spec, folder, total=total, metadata=about), 1):
        if number == steps:
            break
    return folder


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = trained(tmp_path_factory.mktemp("undisturbed"))
    return {path.name: path.read_bytes() for path in folder.glob("*.*") if path.name != "metrics.jsonl"}


def same(folder: Path, expected: dict[str, bytes]) -> None:
    assert {name: (folder / name).read_bytes() for name in expected} == expected


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "missing"])
def test_the_checkpoint_before_a_damaged_one_is_gone_on_from(tmp_path, capsys, undisturbed, damage) -> None:
    trained(tmp_path, steps=5)  # states of 16 and 32 images
    newest, older = tmp_path / "state.safetensors", tmp_path / "state.previous.safetensors"
    content, before = newest.read_bytes(), older.read_bytes()
    assert [tensorfile.metadata(path)["images"] for path in (older, newest)] == ["16", "32"]
    if damage == "flipped":
        flip(newest, len(content) - 7)
    elif damage == "missing":  # killed between two renamings
        newest.unlink()
    else:
        newest.write_bytes({"empty": b"", "cut": content[:-50]}[damage])
    capsys.readouterr()
    trained(tmp_path, steps=2)  # from 16 to 32 again: a damaged file does not become the one before
    said = " ".join(capsys.readouterr().out.split())
    if damage != "missing":
        assert "state.safetensors is not a complete safetensors file: " in said
        assert "training resumes from the previous checkpoint, at 16 images" in said
    assert newest.read_bytes() == content and older.read_bytes() == before
    same(trained(tmp_path), undisturbed)


def test_where_no_checkpoint_is_whole_the_way_out_is_said(tmp_path) -> None:
    trained(tmp_path, steps=5)
    for path in tmp_path.glob("state*"):
        path.write_bytes(b"")
    with pytest.raises(UserError) as error:
        trained(tmp_path)
    assert "state.safetensors is not a complete safetensors file" in error.value.message
    assert "delete it to retrain that stage, and state.previous.safetensors too" in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": "optimizer."}, "is a training state without an optimizer"),
        ({"images": "-8"}, "is damaged: images"),
        ({"images": "72"}, "with an impossible number of images: 72 of 64"),
        ({"images": "9" * 5000}, "is damaged: images"),
        ({"images": "many"}, "is damaged: images"),
        ({"batch": "eight"}, "is damaged: batch"),
        ({"step": 9.0}, "with an impossible number of optimizer steps"),
        ({"step": float("nan")}, "with an impossible number of optimizer steps"),
        ({"step": -1.0}, "with an impossible number of optimizer steps"),
        ({"rename": "optimizer.77.exp_avg"}, "the optimizer's state holds the unknown '77.exp_avg'"),
        ({"rename": "optimizer.x.exp_avg"}, "the optimizer's state holds the unknown 'x.exp_avg'"),
    ],
    ids=range(11),
)
def test_an_impossible_state_is_refused(tmp_path, change, message) -> None:
    trained(tmp_path, steps=5)
    (tmp_path / "state.previous.safetensors").unlink()
    path = tmp_path / "state.safetensors"
    tensors, kept = tensorfile.load(path)
    if "drop" in change:
        tensors = {k: v for k, v in tensors.items() if not k.startswith(change["drop"])}
    elif "step" in change:
        tensors = {k: torch.tensor(change["step"]) if k.endswith(".step") else v for k, v in tensors.items()}
    elif "rename" in change:
        tensors[change["rename"]] = tensors["optimizer.0.exp_avg"]
    else:
        kept |= change
    tensorfile.save(path, tensors, kept)
    with pytest.raises(UserError) as error:
        trained(tmp_path)
    assert message in error.value.message and "delete" in str(error.value.hint)


# ------------------------------------------------------------ figures


def test_damaged_metrics_do_not_keep_training_from_going_on(tmp_path, capsys, undisturbed) -> None:
    trained(tmp_path, steps=5)
    path = tmp_path / "metrics.jsonl"
    odd = ["", "{}", "[1]", "3", '{"images": "8"}', '{"images": null}', '{"images": Infinity}', "{" * 5, "[" * 100_000]
    path.write_bytes("\n".join([*path.read_text().splitlines(), *odd]).encode() + b'\n\xff\xfe\0\n{"images": 3')
    same(trained(tmp_path), undisturbed)
    assert [json.loads(line)["images"] for line in path.read_text().splitlines()] == list(range(8, 65, 8))
    assert "metrics.jsonl: 10 unreadable lines left out" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"parts": 3}', '{"parts": [{"title": "a"}]}', "[" * 100_000, "\ud800",
     '{"parts": [{"title": 1, "note": "", "table": [], "pictures": {}}]}',
     '{"parts": [{"title": "a", "note": "", "table": [], "pictures": {"a": "nowhere.png"}}]}'],
    ids=range(10),
)  # fmt: skip
def test_a_damaged_evaluation_leaves_the_rest_of_the_page(tmp_path, capsys, content) -> None:
    (tmp_path / "metrics.json").write_bytes(content.encode(errors="surrogatepass"))
    assert sections(tmp_path) == []
    assert "evaluate the run again" in " ".join(capsys.readouterr().out.split())


# ------------------------------------------------------------ the same weights, the same bytes

SAVE = """
import sys, torch
from pathlib import Path
from chaindiff.io import tensorfile
tensors = {
    "b": torch.arange(6.0).reshape(2, 3).T, "a": torch.tensor(True), "c": torch.zeros(0, 2), "h": torch.ones(3).half(),
    "l": torch.tensor([2**40]), "d": torch.full((5,), 0.1, dtype=torch.bfloat16), "u": torch.tensor([1, 2, 3]).byte(),
}
names = {"b", "a", "c", "h", "l", "d", "u"}
metadata = {name: name for name in {"identity", "images", "total", "name", "format", "variables"}}
tensorfile.save(Path(sys.argv[1]), {name: tensors[name] for name in names}, {**metadata, "data": {"path": "\\u00fc"}})
"""


def test_the_same_weights_have_the_same_bytes(tmp_path) -> None:
    for seed in "12":
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", SAVE, tmp_path / seed], env=environment, check=True)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    with safe_open(tmp_path / "1", "pt") as file:
        assert {name: file.get_tensor(name).tolist() for name in file.keys()} == {  # noqa: SIM118
            "a": True,
            "b": [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]],
            "c": [],
            "d": [0.10009765625] * 5,
            "h": [1.0] * 3,
            "l": [2**40],
            "u": [1, 2, 3],
        }
        assert file.metadata()["data"] == '{"path": "\\u00fc"}'
    tensors, metadata = tensorfile.load(tmp_path / "1")
    tensorfile.save(tmp_path / "again", tensors, metadata)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "1").read_bytes(), "digests tell where weights come from"


def test_writing_takes_no_second_copy_of_the_tensors(tmp_path) -> None:
    tracemalloc.start()
    try:
        tensorfile.save(tmp_path / "x", {str(i): torch.zeros(1 << 20) for i in range(8)}, {})
        assert tracemalloc.get_traced_memory()[1] < 2e6
    finally:
        tracemalloc.stop()


def test_a_tensor_that_no_file_holds(tmp_path) -> None:
    with pytest.raises(UserError, match=r"cannot write .*: 'a' is of torch\.complex64"):
        tensorfile.save(tmp_path / "x", {"a": torch.zeros(1, dtype=torch.complex64)}, {})
    assert list(tmp_path.iterdir()) == []
