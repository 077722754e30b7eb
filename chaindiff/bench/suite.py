"""What can be measured, by name, and results as they are stored. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import Field, ValidationError

from chaindiff.io.errors import UserError, did_you_mean
from chaindiff.io.files import read_whole, write_whole
from chaindiff.specs.base import Positive, Spec


class Case(NamedTuple):
    """A piece of work, done by a function of its name in the module `home`; `beside` is its reference workload."""

    group: str
    about: str
    unit: str
    home: str = "chaindiff.bench.works"
    beside: Literal["compute", "host", "process"] = "compute"


CASES = {
    "evaluate-32": Case("evaluation", "one evaluation of a 32x32 DDPM++, batch 64", "images"),
    "evaluate-ffhq64": Case("evaluation", "one evaluation of EDM's FFHQ-64 DDPM++, batch 4", "images"),
    "train-32": Case("training", "a step of the whole training loop of a 32x32 DDPM++, batch 64", "images"),
    "sample-16": Case("sampling", "64 images of edm_emoji16, 6 evaluations", "images"),
    "chain": Case("sampling", "64 images of vcdm_emoji with the recipe's settings", "images"),
    "encode": Case("data", "embedding 256 images of 64x64 by the emoji CLIP", "images"),
}


def chosen(names: Sequence[str], cases: Mapping[str, Case] = CASES) -> list[str]:
    """The cases of these names or groups, by default all. Raises UserError for others."""
    known = dict.fromkeys([*cases, *(case.group for case in cases.values())])
    for name in names:
        if name not in known:
            raise UserError(f"there is nothing to measure called '{name}'{did_you_mean(name, known)}")
    return [name for name, case in cases.items() if not names or {name, case.group} & {*names}]


class SideResult(Spec):
    """Seconds of every repeat, and of the reference workload beside it; `count` is what one repeat makes."""

    seconds: list[Positive] = Field(default=[])
    beside: list[Positive] = Field(default=[])
    count: Positive = 1.0
    facts: dict[str, float] = Field(default={}, description="parameters, flops of one image, peak_bytes")
    missing: str = Field(default="", description="why it was not measured")


class CaseResult(Spec):
    group: str
    about: str
    unit: str
    sides: dict[str, SideResult]


class Results(Spec):
    """One run of the suite: `chaindiff bench --json`."""

    format: Literal[1] = 1
    date: str
    machine: dict[str, str]
    versions: dict[str, str]
    cases: dict[str, CaseResult]

    def write(self, path: Path) -> None:
        write_whole(path, self.model_dump_json(indent=1))


def read(path: Path) -> Results:
    """Results of an earlier run. Raises UserError if the file holds none."""
    try:
        return Results.model_validate_json(read_whole(path))
    except ValidationError as error:
        first = error.errors()[0]
        problem = f"{'.'.join(map(str, first['loc']))}: {first['msg']}".strip(": ")
        raise UserError(f"is no output of `chaindiff bench --json` ({problem})", str(path)) from None
