"""The fields of sampling: solver, steps, levels, guidance. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt

from chaindiff.io.errors import did_you_mean
from chaindiff.specs.base import Name, NonNegative, Positive, Probability, Problems, Spec
from chaindiff.specs.link import LinkSpec
from chaindiff.specs.path import SamplePath


class ChurnSpec(Spec):
    """EDM's stochastic sampler (algorithm 2)."""

    amount: NonNegative = Field(default=0.0, description="S_churn")
    min: NonNegative = Field(default=0.0, description="S_min")
    max: Positive | None = Field(default=None, description="S_max; none: no limit")
    noise: Positive = Field(default=1.0, description="S_noise")

    def problems(self) -> Problems:
        if self.max is not None and self.min > self.max:
            yield "min", f"{self.min:g} should not be above churn.max, {self.max:g}"


_RANGE = 700  # of logarithms of numbers


# sigma_min and sigma_max of EDM's sampler by discretisation (its published defaults); vp: times from 0.001 to 1
_LEVELS = {
    "edm": (0.002, 80.0),
    "vp": (math.expm1(19.9 / 2 * 1e-6 + 0.1 * 1e-3) ** 0.5, math.expm1(19.9 / 2 + 0.1) ** 0.5),
    "ve": (0.02, 100.0),
    "iddpm": (0.002, 81.0),
    "time": (0.002, 80.0),
}


class LinkSampling(Spec):
    """What sampling does to one given variable."""

    noise: NonNegative = Field(default=0.0, description="noise level of its conditioning augmentation")
    keep: NonNegativeInt | None = Field(
        default=None, description="entries of the vector that are given; none: the most used in training"
    )
    absent: bool = Field(default=False, description="sample as if the value were not known")

    @property
    def sampled(self) -> bool:
        """Whether sampling uses the value at all."""
        return not self.absent and self.keep != 0


class VariableSampling(Spec):
    """What sampling does for one of several variables that are generated together; none: as for all."""

    steps: Annotated[int, Field(gt=0, le=100_000)] | None = None
    sigma_min: Positive | None = None
    sigma_max: Positive | None = None
    rho: Positive | None = None
    shift: Positive | None = None
    guidance: Positive | dict[Name, Positive] | None = None
    guidance_interval: tuple[NonNegative, Positive] | None = None


