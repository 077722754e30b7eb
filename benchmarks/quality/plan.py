"""The rows of the experiment: which chains, under which settings, how many samples of each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chaindiff.evaluation.evaluate import Group, Rows, link_rows
from chaindiff.evaluation.rows import Row
from chaindiff.specs.load import Loaded, load_recipe

JUDGES = ("judge_conv", "judge_vit")
KEPT = (0, 4, 8, 16, 32, 64, 128)  # principal components that the any-subset network is given
HEUN = {"solver": "heun", "steps": 18, "sigma_min": None}  # EDM's sampler in all rows, whatever the recipes' own are
STEPS = (4, 6, 9, 12, 18)  # Heun steps of the image stage: 2 n - 1 evaluations
NOISES = (0.0, 0.1, 0.2, 0.3)  # on the link from clip, whose deviation is 0.5
SEEDS = (0, 1, 2)
BEST_KEPT = 16  # of `KEPT`, by the sweep at 1,000 samples: for the headline rows


def subset(keep: int, group: bool, noise: float = 0.0) -> dict[str, Any]:
    """Overrides of vcdm_emoji_class: what its image network is conditioned on."""
    told = {"group": {"absent": not group}}
    return {
        "stages": {
            "clip": {"sample": {"links": told}},
            "image16": {"sample": {"links": {**told, "clip": {"keep": keep, "noise": noise}}}},
        }
    }


def steps(count: int) -> dict[str, Any]:
    return {"stages": {"image16": {"sample": {"steps": count}}}}


@dataclass
class Experiment:
    """All groups of rows, in the order in which they are sampled."""

    out: Path
    quick: bool = False
    groups: list[Group] = field(default_factory=list)

    def __post_init__(self) -> None:
        settings: dict[str, Any] = {"sample": {"precision": "bf16", "execution": "eager" if self.quick else "compile"}}
        small = settings | {"stages": {"image16": {"sample": HEUN}}}
        large = settings | {"stages": {"image16": {"sample": HEUN}, "image": {"sample": HEUN}}}
        self.edm, self.vcdm, self.any = (
            load_recipe(name).override(small) for name in ("edm_emoji16", "vcdm_emoji16", "vcdm_emoji_class")
        )
        self.edm32, self.vcdm32 = (load_recipe(name).override(large) for name in ("edm_emoji", "vcdm_emoji"))
        self.headline = self._headline()
        self.subsets, self.subsets_oracle = self._subsets((), 1000), self._subsets(("clip",), 1000)
        self.nfe = {name: self._nfe(name, recipe) for name, recipe in (("EDM", self.edm), ("VCDM", self.vcdm))}
        self.noise = self._noise()
        self.large = self._large()
        self.links = link_rows(self._rows(self.vcdm32, "image", 1000, SEEDS[:1]), self._assembly(self.vcdm32))
        self.groups = [
            self.headline, self.links, self.large, self.subsets, self.subsets_oracle, self.noise, *self.nfe.values(),
        ]  # fmt: skip

    def _rows(self, recipe: Loaded, of: str, count: int, seeds: Iterable[int]) -> Rows:
        return Rows(recipe, of, self.out, 100 if self.quick else count, list(seeds)[: 1 if self.quick else None], None)

    def _assembly(self, recipe: Loaded):
        return Row("", recipe, recipe.recipe.sample.want[-1], self.out).assembly

    def _row(
        self, label: str, recipe: Loaded, count: int, seeds: Iterable[int], oracle: tuple[str, ...] = (),
        changes: Mapping[str, Any] | None = None, of: str = "image16",
    ) -> list[Row]:  # fmt: skip
        return self._rows(recipe, of, count, seeds)(label, oracle, changes)

    # ------------------------------------------------------------ groups

    def _headline(self) -> Group:
        """5,000 samples at 16x16; the first two rows answer the question, the others say why."""
        best = subset(BEST_KEPT, True)
        rows = [
            self._row("EDM: unconditional", self.edm, 5000, SEEDS),
            self._row("VCDM: clip (PCA-32), then the image", self.vcdm, 5000, SEEDS),
            self._row("VCDM, oracle: clip from the data", self.vcdm, 5000, SEEDS[:1], ("clip",)),
            self._row("any-subset network: EDM-class", self.any, 5000, SEEDS, changes=subset(0, True)),
            self._row(f"any-subset network: VCDM, class, clip-{BEST_KEPT}", self.any, 5000, SEEDS, changes=best),
            self._row(
                f"any-subset network, oracle: class, clip-{BEST_KEPT}", self.any, 5000, SEEDS[:1], ("clip",), best
            ),
        ]
        return Group("Headline", "main", rows)

    def _subsets(self, oracle: tuple[str, ...], count: int) -> Group:
        """One network with more or less conditioning."""
        tail = ", oracle" if oracle else ""
        group = Group(f"One network, more or less conditioning{tail}", "sweep")
        for classes in (False, True):
            for keep in KEPT:
                if oracle and (classes or not keep):
                    continue
                told = " + ".join(["class"] * classes + [f"clip-{keep}"] * bool(keep)) or "nothing"
                group.rows.append(self._row(told + tail, self.any, count, SEEDS[:1], oracle, subset(keep, classes)))
                group.x.append(keep)
        return group

    def _nfe(self, name: str, recipe: Loaded) -> Group:
        rows = [self._row(f"{name}, {n} steps", recipe, 1000, SEEDS[:1], changes=steps(n)) for n in STEPS]
        return Group(f"{name}: quality against evaluations", "sweep", rows, [2 * n - 1 for n in STEPS])

    def _noise(self) -> Group:
        rows = [
            self._row(f"noise {n:g} on the link", self.any, 1000, SEEDS[:1], changes=subset(32, False, n))
            for n in NOISES
        ]
        return Group("Noise on the link from clip to image", "sweep", rows, list(NOISES))

    def _large(self) -> Group:
        """32x32 through the shared super-resolution stage."""
        rows = [
            self._row("EDM, then super-resolution", self.edm32, 1000, SEEDS[:1], of="image"),
            self._row("VCDM, then super-resolution", self.vcdm32, 1000, SEEDS[:1], of="image"),
        ]
        return Group("At 32x32", "main", rows)
