"""Files that somebody else may have written, at random: one message or success, soon, and nothing else.

Run by hand: `pytest -m slow tests/attack/test_fuzz.py`. CHAINDIFF_FUZZ is how many examples each test tries.
"""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import resource
import shutil
import signal
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file
from test_mutations import NAMES, mutate
from test_tracebacks import CLIP_EMOJI, rewrite

from chaindiff import cli
from chaindiff.io import tensorfile
from chaindiff.specs.yaml import dump, read

pytestmark = pytest.mark.slow
EXAMPLES = int(os.environ.get("CHAINDIFF_FUZZ", "200"))
PATIENCE = 30  # seconds of an example, on a machine with other work
MEBIBYTES = 1500  # that an example may take beyond what any before it took; the first ones import torch's compilers

anything = settings(
    deadline=None, max_examples=EXAMPLES, suppress_health_check=list(HealthCheck), print_blob=True, database=None
)
words = st.sampled_from(
    ["", "0", "-1", "8", "1e308", "NaN", "9" * 5000, "[" * 5000, "\0", "\ud800", "{}", "[]", "null"]
)
leaf = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | words
plain = st.recursive(
    leaf, lambda below: st.lists(below, max_size=3) | st.dictionaries(words | st.text(), below, max_size=3)
)
plain |= st.sampled_from([10**400, -(2**63), 2**53 + 1, 1e-320, float("inf"), ["x"] * 100])


@contextmanager
def soon() -> Iterator[None]:
    """An example that takes too long fails where it is, and one that takes too much memory when it ends."""

    def late(*_: object) -> None:
        raise AssertionError(f"no answer in {PATIENCE} s")

    before, held = signal.signal(signal.SIGALRM, late), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held) >> 10  # the peak, so far: in KiB
    assert grown < MEBIBYTES, f"it took {grown} MiB"


def command(*arguments: str | Path) -> int:
    """Status 0, or 2 and one message; whatever else it raises is a bug."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, soon(), pytest.raises(SystemExit) as ended:
        patch.setattr("sys.stderr", printed)
        cli.main([str(argument) for argument in arguments])
    error = printed.getvalue()
    error.encode()  # what a terminal cannot show would be a traceback there
    assert ended.value.code in (0, 2) and "Traceback" not in error, error
    return ended.value.code


@pytest.fixture
def home(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a run of its own under `runs`."""
    shutil.copytree(finished, tmp_path / "runs/tiny")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def damaged(data: st.DataObject, content: bytes) -> bytes:
    """A few bytes changed, cut or added."""
    made = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        at, action = data.draw(st.integers(0, max(0, len(made) - 1))), data.draw(st.sampled_from("scai"))
        if action == "s" and made:
            made[at] = data.draw(st.integers(0, 255))
        elif action == "c":
            del made[at : at + data.draw(st.integers(1, 40))]
        elif action == "a":
            made = made[:at]
        else:
            made[at:at] = data.draw(st.binary(max_size=8))
    return bytes(made)


# ---------------------------------------------------------------- recipes


@given(data=st.data())
@anything
def test_recipes(home, recipe, data):
    tree = read(recipe).plain()
    for _ in range(data.draw(st.integers(1, 3))):
        mutate(tree, data.draw)
    (home / "r.yaml").write_text(dump(tree), "utf-8", "surrogatepass")
    if command("plan", "r.yaml") == 0 and data.draw(st.booleans()):
        command("sample", "r.yaml", "--count", "1")


numbers = st.sampled_from(
    ["1e-320", "1e-12", "1e-3", "0.5", "1", "3", "100", "1e6", "1e12", "1e300", "0", "-1", ".inf"]
)
FIELDS = ["rho", "sigma_min", "sigma_max", "churn.amount", "churn.min", "churn.max", "churn.noise", "guidance"]
FIELDS += ["eta", "offset", "steps"]


