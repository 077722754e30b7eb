"""How networks are executed: what is decided and by what, precision, static shapes, and packages on disk."""

from __future__ import annotations

import math
import os
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

import chaindiff as cd
from chaindiff.execution import packages, prepare
from chaindiff.execution.costs import BUILDING, KEPT, Costs, Weighed, measured
from chaindiff.execution.precision import ERROR, LEVELS, Probe, compare
from chaindiff.execution.prepare import Choice, Preparation, kept, locked
from chaindiff.execution.runner import Flat, Tiled, example, flat
from chaindiff.specs.recipe import SampleSpec

CPU = torch.device("cpu")
UNET = {"kind": "unet", "channels": 8, "mult": [1], "blocks": 1, "attention": [], "dropout": 0.0}
PRIOR = {"kind": "prior", "width": 16, "depth": 1, "heads": 2}
SIDE = cd.Variable.vector("side", 2)


def stage(network: dict = UNET, given: bool = True) -> cd.Diffusion:
    torch.manual_seed(0)
    made = cd.Variable.image("image", 3, 8) if network is UNET else cd.Variable.vector("image", 3)
    links = [(SIDE, {"dropout": 0.5})] if given else []
    found = cd.Diffusion(made, given=links, network=network, sampler={"steps": 3})
    for parameter in found.parameters():
        nn.init.normal_(parameter, std=0.2)
    return found.eval().requires_grad_(False)


