"""A diffusion stage with its conditioning bound: the denoiser that guidance wraps and solvers evaluate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from chaindiff.edm.denoiser import Levels, Prediction, State
from chaindiff.edm.precondition import Shared
from chaindiff.networks.interface import Condition

if TYPE_CHECKING:
    from chaindiff.chain.diffusion import Diffusion


@dataclass(frozen=True)
class Bound:
    """A stage's denoiser with its conditioning bound."""

    stage: Diffusion
    condition: Condition
    shared: Mapping[str, Shared]  # coefficients, by generated variable
    fixed: State = field(default_factory=dict)  # generated variables that are given
    unseen: Mapping[str, Tensor | None] = field(default_factory=dict)  # that it does without: pure noise, or nothing
    joined: dict[Any, tuple[Sequence[Bound], Condition]] = field(default_factory=dict)

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
        count, terms = len(next(iter(x.values()))), len(others)
        values, scales, absent = {}, {}, {}
        for name, shared in self.shared.items():
            like, fixed = shared.like, name in self.fixed
            value, level = (self.fixed[name], 0.0) if fixed else (x[name].to(like), sigma[name])
            noises = [other.unseen.get(name) for other in others]  # pure noise takes the place of what is not seen
            if isinstance(level, Tensor) or any(noise is not None for noise in noises):
                rows = level.to(like) if isinstance(level, Tensor) else like.new_full((count,), level)
                pure = torch.full_like(rows, self.stage.pure(name))
                rows = torch.cat([rows if noise is None else pure for noise in noises])
                scales[name] = shared.coefficients(rows)
            else:
                scales[name] = shared[level]
            each = [value if noise is None else noise.expand_as(value) for noise in noises]
            values[name] = each[0] if terms == 1 else torch.cat(each)
            gone = [name in other.unseen and noise is None for other, noise in zip(others, noises, strict=True)]
            if any(gone):
                absent[name] = torch.tensor(gone).repeat_interleave(count).to(like.device, non_blocking=True)
        found = self.stage.preconditioned(values, scales, self._side_by_side(others, count), absent)

        def parts(state: State) -> list[State]:
            split = {name: state[name].chunk(terms) if terms > 1 else [state[name]] for name in x}
            return [{name: parts[term] for name, parts in split.items()} for term in range(terms)]

        variances = parts(found.variance) if found.variance else [None] * terms
        return [Prediction(x0, variance) for x0, variance in zip(parts(found.x0), variances, strict=True)]

    def _side_by_side(self, others: Sequence[Bound], count: int) -> Condition:
        """The conditions of several as one batch, kept for the next step; what is bound without given variables is
        shared by all rows. They are prepared where the network itself runs, and nobody asks for gradients."""
        plain = torch.is_grad_enabled() or self.stage.run is not None
        key = (count, plain, self.stage.autocast, *map(id, others))
        if key not in self.joined:
            found, prepare = _joined([o.condition for o in others], count), getattr(self.stage.network, "prepare", None)
            if prepare is not None and not plain:
                found = self.stage.precisely(prepare, self.stage.like.device.type, found)
            self.joined[key] = others, found
        return self.joined[key][1]


def _joined(conditions: Sequence[Condition], count: int) -> Condition:
    def join(part: str) -> Tensor | None:
        found = [tensor for condition in conditions if (tensor := getattr(condition, part)) is not None]
        whole = [tensor.expand(count, *tensor.shape[1:]) for tensor in found]
        return torch.cat(whole) if len(whole) > 1 else whole[0] if whole else None

    return Condition(*map(join, ("labels", "images", "context", "augment")))
