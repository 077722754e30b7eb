"""Parts of a value that are known: inpainting."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from chaindiff.edm.denoiser import Denoiser, Levels, Prediction, State, expand
from chaindiff.guidance.algebra import Wrapper


@dataclass(frozen=True)
class Known(Wrapper):
    """See `known`."""

    value: State
    mask: State
    solves: int

    def evaluations(self, sigma: Levels) -> int:
        """A gradient counts as two evaluations, as the backward pass does in training."""
        return self.inner.evaluations(sigma) * (1 + 2 * self.solves)

    def __call__(self, x: State, sigma: Levels) -> Prediction:
        found = self._corrected(x, sigma) if self.solves else self.inner(x, sigma)
        x0 = {
            v: torch.where(self.mask[v], self.value[v].to(p), p) if v in self.mask else p for v, p in found.x0.items()
        }
        return Prediction(x0, found.variance)

    @torch.enable_grad()
    def _corrected(self, x: State, sigma: Levels) -> Prediction:
        """x0 + C m u with m C m u = m (value - x0), where C = Cov(x0 | x): conjugate gradients, all samples at once."""
        ins = {v: x[v].detach().requires_grad_() for v in x if float(sigma[v]) > 0}
        found = self.inner({**x, **ins}, sigma)
        out = [found.x0[v] for v in ins]
        masks = [self.mask.get(v, torch.zeros((), dtype=torch.bool, device=x[v].device)) for v in ins]
        wanted = [self.value.get(v, o).to(o) for v, o in zip(ins, out, strict=True)]

        def covariance(u: list[Tensor]) -> list[Tensor]:
            """Cov(x0 | x) u: it is symmetric, so a product with it is a backward pass."""
            made = torch.autograd.grad(out, list(ins.values()), u, retain_graph=True)
            return [part * float(sigma[v]) ** 2 for v, part in zip(ins, made, strict=True)]

        def inside(u: list[Tensor]) -> list[Tensor]:
            return [torch.where(m, part, 0) for m, part in zip(masks, u, strict=True)]

        step = rest = inside([(w - o).detach() for w, o in zip(wanted, out, strict=True)])
        shift = [torch.zeros_like(part) for part in rest]
        power = _dot(rest, rest)
        for _ in range(self.solves):
            moved = covariance(step)
            along = _safe(power, _dot(step, moved))
            shift = [a + expand(along, b) * b for a, b in zip(shift, moved, strict=True)]
            rest = [a - expand(along, b) * b for a, b in zip(rest, inside(moved), strict=True)]
            before, power = power, _dot(rest, rest)
            along = _safe(power, before)
            step = [a + expand(along, b) * b for a, b in zip(rest, step, strict=True)]
        x0 = {**found.x0, **{v: (o + d).detach() for v, o, d in zip(ins, out, shift, strict=True)}}
        return Prediction(x0, found.variance)


def _dot(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """Of every sample, over all variables, [batch]."""
    return torch.stack([(x * y).flatten(1).sum(1) for x, y in zip(a, b, strict=True)]).sum(0)


def _safe(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where the residual is 0."""
    return torch.where(b > 0, a / b.clamp_min(torch.finfo(b.dtype).tiny), 0)


def known(inner: Denoiser, value: State, mask: State, *, solves: int = 0) -> Denoiser:
    """The denoiser for values that are known where `mask` is true (both by variable, broadcast to [batch, *shape]).

    Known entries have their value at the end of sampling. With `solves` 0 the others depend on them through the noisy
    state alone (replacement; Song et al. 2021b, appendix I.2). With more, the prediction is conditioned on them by
    Tweedie's covariance, Cov(x0 | x) = sigma^2 dD/dx (Boys et al. 2023), solved by that many steps of conjugate
    gradients, each a backward pass: for Gaussians without error once there are as many as the known entries' covariance
    has distinct eigenvalues.
    """
    return Known(inner, value, mask, solves)