@given(data=st.data())
@anything
def test_numbers_of_samplers(home, recipe, data):
    kinds = {
        "solver": ["euler", "heun", "dpmpp_2m", "ddim"],
        "discretisation": ["edm", "vp", "ve", "iddpm", "time"],
        "schedule": ["linear", "vp", "ve", "iddpm", "cosine", "logsnr", "flow"],
    }
    said = {name: data.draw(st.sampled_from(values)) for name, values in kinds.items()}
    said |= {field: data.draw(numbers) for field in data.draw(st.lists(st.sampled_from(FIELDS), max_size=3))}
    if float(said.get("steps", "2").replace(".inf", "inf")) > 100:
        del said["steps"]
    options = [part for field, value in said.items() for part in ("--set", f"stages.image.sample.{field}={value}")]
    weights = ("--set", f"stages.image.weights={home}/runs/tiny/stages/image/weights.safetensors")
    spread = ("--set", f"variables.group.sigma_data={data.draw(numbers)}") if data.draw(st.booleans()) else ()
    command("sample", recipe, "--out", home / "out", "--count", "1", *options, *weights, *spread)


options = st.sampled_from(["--given", "--set", "--want", "--count", "--seed", "--batch", "--sweep", "--oracle", "--of"])
names = st.sampled_from([*NAMES, "image", "group", "small", "photo", "x"])


@given(data=st.data())
@anything
def test_options(home, recipe, data):
    name = data.draw(
        st.sampled_from(["sample", "plan", "show", "evaluate", "compare", "schema", "list", "ema", "import"])
    )
    said: list[str] = []
    for _ in range(data.draw(st.integers(0, 3))):
        value = data.draw(names) + data.draw(st.sampled_from(["", "=", ".x=", "=["])) + str(data.draw(plain))[:100]
        said += [data.draw(options), value.replace("\0", "").encode("utf-8", "replace").decode()]
    command(name, recipe, *said)


# ---------------------------------------------------------------- weights, states, snapshots

KEYS = ["identity", "images", "total", "stage", "variables", "data", "precondition", "sigma_data", "sigma_rel", "name"]


def entries(data: st.DataObject, kept: dict[str, str]) -> dict[str, str]:
    """Metadata with some entries replaced, or mended only in part."""
    made = dict(kept)
    for key in data.draw(st.lists(st.sampled_from(KEYS), min_size=1, max_size=3)):
        try:
            tree = {"x": json.loads(made.get(key, "3"))}
        except (ValueError, RecursionError):
            tree = {"x": 3}
        how = data.draw(st.sampled_from(["word", "plain", "mutate"]))
        if how == "mutate":
            mutate(tree, data.draw)
        value = tree.get("x") if how == "mutate" else data.draw(plain)
        made[key] = data.draw(words | st.text(max_size=9)) if how == "word" else json.dumps(value, default=str)
    return {k: v.encode("utf-8", "replace").decode() for k, v in made.items()}


@given(data=st.data())
@anything
def test_metadata(home, recipe, finished, data):
    part = data.draw(st.sampled_from(["weights", "state"]))
    path = home / f"runs/tiny/stages/image/{part}.safetensors"
    shutil.copy(finished / f"stages/image/{part}.safetensors", path)
    kept = tensorfile.metadata(path)
    save_file(load_file(path), path, entries(data, kept))
    command("list", "weights")
    if part == "state":
        command("train", recipe, "--stage", "image", "--set", "stages.image.train.images=8")
    else:
        command("sample", recipe, "--set", f"stages.image.weights={path}", "--count", "1")
        command("plan", recipe, "--set", f"stages.image.init={path}")
    shutil.rmtree(home / "runs")
    shutil.copytree(finished, home / "runs/tiny")


