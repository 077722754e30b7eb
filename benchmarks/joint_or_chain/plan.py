"""The arms of the comparison: what is trained, and the paths along which each is sampled."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chaindiff.edm.families import Curve, staggered_curves
from chaindiff.evaluation.evaluate import Group
from chaindiff.evaluation.rows import Row
from chaindiff.io.errors import UserError
from chaindiff.io.files import write_whole
from chaindiff.specs.load import Loaded, load_recipe
from chaindiff.specs.lock import resolved

OF, JOINT = "image16", "joint_emoji16"
BUDGET = 20  # evaluations of every network
SOLVER = {"solver": "dpmpp_2m", "steps": BUDGET}
LEARNED = "learned"


def table(curves: Mapping[str, Curve]) -> dict[str, Any]:
    return {"kind": "table", "points": {name: [[*point] for point in curve] for name, curve in curves.items()}}


def staggered(offset: float, *names: str) -> dict[str, Any]:
    """The first variable leads by `offset` of a pass."""
    return table(staggered_curves(names, offset))


PATHS = {
    "together": staggered(0.0, "clip", OF),
    "offset 0.1": staggered(0.1, "clip", OF),
    "offset 0.3": staggered(0.3, "clip", OF),
    "offset 0.5": staggered(0.5, "clip", OF),
    "embedding first": staggered(1.0, "clip", OF),
    "image first": staggered(1.0, OF, "clip"),
}
# Levels as each path draws them, with a share in which the embedding is known, as `independent` has it.
TRAINED = {
    "together": {"kind": "shared", "exact": 0.2},
    **{f"offset {by}": {"kind": "offset", "offset": by, "exact": 0.2} for by in (0.1, 0.3, 0.5)},
    "embedding first": {"kind": "cascaded"},
}
# As many operations as the U-Net and its prior.
TRANSFORMER = {"kind": "transformer", "width": 192, "depth": 6, "heads": 6, "patch": 2, "streams": "shared"}


def both(**changes: Any) -> dict[str, Any]:
    return {"stages": {"both": changes}}


@dataclass(frozen=True)
class Arm:
    """A recipe trained once: `changes` are for training, `paths` those that it is sampled along ("": its only one)."""

    name: str
    recipe: str
    seed: int = 0
    changes: Mapping[str, Any] = field(default_factory=dict)
    paths: Sequence[str] = ("",)

    def __str__(self) -> str:
        return f"{self.name}, training seed {self.seed}" if self.seed else self.name

    def base(self) -> Loaded:
        stages = load_recipe(self.recipe).recipe.stages
        seed = {"stages": {name: {"train": {"seed": self.seed}} for name in stages}}
        return load_recipe(self.recipe).override(self.changes).override(seed)

    def sampled(self, path: str, out: Path) -> Loaded:
        """The recipe as it is sampled along a path; a table's levels go from 80 to 0 by themselves."""
        how: dict[str, Any] = SOLVER | ({"path": PATHS[path]} if path in PATHS else {})
        stages = {name: {"sample": how if path else how | {"sigma_min": 0.01}} for name in self.base().recipe.stages}
        found = self.base().override({"stages": stages, "sample": {"precision": "float32"}})
        if path == LEARNED:
            found = found.override(load_recipe(self.recipe, [f"@{out / 'learned.yaml'}"]).tree)
        return found

    def folder(self, out: Path) -> Path | None:
        """The run that it is trained in; None: the shipped weights."""
        return out / "trained" / str(self) if self.seed or self.changes else None

    def rows(self, path: str, out: Path, count: int, seeds: Sequence[int]) -> list[Row]:
        """Samples along a path, by sampling seeds. Raises UserError where there are no weights."""
        label = f"{self}: {path}" if path else str(self)
        loaded = self.sampled(path, out)
        found = [Row(label, loaded, OF, out, count, seed, out=self.folder(out)) for seed in seeds]
        found[0].key  # noqa: B018  # looks for the weights
        return found

    def train(self, out: Path, seconds: float | None) -> bool:
        """Whether it is trained, after at most so long; an interrupted training resumes at its last checkpoint."""
        folder = self.folder(out)
        if folder is None:
            return True
        recipe = folder.with_suffix(".yaml")
        write_whole(recipe, resolved(self.base().recipe))
        command = [sys.executable, "-m", "chaindiff", "train", str(recipe), "--out", str(folder)]
        try:
            return subprocess.run(command, check=False, timeout=seconds).returncode == 0
        except subprocess.TimeoutExpired:
            return False


EVERY = (*PATHS, LEARNED)
ARMS = (
    Arm("EDM", "edm_emoji16"),
    Arm("VCDM", "vcdm_emoji16"),
    Arm("joint", JOINT, paths=EVERY),
    Arm("joint transformer", JOINT, changes=both(network=TRANSFORMER), paths=("together", "offset 0.3")),
    Arm("EDM", "edm_emoji16", 1),
    Arm("VCDM", "vcdm_emoji16", 1),
    Arm("joint", JOINT, 1, paths=EVERY),
    *(Arm(f"joint, trained {by}", JOINT, changes=both(path=levels), paths=(by,)) for by, levels in TRAINED.items()),
)  # fmt: skip


def comparison(out: Path, count: int, seeds: Sequence[int]) -> tuple[Group, list[str]]:
    """The rows of all arms that have weights, and the names of those that have none."""
    group, missing = Group("Joint model or chain", "main"), []
    for arm in ARMS:
        for path in arm.paths:
            try:
                group.rows.append(arm.rows(path, out, count, seeds))
            except UserError as error:
                missing.append(f"{arm}{f': {path}' * bool(path)} ({str(error).splitlines()[0]})")
    return group, missing
