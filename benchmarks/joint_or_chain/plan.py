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

BUDGET = 20  # evaluations of every network
SOLVER = {"solver": "dpmpp_2m", "steps": BUDGET}
LEARNED = "learned"


def table(curves: Mapping[str, Curve]) -> dict[str, Any]:
    return {"kind": "table", "points": {name: [[*point] for point in curve] for name, curve in curves.items()}}


OFFSETS = {"together": 0.0, "offset 0.1": 0.1, "offset 0.3": 0.3, "offset 0.5": 0.5, "embedding first": 1.0}
EVERY = (*OFFSETS, "image first", LEARNED)


def along(path: str, image: str) -> dict[str, Any]:
    """A path by its name; the embedding leads, but for "image first"."""
    names = ("clip", image) if path in OFFSETS else (image, "clip")
    return table(staggered_curves(names, OFFSETS.get(path, 1.0)))


# Levels as each path draws them, with a share in which the embedding is known, as `independent` has it.
TRAINED = {
    "together": {"kind": "shared", "exact": 0.2},
    **{f"offset {by}": {"kind": "offset", "offset": by, "exact": 0.2} for by in (0.1, 0.3, 0.5)},
    "embedding first": {"kind": "cascaded"},
}
# As many operations as the U-Net and its prior at 16x16.
TRANSFORMER = {"kind": "transformer", "width": 192, "depth": 6, "heads": 6, "patch": 2, "streams": "shared"}


def both(**changes: Any) -> dict[str, Any]:
    return {"stages": {"both": changes}}


@dataclass(frozen=True)
class Arm:
    """A recipe trained once: `changes` are for training, `paths` those that it is sampled along ("": its only one)."""

    name: str
    kind: str  # of the recipes KIND_emojiSIDE
    seed: int = 0
    changes: Mapping[str, Any] = field(default_factory=dict)
    paths: Sequence[str] = ("",)
    side: int = 16
    images: int | None = None  # a training budget for every network

    @property
    def recipe(self) -> str:
        return f"{self.kind}_emoji{self.side}"

    @property
    def image(self) -> str:
        return f"image{self.side}"

    def __str__(self) -> str:
        return f"{self.name}, training seed {self.seed}" if self.seed else self.name

    def base(self, *changes: str) -> Loaded:
        """The recipe as it is trained."""
        train = {"seed": self.seed} | ({"images": self.images} if self.images else {})
        loaded = load_recipe(self.recipe, changes).override(self.changes)
        return loaded.override({"stages": {"*": {"train": train}}})

    def sampled(self, path: str, out: Path) -> Loaded:
        """The recipe as it is sampled along a path; a table's levels go from 80 to 0 by themselves."""
        if path == LEARNED:
            how, loaded = SOLVER, self.base(f"@{out / 'learned.yaml'}")
        else:
            own = {"path": along(path, self.image)} if path else {"sigma_min": 0.01}
            how, loaded = SOLVER | own, self.base()
        return loaded.override(
            {"stages": {"*": {"sample": how}}, "sample": {"precision": "bf16", "execution": "compile"}}
        )

    def folder(self, out: Path) -> Path | None:
        """The run that it is trained in; None: the shipped weights."""
        own = self.seed or self.changes or self.side != 16 or self.images
        return out / "trained" / str(self) if own else None

    def rows(self, path: str, out: Path, count: int, seeds: Sequence[int]) -> list[Row]:
        """Samples along a path, by sampling seeds. Raises UserError where there are no weights."""
        label = f"{self}: {path}" if path else str(self)
        loaded = self.sampled(path, out)
        found = [Row(label, loaded, self.image, out, count, seed, out=self.folder(out)) for seed in seeds]
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


ARMS = (
    Arm("EDM", "edm"),
    Arm("VCDM", "vcdm"),
    Arm("joint", "joint", paths=EVERY),
    Arm("joint transformer", "joint", changes=both(network=TRANSFORMER), paths=("together", "offset 0.3")),
    Arm("EDM", "edm", 1),
    Arm("VCDM", "vcdm", 1),
    Arm("joint", "joint", 1, paths=EVERY),
    *(Arm(f"joint, trained {by}", "joint", changes=both(path=levels), paths=(by,)) for by, levels in TRAINED.items()),
)


def comparison(found: Sequence[Arm], out: Path, count: int, seeds: Sequence[int]) -> tuple[Group, list[str]]:
    """The rows of all arms that have weights, and the names of those that have none."""
    group, missing = Group("Joint model or chain", "main"), []
    for arm in found:
        try:
            group.rows += [arm.rows(path, out, count, seeds) for path in arm.paths]
        except UserError as error:
            if "has no weights" not in str(error):
                raise
            missing.append(str(arm))
    return group, missing
