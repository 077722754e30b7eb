"""Stages: what generates one variable given others. A diffusion stage is a network, its conditioning and its levels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from chaindiff import networks
from chaindiff.edm.denoiser import Levels, Prediction, State, expand
from chaindiff.edm.levels import Path, grid, together
from chaindiff.edm.noise import training_noise
from chaindiff.edm.precondition import preconditioning
from chaindiff.edm.random import Draws
from chaindiff.edm.schedules import schedule
from chaindiff.edm.solvers import SECOND_ORDER, Churn, Noise, invert, solve
from chaindiff.networks.condition import Condition, Conditioner, Given, Link, training_level
from chaindiff.specs.errors import UserError
from chaindiff.specs.stage import (
    LinkSpec,
    NoiseLevels,
    Precondition,
    PriorSpec,
    SamplerSpec,
    UNetSpec,
    precondition_of,
    published_noise,
)
from chaindiff.variables import Variable

Terms = Sequence[tuple[frozenset[str], float]]  # guidance: (which given variables are absent, weight), weights sum to 1


class Stage(nn.Module):
    """A diffusion model of p(generated | given) on the EDM core (Karras et al. 2022).

    `network` is a spec, or any module with the signature forward(x, noise_labels, class_labels, augment_labels,
    context). `precondition` is a spec, or the kind of one without numbers; `noise` is the one that it was published
    with unless given. Raises UserError if the network does not fit the variables, or the sampler's levels lie outside
    those that the parametrisation knows.
    """

    def __init__(
        self,
        generates: Variable,
        *,
        given: Sequence[Variable | tuple[Variable, LinkSpec]] = (),
        network: UNetSpec | PriorSpec | nn.Module,
        precondition: Precondition | str = "edm",
        noise: NoiseLevels | None = None,
        sampler: SamplerSpec | None = None,
        augment_dim: int = 0,
        name: str | None = None,
    ):
        super().__init__()
        self.name, self.variable, self.augment_dim = name or generates.name, generates, augment_dim
        pairs = [item if isinstance(item, tuple) else (item, LinkSpec(variable=item.name)) for item in given]
        self.conditioner = Conditioner([Link(variable, spec, generates) for variable, spec in pairs])
        self.given = [variable for variable, spec in pairs if spec.sampled]  # what sampling needs
        spec = precondition_of(precondition) if isinstance(precondition, str) else precondition
        self.precondition = preconditioning(spec, generates.sigma_data)
        if not isinstance(network, nn.Module):
            network = networks.build(
                network,
                generates.shape,
                label_dim=self.conditioner.label_dim,
                augment_dim=augment_dim,
                image_channels=self.conditioner.image_channels,
                context=self.conditioner.context,
                label_span=self.precondition.label_span,
            )
        self.network: nn.Module = network
        self.noise = training_noise(noise or published_noise(spec))
        self.sampler = sampler or SamplerSpec()
        self._levels()
        self.autocast: torch.dtype | None = None

    # ------------------------------------------------------------ denoising

    def denoise(
        self,
        x: Float[Tensor, "batch *shape"],
        sigma: Float[Tensor, " batch"],
        condition: Condition,
        augment_labels: Tensor | None = None,
    ) -> Float[Tensor, "batch *shape"]:
        """D(x; sigma) = c_skip x + c_out F(c_in x; c_noise) (EDM, eq. 7); the network alone runs in bf16."""
        c = self.precondition(sigma)
        inputs = expand(c.input, x) * x
        if condition.images is not None:
            inputs = torch.cat([inputs, condition.images.to(inputs.dtype)], dim=1)
        if inputs.ndim == 4:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, self.autocast, enabled=self.autocast is not None):
            raw = self.network(inputs, c.noise, condition.labels, augment_labels, condition.context)
        if raw.shape[1] == 2 * x.shape[1]:  # learned variances come behind the prediction (Nichol & Dhariwal 2021)
            raw = raw[:, : x.shape[1]]
        return expand(c.skip, x) * x + expand(c.out, x) * raw.to(x.dtype)

    # ------------------------------------------------------------ training

    def loss(self, batch: Mapping[str, Tensor], draws: Draws) -> Float[Tensor, " batch"]:
        """Denoising loss of every sample, mean over elements, weighted by lambda(sigma) (EDM, eq. 2 and table 1).

        `batch` holds the generated and given variables, and "augment_labels" if the stage was built for them.
        """
        clean = batch[self.variable.name]
        count = clean.shape[0]
        given = {}
        for link in self.conditioner:
            name, spec = link.variable.name, link.spec
            present = draws.uniform(f"{name}/present") >= spec.dropout if spec.dropout else None
            sigma = training_level(draws.uniform(f"{name}/level"), spec.noise) if spec.noise else None
            noise = draws.normal(f"{name}/noise", link.received) if spec.noise else None
            keep = torch.tensor(spec.keep)[draws.integers(f"{name}/keep", len(spec.keep))] if spec.keep else None
            on = [None if t is None else t.to(clean.device) for t in (present, sigma, noise, keep)]
            given[name] = Given(batch[name], *on)
        sigma = self.noise(draws).to(clean.device)
        noisy = clean + expand(sigma, clean) * draws.normal("noise", self.variable.shape).to(clean.device)
        condition = self.conditioner(given, count, clean)
        denoised = self.denoise(noisy, sigma, condition, batch.get("augment_labels"))
        return self.precondition.weight(sigma) * (denoised - clean).square().flatten(1).mean(1)

    forward = loss  # what wrappers of modules (distributed training) call

    # ------------------------------------------------------------ sampling

    def _levels(self) -> tuple[float, float]:
        """(sigma_min, sigma_max) of the sampler: as said, else as published within what the parametrisation knows.

        Raises UserError if what was said lies outside.
        """
        known, asked = self.precondition, self.sampler
        for field in ("sigma_min", "sigma_max"):
            said = getattr(asked, field)
            if said is not None and not known.sigma_min <= said <= known.sigma_max:
                raise UserError(
                    f"{said:g} is none of the levels that a network of kind {known.kind} knows, "
                    f"from {known.sigma_min:g} to {known.sigma_max:g}",
                    f"stages.{self.name}.sample.{field}",
                    "leave it out: the sampler then takes what the network knows",
                )
        low, high = asked.levels
        return max(low, known.sigma_min), min(high, known.sigma_max)

    @property
    def path(self) -> Path:
        """The noise levels of this stage's sampler, from sigma_max down to 0, rounded to those that it knows."""
        s, (low, high) = self.sampler, self._levels()
        chosen = schedule(s.schedule, low, high)
        levels = [self.precondition.round(level) for level in grid(s.discretisation, s.steps, low, high, s.rho, chosen)]
        return together({self.variable.name: levels}, {self.variable.name: chosen})

    @property
    def nfe(self) -> int:
        """Network evaluations for one sample; guidance counts every term."""
        return self.path.evaluations(SECOND_ORDER[self.sampler.solver]) * len(self.terms())

    def terms(self) -> Terms:
        """Classifier-free guidance w c + (1 - w) u over all droppable links (Ho & Salimans 2022); w = 1 is off."""
        scale = self.sampler.guidance
        if scale == 1:
            return [(frozenset(), 1.0)]
        absent = frozenset(x.variable.name for x in self.conditioner if x.spec.can_be_absent and x.spec.sampled)
        if not absent:
            raise UserError(
                f"stage '{self.name}' asks for guidance {scale}, but was trained without dropout on any link",
                hint="give one of its links a dropout and train it, or set guidance: 1",
            )
        return [(frozenset(), scale), (absent, 1 - scale)]

    def bind(self, given: Mapping[str, Tensor], link_noise: Mapping[str, Tensor] | None = None) -> BoundStage:
        """A denoiser under these conditions: everything that does not move is computed here, once per sample.

        `link_noise` holds unit noise, in the received shape, for links whose `sample_noise` is above 0.
        """
        batch = len(next(iter(given.values()))) if given else 1
        like = next(self.parameters())
        terms, parts = self.terms(), []
        for absent, _ in terms:
            values = {}
            for link in self.conditioner:
                name, level = link.variable.name, link.spec.sample_noise
                noise = None if link_noise is None else link_noise.get(name)
                sigma = torch.full((batch,), level, device=like.device) if link.tells_level else None
                value = None if name in absent or not link.spec.sampled else given[name].to(like.device)
                keep = None if link.spec.sample_keep is None else torch.full((batch,), link.spec.sample_keep)
                values[name] = Given(value, None, sigma, noise if level else None, keep)
            parts.append(self.conditioner(values, batch, like))
        return BoundStage(self, _concatenate(parts), [weight for _, weight in terms])

    def sample(
        self, start: Tensor, given: Mapping[str, Tensor], noise: Noise, link_noise: Mapping[str, Tensor] | None = None
    ) -> Iterator[Tensor]:
        """Samples from unit noise `start` [batch, *shape]: yields the variable after every step, without its scale."""
        path, name, s = self.path, self.variable.name, self.sampler
        x = {name: start * (path.sigma(0)[name] * path.scale(0)[name])}
        churn = Churn(s.churn.amount, s.churn.min, math.inf if s.churn.max is None else s.churn.max, s.churn.noise)
        denoiser = self.bind(given, link_noise)
        states = solve(denoiser, x, path, solver=s.solver, churn=churn, eta=s.eta, noise=noise)
        for step, state in enumerate(states, 1):
            scale = path.scale(step)[name]
            yield state[name] / scale if scale != 1 else state[name]

    def invert(
        self, value: Tensor, given: Mapping[str, Tensor], link_noise: Mapping[str, Tensor] | None = None
    ) -> Iterator[Tensor]:
        """From values [batch, *shape] to noise: yields the variable after every step, in units of its level.

        The last is the `start` from which `sample`, with a deterministic sampler, returns the values. Raises UserError
        if the stage's sampler adds noise.
        """
        path, name, s = self.path, self.variable.name, self.sampler
        if s.churn.amount or s.eta:
            raise UserError(
                "no noise leads to a given value while sampling adds more of it",
                f"stages.{self.name}.sample.{'eta' if s.eta else 'churn.amount'}",
                "set it to 0 to invert this stage",
            )
        states = invert(self.bind(given, link_noise), {name: value}, path, solver=s.solver)
        for step, state in enumerate(states, 1):
            at = path.steps - step
            yield state[name] / (path.sigma(at)[name] * path.scale(at)[name])


