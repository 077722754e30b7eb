"""How a diffusion stage is sampled with given settings: noise levels, the solver's table, guidance, costs."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chaindiff.chain.formulation import curves
from chaindiff.chain.stage import Cost
from chaindiff.edm.denoiser import Levels, Prediction, State
from chaindiff.edm.levels import Path, grid, staggered
from chaindiff.edm.schedules import schedule
from chaindiff.edm.solvers import Churn, Update, evaluations, updates
from chaindiff.guidance.algebra import Weight, guided
from chaindiff.guidance.classifier_free import guidance_terms
from chaindiff.io.errors import UserError
from chaindiff.specs.path import OffsetPath, TablePath, hideable, sampled
from chaindiff.specs.sampling import SamplerSpec

if TYPE_CHECKING:
    from chaindiff.chain.diffusion import Diffusion


@dataclass(frozen=True)
class Sampling:
    """A stage and the settings of a sampler. Raises UserError for settings that the stage was not trained for."""

    stage: Diffusion
    settings: SamplerSpec

    def __post_init__(self):
        stage = self.stage
        links = {link.variable.name: link.spec for link in stage.conditioner}
        for place, problem in self.settings.untrained(links, hideable(stage.trained_path, [*stage.generates])):
            raise UserError(problem, f"stages.{stage.name}.sample.{place}")

    def levels(self, name: str) -> tuple[float, float]:
        """(sigma_min, sigma_max) of a variable: as set or published, in its preconditioning's range.

        Raises UserError if a level that was set lies outside.
        """
        sampler, known = self.settings.of(name), self.stage.preconditions[name]
        for bound in ("sigma_min", "sigma_max"):
            said = getattr(sampler, bound)
            if said is not None and not known.sigma_min <= said <= known.sigma_max:
                raise UserError(
                    f"{said:g} is outside the noise levels of preconditioning '{known.kind}', "
                    f"from {known.sigma_min:g} to {known.sigma_max:g}",
                    f"stages.{self.stage.name}.sample.{bound}",
                    "leave it out: the default lies within that range",
                )
        low, high = sampler.levels
        return max(low, known.sigma_min), min(high, known.sigma_max)

    def path(self, moving: Iterable[str] | None = None) -> Path:
        """The noise levels, from sigma_max down to 0, rounded to the preconditioning's levels.

        `moving` are the variables that are sampled, by default all that the stage generates.
        """
        s, stage = self.settings, self.stage
        names = [v for v in stage.generates if moving is None or v in set(moving)]
        grids, chosen = {}, {}
        for name in names:
            own = s.of(name)
            low, high = self.levels(name)
            chosen[name] = schedule(own.schedule, low, high, own.scaling)
            try:
                levels = grid(own.discretisation, own.steps, low / own.shift, high / own.shift, own.rho, chosen[name])
            except ValueError as error:
                raise UserError(str(error), f"stages.{stage.name}.sample.steps") from error
            grids[name] = [stage.preconditions[name].round(level * own.shift) for level in levels]
        path = s.path or sampled(stage.trained_path)
        if isinstance(path, TablePath):
            return curves(path, names).path(names, s.steps, chosen)
        return staggered(grids, path.offset if isinstance(path, OffsetPath) else 0.0, chosen)

    def undrawn(self, path: Path) -> str:
        """What to say of a path of several variables with levels that training never drew together."""
        stage = self.stage
        for step in range(path.steps if len(stage.generates) > 1 else 0):
            levels = {**dict.fromkeys(stage.generates, 0.0), **path.sigma(step)}
            if not stage.family.drew(levels):
                said = ", ".join(f"{name} {level:.3g}" for name, level in levels.items())
                return f"the path goes through levels ({said}) that training, with levels of kind " + (
                    f"'{stage.trained_path.kind}', never drew together"
                )
        return ""

    def table(self, path: Path) -> list[Update]:
        """The solver's table on a path. Raises UserError for settings that contradict each other."""
        s = self.settings
        churn = Churn(s.churn.amount, s.churn.min, math.inf if s.churn.max is None else s.churn.max, s.churn.noise)
        try:
            return updates(path, s.solver, churn=churn, eta=s.eta, round=self.stage.precondition.round)
        except ValueError as error:
            raise UserError(str(error), f"stages.{self.stage.name}.sample") from error

    @property
    def droppable(self) -> list[str]:
        """The given variables that sampling uses and training sometimes dropped."""
        links = {link.variable.name: link.spec for link in self.stage.conditioner}
        return [name for name, spec in links.items() if spec.can_be_absent and self.settings.link(name).sampled]

    def terms(self, moving: Iterable[str]) -> list[tuple[frozenset[str], Mapping[str, Weight]]]:
        """The guidance of the variables that move: which others a prediction is made without, and its weights.

        A variable's prediction is guided by the given variables that can be absent, and by those of the generated ones
        that `guidance` names (ReDi's representation guidance, arXiv 2504.16064; UniDiffuser).
        """
        found: dict[frozenset[str], dict[str, Weight]] = {}
        for name in moving:
            s, own, told = self.settings.of(name), self.settings.variables.get(name), self.droppable
            scale, within = s.guidance, name if own and own.guidance_interval else None
            if isinstance(scale, Mapping):
                scale = {v: by for v, by in scale.items() if v != name}
                told += [v for v in self.stage.generates if v in scale]
            for gone, weight in guidance_terms(scale, told, s.guidance_interval, within):
                found.setdefault(gone, {})[name] = weight
        return [*found.items()]

    def cost(self, moving: Collection[str]) -> Cost:
        """What one sample of these variables costs; NFE counts every term of the guidance."""
        from chaindiff.chain.cost import count, weighed

        s, stage = self.settings, self.stage
        path, terms = self.path(moving), self.terms(moving)
        nfe = evaluations(self.table(path), guided([(_Counted(), weights) for _, weights in terms]))
        counts, (parameters, weight_bytes) = count(stage.network, stage.interface), weighed(stage.conditioner)
        told = [link.variable.name for link in stage.conditioner if link.tells_level]
        return Cost(
            parameters=counts.parameters + parameters,
            flops=counts.flops,
            nfe=nfe,
            weight_bytes=counts.weight_bytes + weight_bytes,
            activation_bytes=counts.activation_bytes * len(terms),  # which are evaluated as one batch
            how=f"{s.solver}, {s.steps} steps",
            notes={name: f"noise {s.link(name).noise:g}" for name in told},
            warning=self.undrawn(path),
        )


class _Counted:
    """One evaluation of a network, for counting."""

    def __call__(self, x: State, sigma: Levels) -> Prediction:
        raise NotImplementedError

    def evaluations(self, sigma: Levels) -> int:
        return 1