@given(data=st.data())
@anything
def test_bytes_of_safetensors(home, recipe, finished, data):
    path = home / "runs/tiny/stages/image/weights.safetensors"
    whole = (finished / "stages/image/weights.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    head = damaged(data, whole[: 8 + length])
    path.write_bytes(head + whole[8 + length :])
    command("list", "weights")
    command("sample", recipe, "--set", f"stages.image.weights={path}", "--count", "1")


@given(data=st.data())
@anything
def test_tensors_of_a_state(home, recipe, finished, data):
    path = home / "runs/tiny/stages/image/state.safetensors"
    shutil.copy(finished / "stages/image/state.safetensors", path)

    def change(held: dict) -> dict:
        for _ in range(data.draw(st.integers(1, 3))):
            key = data.draw(st.sampled_from(sorted(held)))
            how = data.draw(st.sampled_from(["delete", "rename", "shape", "dtype", "value"]))
            value = held.pop(key)
            if how == "rename":
                held[key[:-1] + data.draw(st.sampled_from("09x."))] = value
            elif how == "shape":
                held[key] = value.new_zeros(data.draw(st.lists(st.integers(0, 3), max_size=3)))
            elif how == "dtype":
                held[key] = value.to(
                    data.draw(st.sampled_from([torch.int8, torch.bool, torch.float64, torch.bfloat16]))
                )
            elif how == "value":
                number = torch.tensor(data.draw(st.sampled_from([0.0, -1.0, float("nan"), 1e38])))
                held[key] = torch.zeros_like(value) + number.to(value.dtype)
        return held

    rewrite(path, change, images="4")
    command("train", recipe, "--stage", "image")


# ---------------------------------------------------------------- what is given


@given(data=st.data())
@anything
def test_given_files(home, recipe, data):
    suffix = data.draw(st.sampled_from([".npy", ".safetensors", ".png", ".gif", ".zip", ".jsonl", ""]))
    kinds = ["f4", "f8", "i8", "u1", "?", "c8", "O", "U3", "M8[s]", "i4,f4", "V3", "f2"]
    shape = data.draw(st.sampled_from([(), (3, 8, 8), (1, 3, 8, 8), (2,), (0,), (1, 3, 8, 8, 1)]))
    array = np.zeros(shape, data.draw(st.sampled_from(kinds)))
    held = io.BytesIO()
    np.save(held, array, allow_pickle=True)
    picture = (recipe.parent / "data/0.png").read_bytes()
    dtype = data.draw(st.sampled_from([torch.float32, torch.int64, torch.bool, torch.bfloat16, torch.float8_e4m3fn]))
    tensors = save({data.draw(st.sampled_from(["image", "group", "x", ""])): torch.zeros(shape).to(dtype)})
    content = data.draw(st.sampled_from([held.getvalue(), picture, tensors]))
    if data.draw(st.booleans()):
        content = damaged(data, content)
    (home / f"x{suffix}").write_bytes(content)
    name, want = data.draw(st.sampled_from([("image", "small"), ("group", "image"), ("photo", "small")]))
    weights = [f"stages.{s}.weights={home}/runs/tiny/stages/{s}/weights.safetensors" for s in ("image", "small")]
    chosen = [part for option in weights for part in ("--set", option)]
    command("sample", recipe, "--out", home / "out", "--given", f"{name}={home}/x{suffix}", "--want", want, *chosen)


@given(data=st.data())
@anything
def test_zips(home, recipe, data):
    held = io.BytesIO()
    rows = [{"file_name": f"{index}.png", "group": data.draw(plain)} for index in range(2)]
    with zipfile.ZipFile(held, "w", data.draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))) as archive:
        for index in range(2):
            archive.writestr(f"{index}.png", (recipe.parent / f"data/{index}.png").read_bytes())
        lines = "\n".join(json.dumps(row, default=str) for row in rows)
        archive.writestr(data.draw(st.sampled_from(["metadata.jsonl", "dataset.json", "a/metadata.jsonl"])), lines)
    content = damaged(data, held.getvalue()) if data.draw(st.booleans()) else held.getvalue()
    (home / "data.zip").write_bytes(content)
    command(
        "train", recipe, "--stage", "small", "--fresh", "--out", home / "out", "--set", f"data.path={home}/data.zip"
    )
    command("sample", recipe, "--out", home / "out", "--set", f"data.path={home}/data.zip", "--given", "group=0",
            "--set", f"stages.image.weights={home}/runs/tiny/stages/image/weights.safetensors")  # fmt: skip
    shutil.rmtree(home / "out", ignore_errors=True)


# ---------------------------------------------------------------- models and snapshots


