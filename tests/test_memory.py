"""Sampling within a limit of memory: what is kept, what fits, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

import chaindiff as cd
from chaindiff.chain.cost import _Peak
from chaindiff.commands.sample import sample
from chaindiff.specs.load import load_recipe

RECIPE, STEPS = "vcdm_emoji16", 2


def held(chain: cd.Chain) -> dict[str, int]:
    """The weights that take memory, by stage."""
    return {name: sum(p.untyped_storage().nbytes() for p in s.parameters()) for name, s in chain.stages.loaded.items()}


def test_only_the_running_stage_keeps_its_weights_and_samples_stay_the_same() -> None:
    plain, chain = (cd.load(RECIPE) for _ in range(2))
    expected = plain.sample(6, steps=STEPS, batch=4)
    least = min(cost.weight_bytes for cost in chain.plan().costs.values())
    seen = []
    for preview in chain.previews(6, steps=STEPS, batch=4, max_memory="9MB"):
        assert [name for name, size in held(chain).items() if size > least / 2] == [preview.stage]
        seen.append((preview.stage, len(preview.samples)))
    assert [*dict.fromkeys(seen)] == [("clip", 4), ("image16", 4), ("clip", 2), ("image16", 2)]
    found = chain.sample(6, steps=STEPS, batch=4, max_memory="9MB")
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    again = chain.sample(6, steps=STEPS, batch=4)
    assert all(torch.equal(again[name], value) for name, value in expected.items())
    assert min(held(chain).values()) >= least, "all are kept again"


def test_what_fits_is_kept_as_it_is() -> None:
    chain = cd.load(RECIPE)
    assert not chain.request(64, max_memory="1GB").frugal and chain.request(64, max_memory="1GB").size == 64


@pytest.mark.parametrize("limit", [8e6, 12e6, 20e6])
def test_no_more_is_allocated_than_is_allowed(limit: float, monkeypatch) -> None:
    """Counted tensor by tensor; files that are read are mapped, and take none."""
    chain, asked = cd.load(RECIPE), {"steps": STEPS, "max_memory": f"{limit / 1e6:g}MB"}
    request, load = chain.request(64, **asked), chain.stages._load

    def counted(name: str) -> Any:
        with _disable_current_modes():
            stage = load(name)
            peak.__torch_dispatch__(lambda: list(stage.parameters()), ())
        return stage

    monkeypatch.setattr(chain.stages, "_load", counted)
    chain.stages.loaded.clear()
    with _Peak() as peak:
        chain.sample(request.size, **asked)
    assert 0.6 * limit < peak.peak <= limit


def test_guided_batches_count_twice() -> None:
    x, given = cd.Variable.image("x", 3, 8), cd.Variable.vector("given", 5)
    network = {"kind": "unet", "channels": 8, "mult": [1], "blocks": 1, "attention": []}
    stage = cd.Diffusion(x, given=[(given, {"dropout": 0.1})], network=network)
    assert stage.cost(["x"], {"guidance": 2.0}).activation_bytes == 2 * stage.cost(["x"]).activation_bytes
    chain = cd.Chain([stage])
    plain, guided = (
        chain.request(64, given={"given": torch.ones(1, 5)}, max_memory="1.5MB", guidance=scale).size
        for scale in (1.0, 2.0)
    )
    assert plain == 2 * guided


def test_too_little_memory_is_refused_and_says_what_is_enough() -> None:
    chain = cd.load(RECIPE)
    with pytest.raises(
        cd.UserError, match=r"3MB of memory are too little: stage 'image16' takes 6\.73 MB for weights"
    ) as told:
        chain.sample(2, steps=STEPS, max_memory="3MB")
    enough = str(told.value.hint).split()[2]
    assert chain.request(2, steps=STEPS, max_memory=f"{float(enough) + 0.01:.2f}MB").size == 1
    with pytest.raises(cd.UserError, match="for 16 samples"):
        chain.sample(2, steps=STEPS, max_memory="8MB", exact=True)
    with pytest.raises(cd.UserError, match="expected an amount of memory, such as 4GB, not 'much'"):
        chain.sample(2, max_memory="much")
    with pytest.raises(cd.UserError, match="does not bound compiled networks"):
        chain.sample(2, max_memory="1GB", execution="compile")


def test_weights_that_nobody_can_read_again_are_kept() -> None:
    chain = cd.load(RECIPE)
    with torch.no_grad():
        next(chain.stages["clip"].parameters()).mul_(1.5)
    before = next(chain.stages["clip"].parameters()).clone()
    with pytest.raises(cd.UserError, match=r"stage 'image16' takes 11\.9 MB for weights"):
        chain.sample(2, steps=STEPS, max_memory="9MB")
    chain.sample(2, steps=STEPS, batch=64, max_memory="14MB")
    assert torch.equal(next(chain.stages["clip"].parameters()), before)
    objects = cd.Chain([s for s in cd.load(RECIPE).stages.values() if isinstance(s, nn.Module)])
    with pytest.raises(cd.UserError, match=r"stage 'image16' takes 11\.9 MB for weights"):
        objects.sample(2, steps=STEPS, max_memory="9MB")


def test_the_command_writes_the_same_files_within_less_memory(tmp_path: Path) -> None:
    changes = [f"stages.*.sample.steps={STEPS}"]
    paths = [tmp_path / name for name in ("plain", "frugal")]
    for path, limit in zip(paths, (None, "9MB"), strict=True):
        done = sample(load_recipe(RECIPE, changes), path, count=6, batch=4, max_memory=limit)
    files = [
        sorted(str(file.relative_to(path)) for file in path.rglob("*.*") if file.suffix != ".yaml") for path in paths
    ]
    assert files[0] == files[1] and len(files[0]) > 6
    for name in files[0]:
        if name.endswith(".png"):
            one, other = (
                torch.frombuffer(bytearray(Image.open(path / name).tobytes()), dtype=torch.uint8) for path in paths
            )
            assert (one.int() - other.int()).abs().max() <= 1
    assert done.lock["samples"] == sample(load_recipe(RECIPE, changes), paths[1], count=6, batch=4).lock["samples"]
    assert sample(load_recipe(RECIPE, changes), paths[1], count=6, batch=4).seconds == 0, (
        "the same samples: nothing to do"
    )


@pytest.mark.gpu
def test_a_gpu_holds_the_weights_of_one_stage() -> None:
    chain = cd.load(RECIPE).to("cuda")
    limit = sum(cost.weight_bytes for cost in chain.plan().costs.values())
    for preview in chain.previews(2, steps=STEPS, max_memory="9MB"):
        own = chain.plan().costs[preview.stage].weight_bytes
        assert held(chain)[preview.stage] >= own
        assert sum(size for name, size in held(chain).items()) < limit
        assert all(p.is_cuda for p in chain.stages[preview.stage].parameters())