def ready(chain: cd.Chain, count: int = 6, **asked) -> Preparation:
    given = {"side": torch.ones(1, 2)}
    request = chain.request(count, given=given, batch=4)
    return Preparation(chain, request, SampleSpec(count=count, batch=4, **asked))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("CHAINDIFF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# ------------------------------------------------------------ static shapes


@pytest.mark.parametrize("count", [1, 4, 5, 8])
def test_batches_of_any_size_are_evaluated_in_one_shape(count: int) -> None:
    part, seen = stage(), []
    inner = Flat(part.network, part.interface, None)

    def call(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        seen.append({len(tensor) for tensor in tensors})
        return inner(tensors)

    inputs = example(part.interface, count, CPU)
    found = Tiled(part.network, call, part.interface, 4)(*inputs)["image"]
    assert seen == [{4}] * math.ceil(count / 4)
    torch.testing.assert_close(found, part.network(*inputs)["image"])


def test_inputs_of_another_layout_go_to_the_network_itself() -> None:
    part = stage()
    x, noise, condition = example(part.interface, 2, CPU)
    other = {"image": torch.randn(2, 3, 16, 16)}  # machine code would read past its end
    tiled = Tiled(part.network, lambda _: pytest.fail("not these shapes"), part.interface, 2)
    assert torch.equal(tiled(other, noise, condition)["image"], part.network(other, noise, condition)["image"])
    assert all(tensor.is_contiguous() for tensor in flat({"image": x["image"].permute(0, 1, 3, 2)}, noise, condition))


def test_training_and_gradients_use_the_network_itself() -> None:
    part = stage().requires_grad_(True)
    part.run = lambda x, noise, condition: {n: torch.zeros_like(v) for n, v in x.items()}
    x, _, condition = example(part.interface, 2, CPU)
    sigma = {"image": torch.ones(2)}
    assert part.denoise(x, sigma, condition).x0["image"].requires_grad
    with torch.no_grad():
        skip = part.precondition(sigma["image"]).skip.reshape(-1, 1, 1, 1)
        torch.testing.assert_close(part.denoise(x, sigma, condition).x0["image"], skip * x["image"])


def test_a_call_with_its_own_precision_is_not_executed_as_prepared() -> None:
    part = stage()
    chain, given = cd.Chain([part]), {"side": torch.ones(1, 2)}
    plain = chain.sample(2, given=given)["image"]
    part.run = lambda x, noise, condition: {n: torch.zeros_like(v) for n, v in x.items()}
    assert not torch.equal(chain.sample(2, given=given)["image"], plain)
    assert torch.equal(chain.sample(2, given=given, dtype=torch.float32)["image"], plain)
    assert part.run is not None


# ------------------------------------------------------------ precision


class Off(nn.Module):
    """A network whose output is off by a constant in bf16."""

    def forward(self, x, noise, condition):
        wrong = 0.1 if torch.is_autocast_enabled("cpu") else 0.0
        return {name: value * 0 + wrong for name, value in x.items()}


def test_the_error_of_samples_follows_from_that_of_denoised_values() -> None:
    """Against sampling itself: for Gaussian data a constant error of the denoiser reaches the sample as is said."""
    part = cd.Diffusion(cd.Variable.vector("image", 3), network=Off(), sampler={"steps": 3}, precondition="x0")
    chain = cd.Chain([part])
    probe = compare(chain, chain.request(4), ["image"])["image"]
    spread = part.generates["image"].sigma_data
    levels = [*(level["image"] for level in probe.levels), 0.0]
    assert [error["image"] for error in probe.errors] == pytest.approx([0.1] * LEVELS, rel=1e-2)
    expected = 0.0
    for before, after in pairwise(levels):
        expected += 0.1 * (1 - after / before) * spread / math.sqrt(spread**2 + after**2)
    assert probe.error == pytest.approx(expected / spread, rel=1e-2)
    assert part.autocast is None and part.run is None


def test_the_measured_error_is_that_of_bf16() -> None:
    part = stage()
    chain = cd.Chain([part])
    request = chain.request(6, given={"side": torch.ones(1, 2)}, batch=4)
    probe = compare(chain, request, ["image"])["image"]
    assert 1e-5 < probe.error < 1
    assert all(0 < seconds < 10 for seconds in probe.seconds.values())


@pytest.mark.parametrize(
    ("error", "faster", "expected"),
    [(ERROR / 2, True, "bf16"), (ERROR / 2, False, "float32"), (ERROR * 2, True, "float32")],
)
def test_auto_takes_bf16_where_it_is_faster_and_close(
    cache: Path, monkeypatch, error: float, faster: bool, expected: str
) -> None:
    def measure(chain, request, names):
        probes = {name: Probe(chain.stages[name]) for name in names}
        for probe in probes.values():
            probe.seconds = {"float32": 1.0, "bf16": 0.5 if faster else 2.0}
            probe.levels, probe.errors = [{"image": 1.0}], [{"image": error / 2}]  # of data with deviation 0.5
        return probes

    monkeypatch.setattr(prepare, "compare", measure)
    monkeypatch.setattr(prepare, "bf16", lambda device: True)
    monkeypatch.setattr(prepare, "WORTH", 0)
    chain = cd.Chain([stage()])
    choices = ready(chain).apply()
    assert choices == {"image": Choice("eager", expected, error)}
    assert chain.stages["image"].autocast == (torch.bfloat16 if expected == "bf16" else None)
    monkeypatch.setattr(prepare, "compare", lambda *_: pytest.fail("it was measured before"))
    assert ready(cd.Chain([stage()])).apply() == choices


def test_a_small_request_is_not_measured(cache: Path, monkeypatch) -> None:
    monkeypatch.setattr(prepare, "compare", lambda *_: pytest.fail("measured"))
    assert ready(cd.Chain([stage()])).apply() == {"image": Choice("eager", "float32")}
    assert ready(cd.Chain([stage()]), precision="bf16").apply() == {"image": Choice("eager", "bf16")}


# ------------------------------------------------------------ decisions


def test_building_pays_once_as_much_was_lost() -> None:
    costs = Costs(networks={"net": {"eager bf16": 0.01}})
    assert not costs.pays("net", "stage", "bf16", "bf16", 2 * BUILDING / 0.01 * 0.99), "half of it would be saved"
    assert costs.pays("net", "stage", "bf16", "bf16", 2 * BUILDING / 0.01 * 1.01)
    costs.stages["stage"] = Weighed(spent=2 * BUILDING * 0.9)
    assert costs.pays("net", "stage", "bf16", "bf16", 2 * BUILDING / 0.01 * 0.11), "with what was lost before"
    assert not costs.pays("other", "stage", "bf16", "bf16", 1e9), "nothing is known of it"
    assert not costs.pays("net", "stage", "float32", "float32", 1e9), (
        "compiling is no faster in float32, until measured"
    )
    costs.networks["net"]["compile bf16"] = 0.009
    assert not costs.pays("net", "stage", "bf16", "bf16", 2 * BUILDING / 0.01 * 1.01), "a tenth is saved"


def test_what_was_measured_is_kept_and_bounded(cache: Path) -> None:
    costs = Costs(stages={str(number): Weighed() for number in range(KEPT + 5)})
    costs.save()
    assert len(measured().stages) == KEPT and "5" in measured().stages and "4" not in measured().stages
    path = cache / "execution.json"
    path.write_text('{"building": "soon"')
    assert measured() == Costs()


def test_a_run_goes_on_as_its_lock_says() -> None:
    choices = {"clip": Choice("eager", "bf16", 0.004), "image": Choice("compile", "float32")}
    lock = {"execution": locked(choices)}
    assert lock["execution"]["image"] == {"mode": "compile", "precision": "float32"}
    assert kept(lock, SampleSpec()) == choices
    assert kept(lock, SampleSpec(execution="eager")) is None
    assert kept(lock, SampleSpec(precision="bf16")) is None
    assert kept(lock, SampleSpec(exact=True)) is None
    assert kept({}, SampleSpec()) is None and kept({"execution": "eager"}, SampleSpec()) is None


def test_eager_time_is_noted(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "WORTH", 0)
    chain = cd.Chain([stage()])
    preparation = ready(chain, precision="float32")
    choices = preparation.apply()
    chain.seconds["image"] = 2.0
    preparation.record(choices, 4)
    (known,), (spent,) = measured().networks.values(), measured().stages.values()
    assert known == {"eager float32": pytest.approx(2.0 / (4 * 5))}, "3 steps of heun are 5 evaluations"
    assert spent.spent == 2.0


# ------------------------------------------------------------ packages


def pretend(monkeypatch) -> list[str]:
    """Packages of a few bytes, which call the network; the keys that were built."""
    built, of = [], {}

    def build(key, network, interface, rows, dtype, device):
        built.append(key)
        path = packages.folder() / "new"
        path.write_bytes(key.encode())
        kept = path.replace(packages.folder() / f"{key}.{packages._content(path)}.pt2")
        of[kept] = Flat(network, interface, dtype)
        return kept

    monkeypatch.setattr(packages, "build", build)
    monkeypatch.setattr(packages, "load", lambda path, device: of[path])
    return built


def test_a_package_is_built_once(cache: Path, monkeypatch, capsys) -> None:
    built, chain = pretend(monkeypatch), cd.Chain([stage(PRIOR)])
    assert ready(chain).apply() == {"image": Choice()} and not built
    assert ready(chain, execution="compile").apply() == {"image": Choice("compile")}
    assert "compiling stage image for this machine, once" in capsys.readouterr().out
    again = cd.Chain([stage(PRIOR)])
    assert ready(again, execution="compile").apply() == {"image": Choice("compile")} and len(built) == 1
    assert again.stages["image"].run is not None
    monkeypatch.setattr(prepare, "WORTH", 0)
    auto = ready(cd.Chain([stage(PRIOR)]), precision="float32")
    assert auto.apply() == {"image": Choice("compile")} and len(built) == 1, "auto takes it"
    ready(chain, execution="compile", precision="bf16").apply()
    ready(chain, execution="compile", count=3).apply()
    nn.init.ones_(again.stages["image"].network.query)
    ready(again, execution="compile").apply()
    assert len(set(built)) == 4, "of each precision, shape and weights its own"


def test_a_call_in_python_executes_networks_as_it_says(cache: Path, monkeypatch) -> None:
    built, chain, given = pretend(monkeypatch), cd.Chain([stage(PRIOR)]), {"side": torch.ones(1, 2)}
    plain = chain.sample(6, given=given, batch=4)["image"]
    for _ in range(2):
        found = chain.sample(6, given=given, batch=4, execution="compile")["image"]
        torch.testing.assert_close(found, plain)
    steps = list(chain.previews(6, given=given, batch=4, execution="compile"))
    assert torch.equal(steps[2].x["image"].float(), found[:4]) and len(built) == 1
    half = chain.sample(6, given=given, batch=4, precision="bf16")["image"]
    assert torch.equal(half, chain.sample(6, given=given, batch=4, dtype=torch.bfloat16)["image"])
    assert not torch.equal(half, plain) and torch.equal(chain.sample(6, given=given, batch=4)["image"], plain)
    assert chain.stages["image"].run is None and chain.stages["image"].autocast is None
    with pytest.raises(cd.UserError, match="execution: 'compiled' is not one of auto, eager, compile"):
        chain.sample(6, given=given, execution="compiled")
    with pytest.raises(cd.UserError, match="take neither `device` nor `dtype`"):
        chain.sample(6, given=given, execution="compile", dtype=torch.bfloat16)


def test_a_package_is_the_users_own_and_whole(cache: Path, monkeypatch, capsys) -> None:
    built, chain = pretend(monkeypatch), cd.Chain([stage(PRIOR)])
    ready(chain, execution="compile").apply()
    (path,) = packages.folder().iterdir()
    assert path.parent.stat().st_mode & 0o777 == 0o700
    path.parent.chmod(0o777)
    assert ready(chain, execution="compile").apply() == {"image": Choice()}
    assert "stage image is not compiled" in (said := capsys.readouterr().out) and "is not yours alone" in said
    path.parent.chmod(0o700)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert ready(chain, execution="compile").apply() == {"image": Choice("compile")}, "damaged, and built again"
    assert len(built) == 2 and packages.find(built[0]) == path
    path.chmod(0o666)
    assert packages.find(built[0]) is None, "others could have written it"


def test_what_cannot_be_compiled_stays_eager(cache: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(prepare, "compiler", lambda: None)
    chain = cd.Chain([stage(PRIOR)])
    assert ready(chain, execution="compile").apply() == {"image": Choice("eager", "float32")}
    assert "stage image is not compiled: there is no C++ compiler (g++)" in capsys.readouterr().out
    assert chain.stages["image"].run is None


def test_packages_in_a_link_are_refused(cache: Path, tmp_path: Path) -> None:
    cache.mkdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (cache / "packages").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(packages.UntrustedError, match="not yours alone"):
        packages.find("0" * 16)


def test_the_packages_that_were_not_used_for_longest_go(cache: Path, monkeypatch) -> None:
    place = packages.folder()
    for number in range(3):
        (place / f"{number}.pt2").write_bytes(b"0" * 10)
        os.utime(place / f"{number}.pt2", (number, number))
    (place / ".building-x" / "data").mkdir(parents=True)
    os.utime(place / ".building-x", (0, 0))
    monkeypatch.setattr(packages, "LIMIT", 20)
    packages._prune()
    assert sorted(path.name for path in place.iterdir()) == ["1.pt2", "2.pt2"]


# ------------------------------------------------------------ slow, and on a GPU


@pytest.mark.slow
def test_pixels_in_bf16_are_close_to_those_in_float32() -> None:
    """What docs/guarantees.md says of bf16, on the shipped chain."""
    chain = cd.load("vcdm_emoji")
    exact, other = (chain.sample(64, dtype=dtype)["image"].clamp(-1, 1) for dtype in (torch.float32, torch.bfloat16))
    apart = (exact - other).abs()
    print(f"mean {apart.mean():.4f}, largest {apart.max():.3f}")
    assert apart.mean() < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("network", [UNET, PRIOR], ids=["unet", "prior"])
def test_a_package_computes_what_its_network_computes(cache: Path, monkeypatch, network: dict) -> None:
    chain, given = cd.Chain([stage(network)]), {"side": torch.ones(1, 2)}
    plain = chain.sample(6, given=given, batch=4)["image"]
    assert ready(chain, execution="compile").apply() == {"image": Choice("compile")}
    (path,) = (cache / "packages").glob("*.pt2")
    assert (path.parent.stat().st_mode & 0o777, path.stat().st_mode & 0o777) == (0o700, 0o600)
    found = chain.sample(6, given=given, batch=4)["image"]
    torch.testing.assert_close(found, plain, atol=1e-4, rtol=1e-4)
    monkeypatch.setattr(packages, "build", lambda *_: pytest.fail("it is there"))
    again = cd.Chain([stage(network)])
    ready(again, execution="compile").apply()
    assert torch.equal(again.sample(6, given=given, batch=4)["image"], found), "the same machine code"
    third = cd.Chain([stage(network)])
    assert torch.equal(third.sample(6, given=given, batch=4, execution="compile")["image"], found), "in Python, too"


@pytest.mark.gpu
@pytest.mark.parametrize("execution", ["eager", "compile"])
def test_samples_on_cuda_are_those_of_the_cpu(execution: str) -> None:
    chain, given = cd.Chain([stage()]), {"side": torch.ones(1, 2)}
    plain = chain.sample(6, given=given, batch=4)["image"]
    assert ready(chain.to("cuda"), execution=execution).apply()["image"].mode == execution
    for _ in range(2):  # captured, then replayed
        assert (chain.sample(6, given=given, batch=4)["image"] - plain).abs().max() < 1e-3