@given(data=st.data())
@anything
def test_configurations_of_open_clip(home, recipe, data):
    folder = home / "clip"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for file in CLIP_EMOJI.iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((CLIP_EMOJI / "open_clip_config.json").read_text())
    changed = copy.deepcopy(config)
    for _ in range(data.draw(st.integers(1, 2))):
        mutate(changed, data.draw)
    (folder / "open_clip_config.json").unlink()
    (folder / "open_clip_config.json").write_text(json.dumps(changed, default=str))
    encoder = {"kind": "open_clip", "of": "photo", "model": str(folder), "reduce": {"kind": "pca", "k": 2}}
    spec = json.dumps({"kind": "vector", "shape": [2], "encoder": encoder})
    chosen = ("--set", f"variables.v={spec}", "--set", "stages.image.given=[v]", "--stage", "image", "--fresh")
    command("train", recipe, "--out", home / "out", *chosen)
    shutil.rmtree(home / "out", ignore_errors=True)


class Made:
    """Stands for an object of a snapshot, pickled as the class of another module."""

    def __init__(self, name: str, arguments: tuple, state: object):
        self.made = name, arguments, state


def pickled(value: object, protocol: int) -> bytes:
    """A pickle of plain data, with globals in the places of `Made`."""
    held = io.BytesIO()

    class Pickler(pickle._Pickler):  # the one in Python, whose methods can be replaced
        def save(self, obj: object, save_persistent_id: bool = True) -> None:  # pyright: ignore
            if not isinstance(obj, Made):
                return super().save(obj, save_persistent_id)
            name, arguments, state = obj.made
            self.write(pickle.GLOBAL + name.encode() + b"\n")
            super().save(arguments)
            self.write(pickle.REDUCE)
            if state is not None:
                super().save(state)
                self.write(pickle.BUILD)
            return None

    Pickler(held, protocol).dump(value)
    return held.getvalue()


globals_ = st.sampled_from(
    [
        *("torch_utils.persistence _reconstruct_persistent_obj", "collections OrderedDict", "builtins set"),
        *("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "torch.storage _load_from_bytes"),
        "dnnlib.util EasyDict",
    ]
)
STATE = ["_init_kwargs", "_init_args", "_parameters", "_modules", "_buffers", "P_mean", "P_std"]


def snapshots(below: st.SearchStrategy) -> st.SearchStrategy:
    state = st.dictionaries(st.sampled_from(STATE), below)
    meta = st.fixed_dictionaries({"class_name": st.sampled_from(["EDMPrecond", "SongUNet", "x"]), "state": state})
    made = st.builds(lambda m: Made("torch_utils.persistence _reconstruct_persistent_obj", (m,), None), meta)
    odd = st.builds(Made, globals_, st.lists(below, max_size=4).map(tuple), st.none() | below)
    return (
        made
        | odd
        | st.lists(below, max_size=3)
        | st.dictionaries(st.sampled_from(["ema", "loss_fn", "x", "model"]), below)
    )


SNAPSHOT = {
    "img_resolution": 8, "img_channels": 3, "label_dim": 0, "model_type": "SongUNet", "model_channels": 8,
    "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [],
}  # fmt: skip


@given(data=st.data())
@anything
def test_snapshots(home, data):
    values = st.recursive(leaf | st.binary(max_size=9) | st.builds(lambda: 10**5000), snapshots, max_leaves=12)
    kwargs = {**SNAPSHOT, data.draw(st.sampled_from([*SNAPSHOT, "sigma_data", "x"])): data.draw(values)}
    state = {"_init_kwargs": kwargs, "_parameters": {}, "_buffers": {}, "_modules": data.draw(values)}
    meta = {"class_name": "EDMPrecond", "state": state}
    ema = Made("torch_utils.persistence _reconstruct_persistent_obj", (meta,), None)
    whole = {"ema": data.draw(st.just(ema) | values), "loss_fn": data.draw(values), "augment_pipe": data.draw(values)}
    content = pickled(whole, data.draw(st.sampled_from([2, 4])))
    if data.draw(st.booleans()):
        content = damaged(data, content)
    (home / "x.pkl").write_bytes(content)
    command("import", "x.pkl", "--out", "w.safetensors")
