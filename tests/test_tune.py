"""Fitted paths against the closed forms of Gaussians, whose covariance a solver's table carries on without sampling."""

from __future__ import annotations

import json
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.optimize import minimize
from test_joint import COVARIANCE, A, B, ExactGaussian
from torch import Tensor

from chaindiff import cli
from chaindiff.chain.diffusion import Diffusion
from chaindiff.chain.formulation import curves
from chaindiff.commands.tune import measured
from chaindiff.edm import tuning
from chaindiff.edm.families import Ruler
from chaindiff.edm.levels import Path as Levels
from chaindiff.edm.levels import together
from chaindiff.edm.solvers import updates
from chaindiff.edm.tuning import Errors, fitted, lost
from chaindiff.io.errors import UserError
from chaindiff.specs.load import load_recipe
from chaindiff.specs.path import OffsetPath, TablePath

RULER = Ruler()
GRID = np.linspace(0, 1, 13)
STEPS = 14


def gains(covariance: Tensor, sigma: Tensor) -> Tensor:
    """The posterior mean as a matrix, at levels [..., variables]."""
    total = covariance + torch.diag_embed(sigma**2)
    return torch.linalg.solve(total, covariance.expand_as(total)).mT


def pair(correlation: float, first: float, second: float) -> Tensor:
    stds = torch.tensor([first, second], dtype=torch.float64)
    ones = torch.tensor([[1.0, correlation], [correlation, 1.0]], dtype=torch.float64)
    return ones * torch.outer(stds, stds)


def errors_of(covariance: Tensor, grid: np.ndarray = GRID) -> np.ndarray:
    """The exact squared error on a grid of progress, the mean of each variable's relative to its variance."""
    levels = RULER.sigma(torch.from_numpy(grid))
    sigma = torch.stack(torch.meshgrid(*[levels] * len(covariance), indexing="ij"), dim=-1)
    left = covariance - gains(covariance, sigma.clamp_min(1e-6)) @ covariance
    return (left.diagonal(dim1=-2, dim2=-1) / covariance.diagonal()).mean(-1).numpy()


def lost_by_solver(covariance: Tensor, path: Levels) -> float:
    """The mean share of their variance that the variables lack after Euler's method, by its own table."""
    names = [*path.times]
    start = torch.tensor([path.sigma(0)[v] for v in names], dtype=torch.float64)
    state = covariance + torch.diag(start**2)
    for row in updates(path, "euler"):
        assert row.sigma is not None
        gain = gains(covariance, torch.tensor([row.sigma[v] for v in names], dtype=torch.float64))
        step = torch.eye(len(names), dtype=torch.float64)
        for i, v in enumerate(names):
            if v in row.rows:
                step[i] = row.rows[v].clean * gain[i]
                step[i, i] += row.rows[v].x
        state = step @ state @ step.T
    return float((1 - state.diagonal() / covariance.diagonal()).mean())


def lost_by_recursion(covariance: Tensor, progress: Tensor) -> Tensor:
    """The same for progress [steps + 1, variables], written for gradients."""
    sigma = torch.cat([RULER.sigma(progress[:-1]), torch.zeros_like(progress[:1])])
    state = covariance + torch.diag(sigma[0] ** 2)
    for here, there in pairwise(sigma):
        ratio = there / here
        step = torch.diag(ratio) + (1 - ratio)[:, None] * gains(covariance, here)
        state = step @ state @ step.T
    return (1 - state.diagonal() / covariance.diagonal()).mean()


@pytest.mark.parametrize(("spread", "sigma", "ratio"), [(0.5, 2.0, 0.8), (0.5, 0.3, 0.0), (2.0, 0.7, 0.4)])
def test_a_step_loses_its_share_of_what_the_error_falls_by(spread: float, sigma: float, ratio: float) -> None:
    """Equation 26: Euler's step at the solver's coefficients, carried to the end by the exact flow."""
    variance, after = spread**2, ratio * sigma
    take = updates(together({"x": [sigma, after]}), "euler")[0].rows["x"]
    gain = variance / (variance + sigma**2)
    stepped = (take.x + take.clean * gain) ** 2 * (variance + sigma**2)
    missing = (variance + after**2 - stepped) * variance / (variance + after**2)
    error = [variance * level**2 / (variance + level**2) for level in (sigma, after)]
    assert missing == pytest.approx((1 - ratio) / (1 + ratio) * (error[0] - error[1]), rel=1e-12)


@pytest.mark.parametrize(("correlation", "steps"), [(0.0, 40), (0.5, 14), (0.9, 40), (0.99, 14)])
def test_the_loss_is_that_of_the_solver(correlation: float, steps: int) -> None:
    """Up to what an earlier step lost, which later steps carry on not the exact flow: by as much again."""
    covariance = pair(correlation, 0.5, 0.2)
    errors = Errors.of(errors_of(covariance, np.linspace(0, 1, 33)))
    for offset in (0.0, 0.2, 0.6):
        path = curves(OffsetPath(kind="offset", offset=offset), ["a", "b"]).path(["a", "b"], steps)
        levels = torch.tensor([[*path.sigma(k).values()] for k in range(path.steps + 1)], dtype=torch.float64)
        predicted = float(lost(errors, RULER.progress(levels), RULER))
        assert predicted == pytest.approx(lost_by_solver(covariance, path), rel=predicted / 2)


