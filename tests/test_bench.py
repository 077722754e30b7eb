"""`chaindiff bench` and the suite: what is timed and how, which changes are named, that peers do the same work."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from functools import cache
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import beside, page, peers, suite
from benchmarks import works as own
from benchmarks.__main__ import main as whole_suite
from chaindiff import cli
from chaindiff.bench import regressions, timing, works
from chaindiff.bench.suite import CASES, CaseResult, Results, SideResult, chosen, read
from chaindiff.bench.timing import Side, measure
from chaindiff.commands import bench as command_module
from chaindiff.edm import solvers
from chaindiff.io.errors import UserError
from chaindiff.networks import Condition, UNet
from chaindiff.specs.network import UNetSpec


def results(cases: dict[str, dict[str, SideResult]]) -> Results:
    about = {"group": "g", "unit": "images"}
    made = {name: CaseResult(about=f"{name} at work", sides=sides, **about) for name, sides in cases.items()}
    return Results(date="2026-01-01", machine={"processor": "p"}, versions={"torch": "2"}, cases=made)


def timed(random: np.random.Generator, factor: float = 1.0, hour: float = 1.0, repeats: int = 10) -> SideResult:
    """Repeats with 3% of noise; an `hour` in which the machine is slower slows the reference workload too."""
    own, reference = (0.5 * np.exp(random.normal(0, 0.03, repeats)) * hour for _ in range(2))
    return SideResult(seconds=(own * factor).tolist(), beside=reference.tolist(), count=64)


# ---------------------------------------------------------------- names and messages


def test_cases_by_name_and_group():
    assert chosen([]) == [*CASES]
    assert chosen(["sampling", "encode"]) == ["sample-16", "chain", "encode"]
    assert [*CASES] == chosen([], suite.CASES)[: len(CASES)]
    with pytest.raises(UserError, match="nothing to measure called 'encod'; did you mean 'encode'"):
        chosen(["encod"])


def test_list_and_mistakes_import_no_torch():
    code = (
        "import sys\nfrom chaindiff.cli import main\ntry: main(sys.argv[1:])\n"
        "finally: print([n for n in ('torch', 'numpy') if n in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, "bench", "--list", "training"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "[]\n")
    assert done.stdout.split(maxsplit=2)[:2] == ["train-32", "training"] and done.stdout.count("\n") == 1
    done = subprocess.run([sys.executable, "-c", code, "bench", "trainign"], capture_output=True, text=True)
    expected = "error: there is nothing to measure called 'trainign'; did you mean 'training'?\n"
    assert (done.returncode, done.stdout, done.stderr.replace("[]\n", "")) == (2, "", expected)


@pytest.fixture
def command(capsys):
    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(["bench", *arguments])
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return call


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2}', "\x00\xff"])
def test_a_file_that_holds_no_results(command, tmp_path, text):
    (tmp_path / "old.json").write_text(text)
    status, _, err = command("encode", "--compare", str(tmp_path / "old.json"))
    assert status == 2 and f"error: {tmp_path}/old.json: is no output of `chaindiff bench --json`" in err


def test_a_file_that_is_not_there(command, tmp_path):
    status, _, err = command("encode", "--compare", str(tmp_path / "none.json"))
    assert (status, err) == (2, f"error: {tmp_path}/none.json: No such file or directory\n")


def test_the_command_measures_writes_compares_and_exits_with_1_if_slower(command, tmp_path, monkeypatch):
    """The work is stood in for; everything else is real."""
    seconds = [0.5]
    monkeypatch.setattr(works, "encode", lambda: {"chaindiff": Side(lambda: seconds[0] * np.exp(next(wave)), 64)})
    monkeypatch.setitem(timing.REFERENCES, "compute", lambda: 0.1)
    wave = iter(np.random.default_rng(0).normal(0, 0.01, 1000))
    old = tmp_path / "old.json"
    status, out, _ = command("encode", "--json", str(old))
    assert status == 0 and "encode: embedding" in out and " images  " in out
    assert len(read(old).cases["encode"].sides["chaindiff"].seconds) == 10
    status, out, _ = command("encode", "--compare", str(old))
    assert status == 0 and out.endswith("1 rows compared: 0 slower, 0 faster beyond noise\n")
    seconds[0] = 0.55
    status, out, _ = command("encode", "--compare", str(old))
    assert status == 1 and "slower: encode, chaindiff: " in out and "1 slower, 0 faster" in out
    seconds[0] = 0.4
    status, out, _ = command("encode", "--compare", str(old), "--repeats", "2")
    assert status == 0 and "not compared, for too few repeats or in one run alone: encode, chaindiff" in out


# ---------------------------------------------------------------- results


def test_results_come_back_as_they_were_written(tmp_path):
    random = np.random.default_rng(0)
    made = results({"a": {"chaindiff": timed(random), "peer": SideResult(missing="not installed")}})
    made.write(tmp_path / "r.json")
    assert read(tmp_path / "r.json") == made
    assert json.loads((tmp_path / "r.json").read_text())["format"] == 1
    (tmp_path / "r.json").write_text((tmp_path / "r.json").read_text().replace('"beside"', '"besides"', 1))
    with pytest.raises(UserError, match=r"cases\.a\.sides\.chaindiff\.besides: Extra inputs"):
        read(tmp_path / "r.json")


# ---------------------------------------------------------------- timing


def test_sides_take_turns_beside_the_reference(monkeypatch):
    said: list[str] = []
    monkeypatch.setitem(timing.REFERENCES, "host", lambda: said.append("|") or 2.0)
    sides = {name: Side(lambda name=name: said.append(name) or 1.0, 3, {"flops": 5.0}) for name in "ab"}
    found = measure({**sides, "c": Side(missing="not there")}, "host", 2)
    assert "".join(said) == "aabb|a|b||b|a|"  # two calls of each to warm up; then turns, which begin with another side
    assert found["a"] == SideResult(seconds=[1.0, 1.0], beside=[2.0, 2.0], count=3, facts={"flops": 5.0})
    assert found["c"] == SideResult(missing="not there")


def test_short_calls_are_timed_several_at_a_time_and_long_ones_less_often(monkeypatch):
    """By a clock of our own, so that a busy machine changes nothing."""
    clock, calls = [0.0], {"short": 0, "long": 0}

    def take(name: str, seconds: float) -> None:
        calls[name] += 1
        clock[0] += seconds

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setitem(timing.REFERENCES, "host", lambda: 1.0)
    sides = {"short": Side(lambda: take("short", 2**-10)), "long": Side(lambda: take("long", 2**-5))}
    found = measure(sides, "host", 50, turn=2**-8)  # 0.195 s for all, 0.05 s a turn
    assert found["long"].seconds == [2**-5] * 4 and found["short"].seconds == [2**-10] * 4
    assert calls == {"long": 2 + 4, "short": 2 + 4 * 21}  # 21 short calls are 20 ms


# ---------------------------------------------------------------- comparing


@pytest.mark.parametrize("shift", [0.0, 0.5, 2.0])
def test_the_rank_test_counts_orders(shift):
    """Of all ways to choose which of the values came after, those in which they lie as high."""
    random = np.random.default_rng(1)
    for n, m in [(3, 4), (5, 5), (6, 4)]:
        a, b = random.normal(size=n), random.normal(size=m) + shift
        ranks = np.argsort(np.argsort([*a, *b]))
        sums = [sum(chosen) for chosen in itertools.combinations(range(n + m), m)]
        expected = np.mean([total >= ranks[n:].sum() for total in sums])
        assert regressions.p_larger(a, b) == pytest.approx(expected, rel=1e-12)
    assert regressions.p_larger([1.0, 2.0], [2.0, 3.0]) == pytest.approx(2 / 6), "a tie counts as an inversion"


def test_a_slowdown_of_ten_percent_is_named_and_nothing_else():
    random = np.random.default_rng(2)
    sides = [(case, side) for case in "abcdefghij" for side in ("chaindiff", "chaindiff, eager")]

    def run(slow: dict, hour: float) -> Results:
        made: dict[str, dict[str, SideResult]] = {}
        for case, side in sides:
            made.setdefault(case, {})[side] = timed(random, slow.get((case, side), 1.0), hour)
            made[case]["peer"] = timed(random, hour * 1.5)
        return results(made)

    old, same = run({}, 1.0), run({}, 1.4)  # in a slower hour
    honest = regressions.compare(old, same)
    assert (honest.slower, honest.faster, honest.judged, honest.unjudged) == ([], [], 20, [])
    changed = regressions.compare(old, run({("c", "chaindiff"): 1.1, ("d", "chaindiff"): 0.85}, 0.8))
    assert [change.name for change in changed.slower] == ["c, chaindiff"]
    assert [change.name for change in changed.faster] == ["d, chaindiff"]
    (slow,) = changed.slower
    assert slow.low < 1.1 < slow.high and str(changed).startswith("slower: c, chaindiff: ")


def test_honest_runs_name_nothing_at_the_level_that_is_promised():
    random = np.random.default_rng(3)
    named = 0
    for _ in range(200):
        old, new = (results({"a": {"chaindiff": timed(random, repeats=8)}}) for _ in range(2))
        found = regressions.compare(old, new)
        named += len(found.slower) + len(found.faster)
    assert named <= 6  # 2 x 1% of 200 would be 4 without the tolerance


def test_what_cannot_be_judged_is_said():
    random = np.random.default_rng(4)
    old = results({"few": {"chaindiff": timed(random, repeats=3)}, "gone": {"chaindiff": timed(random)}})
    new = results({"few": {"chaindiff": timed(random, 2.0, repeats=3)}, "new": {"chaindiff": timed(random)}})
    found = regressions.compare(old, new)
    assert found.judged == 0 and found.unjudged == ["few, chaindiff", "gone, chaindiff", "new, chaindiff"]


@pytest.mark.slow
def test_ten_percent_planted_in_the_solver_are_named_and_two_honest_runs_name_nothing(monkeypatch):
    """In turns, on one thread and by the process's clock: what else runs on the machine changes little."""
    integrate, slow, threads = solvers.integrate, [False], torch.get_num_threads()

    def planted(*arguments, **options):
        began = time.process_time()
        for step in integrate(*arguments, **options):
            until = time.process_time() + 0.1 * (time.process_time() - began)
            while slow[0] and time.process_time() < until:
                pass
            yield step
            began = time.process_time()

    for name, module in list(sys.modules.items()):
        if name.startswith("chaindiff") and getattr(module, "integrate", None) is integrate:
            monkeypatch.setattr(module, "integrate", planted)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=time.process_time))
    monkeypatch.setattr(works, "BATCH", 16)
    monkeypatch.setattr(works, "load", cache(works.load))
    runs = {name: SideResult(seconds=[], beside=[]) for name in ("first", "second", "planted")}
    try:
        torch.set_num_threads(1)
        for _ in range(20):
            for name, whole in runs.items():
                slow[0] = name == "planted"
                side = command_module.bench(["sample-16"], repeats=1)[0].cases["sample-16"].sides["chaindiff"]
                whole.seconds.extend(side.seconds)
                whole.beside.extend(side.beside)
    finally:
        torch.set_num_threads(threads)
    first, second, third = (results({"sample-16": {"chaindiff": whole}}) for whole in runs.values())
    honest = regressions.compare(first, second)
    assert (honest.slower, honest.faster, honest.judged) == ([], [], 1)
    for before in (first, second):
        (found,) = regressions.compare(before, third).slower
        print(found)
        assert found.name == "sample-16, chaindiff" and found.low < 1.13 and found.high > 1.07