class SamplerSpec(Spec):
    """How to sample: EDM's independent choices of solver, steps, schedule and noise (section 3), and guidance."""

    solver: Literal["euler", "heun", "dpmpp_2m", "ddim"] = "heun"
    steps: Annotated[int, Field(gt=0, le=100_000)] = 18
    discretisation: Literal["edm", "vp", "ve", "iddpm", "time"] = Field(
        default="edm",
        description="where the steps lie: as published with one formulation, or evenly in the schedule's time",
    )
    schedule: Literal["linear", "vp", "ve", "iddpm", "cosine", "logsnr", "flow"] = Field(
        default="linear", description="sigma(t) and s(t) of the equation that is solved; linear: sigma = t, s = 1"
    )
    scaling: Literal["vp", "none"] | None = Field(
        default=None,
        description="s(t) in place of the schedule's own; vp: variance preserving, none: 1; null: the schedule's",
    )
    sigma_min: Positive | None = Field(
        default=None,
        description="last level above 0; none: as published with the discretisation (edm: 0.002), or what the "
        "parametrisation allows",
    )
    sigma_max: Positive | None = Field(default=None, description="first level; none: likewise (edm: 80)")
    rho: Positive = Field(default=7.0, description="concentration of the edm discretisation at low levels")
    churn: ChurnSpec = ChurnSpec()
    eta: Probability = Field(
        default=0.0,
        description="noise added by ddim (1: ancestral sampling) and dpmpp_2m (1: DPM-Solver++ SDE); 0: none",
    )
    guidance: Positive | dict[Name, Positive] = Field(
        default=1.0,
        description="classifier-free guidance scale, or one for each given variable that can be absent; 1: off",
    )
    guidance_interval: tuple[NonNegative, Positive] | None = Field(
        default=None, description="guide only where the level is above the first and at most the second; none: always"
    )
    links: dict[Name, LinkSampling] = Field(default={}, description="what sampling does to given variables, by name")
    shift: Positive = Field(
        default=1.0, description="multiplies the levels of the steps, between the same ends: the time shift, 1: none"
    )
    path: SamplePath | None = Field(
        default=None,
        description="of several variables: how their levels go down together; none: as training drew them, independent "
        "levels together",
    )
    variables: dict[Name, VariableSampling] = Field(
        default={}, description="of several variables: settings of one of them, by name"
    )

    def of(self, name: str) -> SamplerSpec:
        """The settings for one of several variables."""
        own = self.variables.get(name)
        return self if own is None else self.model_copy(update=own.model_dump(exclude_none=True))

    @property
    def levels(self) -> tuple[float, float]:
        """(sigma_min, sigma_max), as set or as published with the discretisation."""
        low, high = _LEVELS[self.discretisation]
        return self.sigma_min or low, self.sigma_max or high

    def link(self, name: str) -> LinkSampling:
        """What sampling does to a given variable."""
        return self.links.get(name, LinkSampling())

    def problems(self) -> Problems:
        low, high = self.levels
        if low >= high and self.sigma_min:
            yield "sigma_min", f"{low:g} should be below sigma_max, {high:g}"
        elif low >= high:
            yield "sigma_max", f"{high:g} should be above sigma_min, {low:g}"
        if max(abs(math.log(low)), abs(math.log(high))) > _RANGE * self.rho:
            yield "rho", f"{self.rho:g} is too small: the levels to its inverse power are beyond every number"
        if self.rho != type(self).model_fields["rho"].default and self.discretisation != "edm":
            yield "rho", f"shapes the steps of discretisation edm alone, not of {self.discretisation}"
        if self.scaling and self.solver not in ("euler", "heun"):
            yield "scaling", f"is for euler and heun; {self.solver} solves its equation in sigma, whatever the scale"
        if self.eta and self.solver not in ("ddim", "dpmpp_2m"):
            yield "eta", f"is for ddim and dpmpp_2m; {self.solver} takes its noise from `churn`"
        elif self.eta and self.churn.amount:
            yield "eta", "and churn both add noise to every step; set one of them to 0"
        if self.guidance_interval is not None and self.guidance_interval[0] >= self.guidance_interval[1]:
            yield "guidance_interval", "should rise: the level is above the first number and at most the second"

    def untrained(self, links: Mapping[str, LinkSpec], hidden: Collection[str] = ()) -> Problems:
        """What this asks that training did not cover, of given variables and of those that it could `hidden`."""
        for name, said in self.links.items():
            field, link = f"links.{name}", links.get(name)
            if link is None:
                yield field, f"the stage is not given '{name}'{did_you_mean(name, links)}"
                continue
            if said.noise > link.noise:
                problem = f"{said.noise:g} is above {link.noise:g}, the largest level in training (`noise`)"
                yield f"{field}.noise", problem
            if said.keep is not None and said.keep not in link.keep:
                known = f"one of {link.keep}" if link.keep else "which this link does not set"
                yield f"{field}.keep", f"{said.keep} was not trained: it should be in the link's `keep`, {known}"
            if said.absent and not link.can_be_absent:
                problem = "the value is never absent in training: the link has no `dropout`, and no 0 in `keep`"
                yield f"{field}.absent", problem
        droppable = [name for name, link in links.items() if link.can_be_absent and self.link(name).sampled]
        said = {"guidance": self.guidance} | {
            f"variables.{name}.guidance": own.guidance for name, own in self.variables.items() if own.guidance
        }
        for field, guidance in said.items():
            if not isinstance(guidance, dict):
                if guidance != 1 and not droppable:
                    problem = f"{guidance:g} needs unconditional predictions, but no link of this stage has `dropout`"
                    yield field, problem
                continue
            for name in guidance:
                if name not in (*droppable, *hidden):
                    tail = "has no `dropout`, so it is never absent" if name in links else "is not given to this stage"
                    yield f"{field}.{name}", f"needs a prediction without '{name}', which {tail}"
