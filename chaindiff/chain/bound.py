"""A diffusion stage with its conditioning bound: the denoiser that guidance wraps and solvers evaluate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from einops import rearrange, repeat
from torch import Tensor

from chaindiff.edm.denoiser import Levels, Prediction, State
from chaindiff.networks.interface import Condition

if TYPE_CHECKING:
    from chaindiff.chain.diffusion import Diffusion


@dataclass(frozen=True)
class Bound:
    """A stage's denoiser with its conditioning bound."""

    stage: Diffusion
    condition: Condition
    fixed: State = field(default_factory=dict)  # generated variables that are given
    unseen: Mapping[str, Tensor | None] = field(default_factory=dict)  # that it does without: pure noise, or nothing

    @property
    def kin(self) -> int:
        """Denoisers of one network are evaluated as one batch."""
        return id(self.stage)

    def evaluations(self, sigma: Levels) -> int:
        return 1

    def __call__(self, x: State, sigma: Levels) -> Prediction:
        return self.batch([self], x, sigma)[0]

    def batch(self, others: Sequence[Bound], x: State, sigma: Levels) -> list[Prediction]:
        """The predictions of several bound denoisers of this stage, from one call of the network."""
        like, count, terms = self.stage.like, len(next(iter(x.values()))), len(others)
        values, levels, absent = {}, {}, {}
        for name in self.stage.generates:
            value, level = (self.fixed[name], 0.0) if name in self.fixed else (x[name].to(like), sigma[name])
            level = level.to(like) if isinstance(level, Tensor) else torch.full((count,), level).to(like)
            values[name] = repeat(value, "b ... -> (terms b) ...", terms=terms)
            levels[name] = repeat(level, "b -> (terms b)", terms=terms)
            for place, other in enumerate(others):
                rows = slice(place * count, (place + 1) * count)
                if (noise := other.unseen.get(name)) is not None:  # pure noise takes its place
                    values[name][rows], levels[name][rows] = noise, self.stage.pure(name)
                elif name in other.unseen:
                    gone = absent.setdefault(name, torch.zeros_like(levels[name], dtype=torch.bool))
                    gone[rows] = True
        condition = _side_by_side([other.condition for other in others], count)
        found = self.stage.denoise(values, levels, condition, absent)

        def parts(state: State) -> list[State]:
            split = {name: rearrange(state[name], "(terms b) ... -> terms b ...", terms=terms) for name in x}
            return [{name: value[term] for name, value in split.items()} for term in range(terms)]

        variances = parts(found.variance) if found.variance else [None] * terms
        return [Prediction(x0, variance) for x0, variance in zip(parts(found.x0), variances, strict=True)]


def _side_by_side(conditions: Sequence[Condition], count: int) -> Condition:
    """Several conditions as one batch; a condition bound without given variables is shared by all rows."""

    def join(part: str) -> Tensor | None:
        found = [tensor for condition in conditions if (tensor := getattr(condition, part)) is not None]
        whole = [tensor.expand(count, *tensor.shape[1:]) for tensor in found]
        return torch.cat(whole) if len(whole) > 1 else whole[0] if whole else None

    return Condition(*map(join, ("labels", "images", "context", "augment")))