# ---------------------------------------------------------------- peers


@pytest.mark.parametrize("told", [{}, {"label_dim": 5}, {"augment_dim": 9}])
def test_the_network_as_published_gives_the_output_of_ours(told):
    """Resampling, attention at two resolutions, conditioning: the same function of the same weights."""
    torch.manual_seed(0)
    network = UNet(16, 3, 3, channels=16, mult=(1, 2, 2), blocks=2, attention=(8,), **told).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, noise = torch.randn(2, 3, 16, 16), torch.randn(2)
    labels = torch.randn(2, told["label_dim"]) if "label_dim" in told else None
    augment = torch.randn(2, told["augment_dim"]) if "augment_dim" in told else None
    with torch.no_grad():
        ours = network({"x": x}, {"x": noise}, Condition(labels=labels, augment=augment))["x"]
        theirs = peers.Published(network)(x, noise, augment, labels)
    assert ours.std() > 0.1
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4 * float(ours.std()))


def test_a_peer_that_is_not_installed_says_so(monkeypatch):
    for name in ("diffusers", "denoising_diffusion_pytorch", "k_diffusion"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    monkeypatch.setattr(beside, "SMALL", UNetSpec(kind="unet", channels=8, mult=[1], blocks=1, attention=[]))
    found = beside.sides("sample-32")
    missing = {name: side.missing for name, side in found.items() if side.missing}
    assert [*missing] == ["k-diffusion, EDM's network", "diffusers", "denoising-diffusion-pytorch"]
    assert all(text.startswith("not installed: pip install ") for text in missing.values())
    assert beside.sides("encode") == {}


def test_edms_own_file_is_executed_only_when_it_is_given(tmp_path):
    spec = UNetSpec(kind="unet", channels=8, mult=[1], blocks=1, attention=[])
    unet = works.stage(spec, 8).network
    with pytest.raises(UserError, match=r"there is no training/networks\.py in it"):
        peers.authors(tmp_path, unet, 8, spec)
    (tmp_path / "training").mkdir()
    (tmp_path / "helper.py").write_text("SCALE = 2\n")
    file = tmp_path / "training" / "networks.py"
    file.write_text(
        "import torch, helper\n"
        "class SongUNet(torch.nn.Module):\n"
        "    def __init__(self, size, inputs, outputs, model_channels, **rest):\n"
        "        super().__init__(); self.width = model_channels\n"
        "    def forward(self, x, noise, labels, augment=None):\n"
        "        return x * helper.SCALE + self.width\n"
    )
    before = [*sys.path]
    network = peers.authors(tmp_path, unet, 8, spec)
    assert network(torch.ones(1), torch.ones(1)).item() == 10.0 and sys.path == before
    file.write_text("class SongUnet: pass\n")
    with pytest.raises(UserError, match=r"does not make EDM's SongUNet: module .* has no attribute 'SongUNet'"):
        peers.authors(tmp_path, unet, 8, spec)


TINY = UNetSpec(kind="unet", channels=8, mult=[1, 1], blocks=1, attention=[])


@pytest.mark.parametrize("name", [name for name, case in suite.CASES.items() if case.home != suite.PROCESSES])
def test_every_side_of_every_case_works_at_a_tiny_size(name, monkeypatch):
    """Installed peers too; nothing is compiled."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    for module in (works, own, beside):
        for constant, value in {"SMALL": TINY, "FFHQ": TINY, "BATCH": 2, "FEW": 2, "STEPS": 1, "HEUN": 2}.items():
            monkeypatch.setattr(module, constant, value, raising=False)
        if hasattr(module, "executed"):
            monkeypatch.setattr(module, "executed", lambda made, *how: made)
    monkeypatch.setattr(beside, "LEVELS", [1.0, 0.1, 0.0])
    case = suite.CASES[name]
    sides = {**getattr(import_module(case.home), name.replace("-", "_"))(), **beside.sides(name)}
    assert any(side.startswith("chaindiff") for side in sides)
    for side in sides.values():
        assert side.missing or side.time() > 0


# ---------------------------------------------------------------- the page


def test_the_page_has_every_case_ratios_and_plots(tmp_path, capsys):
    random = np.random.default_rng(5)
    facts = {"parameters": 1e6, "flops": 2e9}
    ours, edm = (timed(random, factor).model_copy(update={"facts": facts}) for factor in (1.0, 3.0))
    sides = {"chaindiff": ours, "EDM as published": edm, "diffusers": SideResult(missing="not installed: pip")}
    made = results({"evaluate-32": sides, "encode": {"chaindiff": timed(random)}})
    made.write(tmp_path / "speed.json")
    quality = {"recipe": "r", "side": "chaindiff", "evaluations": 10, "images_per_second": 50.0, "faster": 7.5}
    (tmp_path / "q.json").write_text(json.dumps({"rows": [{**quality, "count": 1000, "fd": {"judge_conv": 1.25}}]}))
    said = ["--write", f"{tmp_path}/speed.json", "--quality", f"{tmp_path}/q.json", "--docs", str(tmp_path)]
    assert whole_suite(said) == 0
    text = (tmp_path / "performance.md").read_text()
    (row,) = [line.split(" | ") for line in text.splitlines() if line.startswith("| evaluate-32 at work | ")]
    assert float(row[1]) == pytest.approx(3, rel=0.15) and row[2] == "not installed: pip |"
    assert "| r | chaindiff | 10 | 50 | 7.5 | 1.25 |" in text and "`encode`: encode at work." in text
    assert (tmp_path / page.PICTURES / "evaluate-32.png").read_bytes().startswith(b"\x89PNG")
    assert f"({page.PICTURES}/evaluate-32.png)" in text
    (tmp_path / "q.json").write_text("[]")
    assert whole_suite(said) == 2 and "is no output of `python -m benchmarks.equal_quality`" in capsys.readouterr().err


def test_the_suite_lists_its_cases(capsys):
    assert whole_suite(["--list", "planning"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "resolve-line", "resolve-fan", "resolve-middle",
    ]  # fmt: skip
    assert whole_suite(["plannin"]) == 2 and "did you mean 'planning'" in capsys.readouterr().err
