"""Rows of a comparison: a chain under some settings, some of its variables taken from the data, and what it samples.

Samples are stored on disk in chunks, so that an interrupted evaluation resumes and memory holds one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from chaindiff.chain.plan import ChainPlan
from chaindiff.chain.request import Value, rows_of
from chaindiff.evaluation.oracle import DataValues, oracle
from chaindiff.execution.prepare import Preparation
from chaindiff.io import tensorfile
from chaindiff.io.digest import digest
from chaindiff.io.errors import UserError
from chaindiff.io.metadata import about
from chaindiff.io.shards import Shards, Stored
from chaindiff.recipe.assembly import Assembly
from chaindiff.recipe.execution import depends_on
from chaindiff.recipe.given import read_given
from chaindiff.recipe.samples import draw
from chaindiff.specs.load import Loaded

BATCH = 125  # samples of one call: one shape for every row, so that a network compiles once
CHUNK = 2 * BATCH  # samples of one file
PASSES = 3  # of training, for one image: forward, and backward at twice its cost (Kaplan et al. 2020, section 2.1)


@dataclass
class Row:
    """`count` samples of `of` and all that is sampled on the way, with the variables in `oracle` from the data.

    All are conditioned on the recipe's `sample.given`; several values are assigned to the samples in turn.
    `folder` is where an evaluation stores its rows; a row's samples are keyed by all that they depend on.
    Raises UserError for requests that the chain cannot answer.
    """

    label: str
    loaded: Loaded
    of: str
    folder: Path
    count: int = 1000
    seed: int = 0
    oracle: Sequence[str] = ()
    out: Path | None = None  # the run whose weights are used

    @cached_property
    def assembly(self) -> Assembly:
        asked = {"seed": self.seed, "want": [self.of], "count": self.count, "batch": BATCH, "given": {}}
        return Assembly(self.loaded.override({"sample": asked}), self.out)

    @property
    def given(self) -> dict[str, Any]:
        """What the recipe gives, as the user wrote it."""
        return self.loaded.recipe.sample.given

    @cached_property
    def values(self) -> dict[str, Value]:
        return read_given(Assembly(self.loaded, self.out), self.given, self.loaded.recipe.sample.count)

    @cached_property
    def plan(self) -> ChainPlan:
        """With any oracle, sources too come from the data: values of one image belong together."""
        skeleton = self.assembly.chain()
        sources = [*skeleton.sources] if self.oracle else []
        given = list(dict.fromkeys([*self.given, *self.oracle, *sources]))
        whole = skeleton.plan([self.of], given).plan
        if not any(self.of in step.outputs for step in whole.steps if step.producer.kind != "encoder"):
            raise UserError(f"no stage samples '{self.of}', which is measured: it follows from what is given")
        if needless := [name for name in whole.unused if name in self.given]:
            hint = f"leave it out: --set sample.given.{needless[0]}=null"
            raise UserError(f"the given '{needless[0]}' has no effect on '{self.of}'", hint=hint)
        return skeleton.plan([self.of], [name for name in given if name not in whole.unused])

    @property
    def from_data(self) -> list[str]:
        return sorted(name for name in self.plan.plan.given if name not in self.given)

    @property
    def made(self) -> list[str]:
        """The variables that stages sample in this row, and what is decoded from them."""
        steps = self.plan.plan.steps
        return [v for step in steps if step.producer.kind in ("stage", "decoder") for v in step.outputs]

    @cached_property
    def key(self) -> str:
        """Fingerprint of all that the samples depend on except their number."""
        weights = {name: self.assembly.stages[name].weights() for name in self.plan.running}
        depends = depends_on(self.assembly, self.plan, weights, self.values)
        for irrelevant in ("want", "batch"):
            depends["sample"].pop(irrelevant)
        depends["sample"]["precision"] = self.assembly.recipe.sample.precision
        data = self.assembly.data.content if self.from_data else None
        return digest([depends, self.made, self.from_data, None, data, CHUNK])

    @cached_property
    def store(self) -> Shards:
        """The samples on disk; a last chunk that is whole serves larger counts too."""
        return Shards(self.folder / "rows" / self.key, self.key, -(-self.count // CHUNK) * CHUNK, CHUNK)

    def draw(self) -> Iterator[tuple[int, int]]:
        """Sample what is missing; yields (samples done, samples in all) as it goes."""
        if not self.store.missing():
            return
        assembly, whole = self.assembly, len(self.store)
        chain = assembly.chain(self.plan.running)
        given = {
            n: v if len(v) == 1 else rows_of(v, [row % len(v) for row in range(whole)]) for n, v in self.values.items()
        }
        if self.from_data:
            values = DataValues(assembly, assembly.data, self.folder / "data")
            given |= oracle(values, self.from_data, whole, self.seed)
        asked = assembly.recipe.sample
        settings = {"seed": self.seed, "batch": BATCH, "want": self.made, "given": given}
        settings["max_memory"] = asked.max_memory
        ready = Preparation(chain, chain.request(whole, **settings), asked)
        choices, missing = ready.apply(), self.store.missing()
        yield from draw(chain, self.store, **settings)
        ready.record(choices, sum(map(len, missing)))

    def samples(self, name: str) -> Stored:
        """The samples of a variable: images as uint8 [n, 3, h, w], others as sampled."""
        return Stored(self.store, name, self.count)

    def images(self, rows: Sequence[int]) -> Tensor:
        """Samples of what is measured, uint8 [n, 3, h, w]."""
        return self.samples(self.of)[rows]

    @cached_property
    def training_images(self) -> dict[str, int | None]:
        """The images that each running stage has seen, in the order in which stages run; `trained_images`."""
        return {n: trained_images(self.assembly.stages[n].weights()) for n in self.plan.running}

    @property
    def training_pflop(self) -> float | None:
        """What training the running stages took, in 10^15 floating-point operations; None if not all is known.

        Images seen x 3 x an evaluation of the network: the usual estimate, without optimizer, averages and encoders.
        """
        total = 0.0
        for name, images in self.training_images.items():
            if images is None:
                return None
            total += images * PASSES * self.plan.costs[name].flops
        return total / 1e15

    def about(self) -> dict[str, Any]:
        """The details reported beside this row's figures; sampling costs are of one image."""
        costs = {name: self.plan.costs[name] for name in self.plan.running}
        return {
            "row": self.label,
            "recipe": self.assembly.recipe.name,
            "of": self.of,
            "from data": self.from_data,
            "given": {n: f"{list(v.shape)} numbers" if isinstance(v, Tensor) else v for n, v in self.given.items()},
            "count": self.count,
            "seed": self.seed,
            "nfe": {name: cost.nfe for name, cost in costs.items()},
            "gflops": sum(cost.total_flops for cost in costs.values()) / 1e9,
            "training images": self.training_images,
            "training pflop": self.training_pflop,
            "seconds per image": self.samples("seconds")[:].median().item(),  # without what a compilation took
        }


def trained_images(weights: Path) -> int | None:
    """The images behind a stage's weights, by the file's metadata: what was seen, not what the recipe asked for.

    None for imported weights, and for those that began as another network's: what that has seen is unknown.
    """
    kept = about(tensorfile.metadata(weights), weights)
    begun = kept.stage is not None and kept.stage.init is not None
    return None if kept.imported is not None or begun else kept.images or None