@pytest.mark.parametrize(
    ("correlation", "first", "second"),
    [
        pytest.param(0.0, 0.5, 0.5, marks=pytest.mark.slow),
        pytest.param(0.5, 0.5, 0.05, marks=pytest.mark.slow),
        (0.9, 1.0, 0.2),
        pytest.param(0.99, 0.5, 0.5, marks=pytest.mark.slow),
        pytest.param(0.99, 0.5, 0.05, marks=pytest.mark.slow),
    ],
)
def test_the_fitted_path_is_within_one_percent_of_the_best_of_its_class(correlation, first, second) -> None:
    covariance = pair(correlation, first, second)
    progress, predicted = fitted(Errors.of(errors_of(covariance)), STEPS, RULER)
    assert (np.diff(progress, axis=0) >= 0).all() and (progress[0] == 0).all() and (progress[-1] == 1).all()
    leader = int(progress.mean(0).argmax())
    slopes = np.diff(progress[:, 1 - leader]) / np.diff(progress[:, leader])
    assert (np.diff(slopes[:-1]) > -1e-6).all()  # convex; the last step ends both passes
    points = {v: [(k / STEPS, float(y)) for k, y in enumerate(progress[:, i])] for i, v in enumerate("ab")}
    table = curves(TablePath(kind="table", points=points), ["a", "b"]).path(["a", "b"], STEPS)
    assert table.steps == STEPS
    mine = lost_by_solver(covariance, table)
    assert mine == pytest.approx(float(lost_by_recursion(covariance, torch.from_numpy(progress))), rel=1e-9)
    assert mine == pytest.approx(predicted, rel=0.75 * predicted)  # an earlier loss is carried on otherwise
    for offset, names in product((0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0), (["a", "b"], ["b", "a"])):
        for steps in range(3, STEPS + 1):  # the most steps of a pass that make so many in all
            path = curves(OffsetPath(kind="offset", offset=offset), names).path(names, steps)
            if path.steps <= STEPS:
                turned = Levels({v: path.times[v] for v in "ab"}, path.schedules)
                assert mine < lost_by_solver(covariance, turned)
    best = np.inf
    for order in ((0, 1), (1, 0)):

        def loss(values: np.ndarray, order=order) -> tuple[float, np.ndarray]:
            told = torch.tensor(values, requires_grad=True)
            total = lost_by_recursion(covariance, tuning._convex(told.reshape(2, STEPS), order))
            total.backward()
            return float(total.detach()), told.grad.numpy()

        for start in (-5.0, -2.0):
            begin = np.repeat([0.0, start], STEPS)
            best = min(best, minimize(loss, begin, jac=True, method="L-BFGS-B", options={"maxiter": 300}).fun)
    assert best <= mine <= 1.01 * best


def test_three_variables() -> None:
    covariance = torch.diag(torch.tensor([0.25, 0.25, 0.25]).double()) + 0.15 * (1 - torch.eye(3).double())
    errors = Errors.of(errors_of(covariance, np.linspace(0, 1, 9)))
    progress, predicted = fitted(errors, 6, RULER)
    even = torch.linspace(0, 1, 7, dtype=torch.float64)[:, None].expand(7, 3)
    assert predicted < 0.8 * float(lost(errors, even, RULER))
    assert float(np.ptp(progress, axis=1).max()) < 0.1  # nothing tells them apart: they go together


def test_measured_errors_are_those_of_the_posterior() -> None:
    stage = Diffusion([A, B], network=ExactGaussian(), name="both")
    root = torch.linalg.cholesky(COVARIANCE)
    rows = torch.randn(6000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) @ root.T
    levels = [80.0, 2.0, 0.5, 0.1]
    found = measured(stage, [{"a": rows[:, :1], "b": rows[:, 1:]}], levels)
    for (i, first), (j, second) in product(enumerate(levels), repeat=2):
        sigma = torch.tensor([first, second, second], dtype=torch.float64)
        left = (COVARIANCE - gains(COVARIANCE, sigma) @ COVARIANCE).diagonal() / COVARIANCE.diagonal()
        whole = COVARIANCE.diagonal()[1:] / COVARIANCE.diagonal()[1:].sum()
        assert found[i, j] == pytest.approx(float((left[0] + left[1:] @ whole) / 2), rel=0.06)


# ------------------------------------------------------------ the command

RECIPE = """
name: tiny
data: {{path: {data}}}
variables:
  photo: {{kind: image, shape: [3, 16, 16]}}
  image: {{kind: image, shape: [3, 8, 8], encoder: {{kind: resize, of: photo}}}}
  small: {{kind: image, shape: [3, 4, 4], encoder: {{kind: resize, of: image}}}}
stages:
  both:
    generates: [small, image]
    network: {{kind: transformer, width: 16, depth: 1, heads: 2, patch: 4}}
    augment: {{probability: 0.5}}
    train: {{images: 64, batch: 16, execution: eager, optimizer: {{lr: 1.0e-3}}}}
    sample: {{solver: euler, steps: 6, path: {{kind: offset, offset: 0.5}}}}
sample: {{want: [small, image], count: 2, execution: eager}}
"""


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    rng = np.random.default_rng(0)
    for index in range(4):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(f"data/{index}.png")
    Path("tiny.yaml").write_text(RECIPE.format(data=tmp_path / "data"))

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main([*arguments])
        return ended.value.code, *capsys.readouterr()

    return call