@dataclass(frozen=True)
class BoundStage:
    """A stage's denoiser with its conditions bound; guided terms are evaluated as one batch."""

    stage: Stage
    condition: Condition
    weights: list[float]

    @property
    def sigma_min(self) -> float:
        return self.stage.precondition.sigma_min

    @property
    def sigma_max(self) -> float:
        return self.stage.precondition.sigma_max

    def round(self, sigma: float) -> float:
        """The nearest level that the stage knows, where it was trained on discrete ones."""
        return self.stage.precondition.round(sigma)

    @torch.no_grad()
    def __call__(self, x: State, sigma: Levels) -> Prediction:
        name = self.stage.variable.name
        like = next(self.stage.parameters())
        value, level = x[name].to(like), sigma[name]
        batch, terms = value.shape[0], len(self.weights)
        levels = level.to(like) if isinstance(level, Tensor) else torch.full((batch,), level).to(like)
        clean = self.stage.denoise(
            value.repeat(terms, *[1] * (value.ndim - 1)), levels.repeat(terms), self._fit(batch * terms)
        )
        if terms > 1:
            weights = clean.new_tensor(self.weights).reshape(-1, *[1] * value.ndim)
            clean = (weights * clean.unflatten(0, (terms, batch))).sum(0)
        return Prediction({name: clean})

    def _fit(self, batch: int) -> Condition:
        """Without given variables the conditions were bound for one sample: all rows are alike."""
        c = self.condition
        return Condition(
            *(None if t is None else t.expand(batch, *t.shape[1:]) for t in (c.labels, c.images, c.context))
        )


def _concatenate(parts: list[Condition]) -> Condition:
    def join(name: str) -> Tensor | None:
        tensors = [getattr(part, name) for part in parts]
        return None if tensors[0] is None else torch.cat(tensors)

    return Condition(join("labels"), join("images"), join("context"))