def test_a_trained_stage_is_tuned_and_sampled_on_its_path(command) -> None:
    assert "has no weights yet" in command("tune", "tiny.yaml", "--path")[2]
    assert command("train", "tiny.yaml")[0] == 0
    status, out, _ = command("tune", "tiny.yaml", "--path", "--count", "4", "--json")
    facts = json.loads(out)
    assert status == 0 and facts["evaluations"] == 13**2 * 4
    losses = {what.split(",")[0]: value for what, value in facts["lost"].items()}
    assert losses["the fitted path"] <= min(losses.values()) and len(losses) == 3
    file = "runs/tiny/both.path.yaml"
    assert facts["file"] == file and Path(file).read_text().startswith("# by chaindiff tune tiny.yaml --path")
    found = load_recipe("tiny.yaml", changes=[f"@{file}", "sample.count=3"]).recipe
    points = found.stages["both"].sample.path.points
    assert [*points] == ["small", "image"] and len(points["image"]) == 9 + 1  # as many steps as the offset path had
    status, out, _ = command("plan", "tiny.yaml", "--set", f"@{file}")
    assert status == 0 and "NFE 9" in out and "warning" not in out
    assert "kind: table" in command("show", "tiny.yaml", "--set", f"@{file}")[1]
    assert command("sample", "tiny.yaml", "--set", f"@{file}")[0] == 0
    assert "table" in Path("runs/tiny/recipe.lock.yaml").read_text()
    narrow = command("tune", "tiny.yaml", "--path", "--set", "stages.both.path={kind: shared}")[2]
    assert "has no weights yet" in narrow  # another path of training: another stage


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["tune", "tiny.yaml"], "error: nothing to fit was named\n  --path fits the path of a joint stage"),
        (["tune", "tiny.yaml", "--path", "--stage", "bth"], "there is no stage 'bth'; did you mean 'both'?"),
        (["tune", "edm_emoji16", "--path"], "every stage of this recipe generates one variable; a path is for several"),
        (["tune", "vcdm_emoji16", "--path", "--stage", "clip"], "stage 'clip' generates one variable; a path is for"),
        (["plan", "tiny.yaml", "--set", "@gone.yaml"], "--set @gone.yaml: there is no file gone.yaml\n  after @ comes"),
        (["plan", "tiny.yaml", "--set", "@data"], "data: cannot be read: it is not a regular file"),
        (["plan", "tiny.yaml", "--set", "@bad.yaml"], "bad.yaml:2: stages.both.sample: unknown field 'stpes'; did you"),
        (["plan", "tiny.yaml", "--set", "@list.yaml"], "list.yaml:1: should hold fields (`name: value`), not a list"),
        (["plan", "tiny.yaml", "--set", "@code.yaml"], "stages.both.network.kind: 'os:getcwd' is code, which runs"),
    ],
)  # fmt: skip
def test_mistakes_are_explained(command, arguments: list[str], expected: str) -> None:
    Path("bad.yaml").write_text("stages:\n  both: {sample: {stpes: 3}}\n")
    Path("list.yaml").write_text("[1, 2]\n")
    Path("code.yaml").write_text("stages: {both: {network: {kind: 'os:getcwd'}}}\n")
    status, _, said = command(*arguments)
    assert status == 2 and expected in said


def test_a_path_is_not_fitted_where_training_drew_one_only(command) -> None:
    text = Path("tiny.yaml").read_text().replace("    train:", "    path: {kind: shared}\n    train:")
    Path("tiny.yaml").write_text(text)
    assert command("train", "tiny.yaml")[0] == 0
    said = command("tune", "tiny.yaml", "--path")[2]
    assert "tiny.yaml:13: stage 'both' has not learned every combination of levels, such as small 80, image" in said


# ------------------------------------------------------------ what an override of a list of names means


def test_a_mapping_over_a_list_of_names_keeps_the_names_and_their_order() -> None:
    changes = ["stages.both.generates={image16: {weight: 2}}"]
    generates = load_recipe("joint_emoji16", changes=changes).recipe.stages["both"].generates
    assert [(name, own.weight) for name, own in generates.items()] == [("clip", 1), ("image16", 2)]
    dotted = load_recipe("joint_emoji16", changes=["stages.both.generates.image16.weight=2"]).recipe
    assert dotted.stages["both"].generates == generates
    turned = load_recipe("joint_emoji16", changes=["stages.both.generates=[image16, clip]", *changes]).recipe
    assert [*turned.stages["both"].generates] == ["image16", "clip"]
    with pytest.raises(UserError, match="this list has no item '7'"):
        load_recipe("joint_emoji16", changes=["stages.both.generates.7=image16"])
