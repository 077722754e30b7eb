"""Stages: what generates variables given others. A diffusion stage is a network, its conditioning and its levels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from chaindiff import networks
from chaindiff.edm.denoiser import Levels, Prediction, State, expand
from chaindiff.edm.levels import Path, grid, staggered
from chaindiff.edm.noise import some_known, training_noise
from chaindiff.edm.precondition import preconditioning
from chaindiff.edm.random import Draws
from chaindiff.edm.schedules import schedule
from chaindiff.edm.solvers import SECOND_ORDER, Churn, Noise, invert, solve
from chaindiff.networks.condition import Condition, Conditioner, Given, Link, training_level
from chaindiff.specs.errors import UserError
from chaindiff.specs.stage import (
    JointSpec,
    LinkSpec,
    Network,
    NoiseLevels,
    Precondition,
    SamplerSpec,
    precondition_of,
    published_noise,
)
from chaindiff.variables import Variable

Terms = Sequence[tuple[frozenset[str], float]]  # guidance: (which given variables are absent, weight), weights sum to 1


PURE_NOISE = 80.0  # the level at which nothing of the data is left: where EDM's sampler begins


class Stage(nn.Module):
    """A diffusion model of p(generated | given) on the EDM core (Karras et al. 2022).

    It may generate several variables together, each with its own noise level: then any of them can be given instead
    (UniDiffuser, arXiv 2303.06555), if `joint.exact` is above 0, and `sampler.offset` says how much the first leads.

    `network` is a spec, or any module with the signature forward(x, noise_labels, class_labels, augment_labels,
    context). `precondition` is a spec, or the kind of one without numbers; `noise` is the one that it was published
    with unless given. Raises UserError if the network does not fit the variables, or the sampler's levels lie outside
    those that the parametrisation knows.
    """

    def __init__(
        self,
        generates: Variable | Sequence[Variable],
        *,
        given: Sequence[Variable | tuple[Variable, LinkSpec]] = (),
        network: Network | nn.Module,
        precondition: Precondition | str = "edm",
        noise: NoiseLevels | None = None,
        sampler: SamplerSpec | None = None,
        joint: JointSpec | None = None,
        augment_dim: int = 0,
        name: str | None = None,
    ):
        super().__init__()
        variables = [generates] if isinstance(generates, Variable) else list(generates)
        self.generates = {variable.name: variable for variable in variables}
        self.name, self.augment_dim, self.joint = name or variables[0].name, augment_dim, joint or JointSpec()
        pairs = [item if isinstance(item, tuple) else (item, LinkSpec(variable=item.name)) for item in given]
        self.conditioner = Conditioner([Link(variable, spec, self.target) for variable, spec in pairs])
        self.given = [variable for variable, spec in pairs if spec.sampled]  # what sampling needs
        spec = precondition_of(precondition) if isinstance(precondition, str) else precondition
        self.precondition = preconditioning(spec, variables[0].sigma_data)
        if not isinstance(network, nn.Module):
            interface = networks.Interface(
                {variable.name: variable.shape for variable in variables},
                label_dim=self.conditioner.label_dim,
                augment_dim=augment_dim,
                image_channels=self.conditioner.image_channels,
                context=self.conditioner.context,
                label_span=self.precondition.label_span,
            )
            network = networks.build(network, interface)
        self.network: nn.Module = network
        self.noise = training_noise(noise or published_noise(spec))
        self.sampler = sampler or SamplerSpec()
        self._levels()
        self.autocast: torch.dtype | None = None

    @property
    def target(self) -> Variable:
        """The variable that given images are resized to: the image that is generated, if any."""
        found = list(self.generates.values())
        return next((variable for variable in found if variable.kind == "image"), found[0])

    @property
    def conditionals(self) -> frozenset[frozenset[str]]:
        """The sets of its own variables that the stage can be given, generating the others."""
        sizes = range(1, len(self.generates)) if self.joint.exact else ()
        return frozenset(frozenset(known) for size in sizes for known in combinations(self.generates, size))

    # ------------------------------------------------------------ denoising

    def denoise(
        self, x: State, sigma: Mapping[str, Tensor], condition: Condition, augment_labels: Tensor | None = None
    ) -> State:
        """D(x; sigma) = c_skip x + c_out F(c_in x; c_noise) (EDM, eq. 7), for every variable at its own levels [batch].

        The network alone runs in bf16.
        """
        scales = {name: self.precondition(sigma[name]) for name in self.generates}
        inputs = []
        for name, c in scales.items():
            value = expand(c.input, x[name]) * x[name]
            if value.ndim == 4:
                if condition.images is not None:
                    value = torch.cat([value, condition.images.to(value.dtype)], dim=1)
                value = value.contiguous(memory_format=torch.channels_last)
            inputs.append(value)
        labels = [c.noise for c in scales.values()]
        told = (condition.labels, augment_labels, condition.context)
        with torch.autocast(inputs[0].device.type, self.autocast, enabled=self.autocast is not None):
            one = len(inputs) == 1
            found = [self.network(inputs[0], labels[0], *told)] if one else self.network(inputs, labels, *told)
        clean = {}
        for (name, c), raw in zip(scales.items(), found, strict=True):
            noisy = x[name]
            if raw.shape[1] == 2 * noisy.shape[1]:  # learned variances come behind (Nichol & Dhariwal 2021)
                raw = raw[:, : noisy.shape[1]]
            clean[name] = expand(c.skip, noisy) * noisy + expand(c.out, noisy) * raw.to(noisy.dtype)
        return clean

    # ------------------------------------------------------------ training

    def loss(self, batch: Mapping[str, Tensor], draws: Draws) -> Float[Tensor, " batch"]:
        """Denoising loss of every sample, mean over elements, weighted by lambda(sigma) (EDM, eq. 2 and table 1).

        Of several variables the mean, those that are known exactly counting as 0. `batch` holds the generated and given
        variables, and "augment_labels" if the stage was built for them.
        """
        clean = {name: batch[name] for name in self.generates}
        like = next(iter(clean.values()))
        given = {}
        for link in self.conditioner:
            name, spec = link.variable.name, link.spec
            present = draws.uniform(f"{name}/present") >= spec.dropout if spec.dropout else None
            sigma = training_level(draws.uniform(f"{name}/level"), spec.noise) if spec.noise else None
            noise = draws.normal(f"{name}/noise", link.received) if spec.noise else None
            keep = torch.tensor(spec.keep)[draws.integers(f"{name}/keep", len(spec.keep))] if spec.keep else None
            on = [None if t is None else t.to(like.device) for t in (present, sigma, noise, keep)]
            given[name] = Given(batch[name], *on)
        own = {name: draws if len(clean) == 1 else draws.of(name) for name in clean}
        levels = {name: self.noise(drawn) for name, drawn in own.items()}
        pure = min(PURE_NOISE, self.precondition.sigma_max)
        levels = some_known(levels, draws, self.joint.exact, self.joint.pure, pure)
        levels = {name: level.to(like.device) for name, level in levels.items()}
        noisy = {
            name: value + expand(levels[name], value) * own[name].normal("noise", value.shape[1:]).to(value.device)
            for name, value in clean.items()
        }
        condition = self.conditioner(given, like.shape[0], like)
        denoised = self.denoise(noisy, levels, condition, batch.get("augment_labels"))
        losses = []
        for name, level in levels.items():
            error = (denoised[name] - clean[name]).square().flatten(1).mean(1)
            weight = self.precondition.weight(level.masked_fill(level == 0, 1.0))
            losses.append((weight * error).masked_fill(level == 0, 0.0))
        return torch.stack(losses).mean(0)

    forward = loss  # what wrappers of modules (distributed training) call

    # ------------------------------------------------------------ sampling

    def _levels(self) -> tuple[float, float]:
        """(sigma_min, sigma_max) of the sampler: as said, else as published within what the parametrisation knows.

        Raises UserError if what was said lies outside.
        """
        known, asked = self.precondition, self.sampler
        for bound in ("sigma_min", "sigma_max"):
            said = getattr(asked, bound)
            if said is not None and not known.sigma_min <= said <= known.sigma_max:
                raise UserError(
                    f"{said:g} is none of the levels that a network of kind {known.kind} knows, "
                    f"from {known.sigma_min:g} to {known.sigma_max:g}",
                    f"stages.{self.name}.sample.{bound}",
                    "leave it out: the sampler then takes what the network knows",
                )
        low, high = asked.levels
        return max(low, known.sigma_min), min(high, known.sigma_max)

    def path(self, moving: Iterable[str] | None = None) -> Path:
        """The noise levels of this stage's sampler, from sigma_max down to 0, rounded to those that it knows.

        `moving` are the variables that are sampled, all that the stage generates unless told otherwise.
        """
        s, (low, high) = self.sampler, self._levels()
        chosen = schedule(s.schedule, low, high)
        levels = [self.precondition.round(level) for level in grid(s.discretisation, s.steps, low, high, s.rho, chosen)]
        names = [name for name in self.generates if moving is None or name in set(moving)]
        return staggered(dict.fromkeys(names, levels), s.offset, dict.fromkeys(names, chosen))

    def nfe(self, moving: Iterable[str] | None = None) -> int:
        """Network evaluations for one sample; guidance counts every term."""
        return self.path(moving).evaluations(SECOND_ORDER[self.sampler.solver]) * len(self.terms())

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

        `given` may hold some of the variables that the stage generates: these are known exactly, and do not move.
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
        fixed = {name: given[name].to(like) for name in self.generates if name in given}
        return BoundStage(self, _concatenate(parts), [weight for _, weight in terms], fixed)

    def sample(
        self, start: State, given: Mapping[str, Tensor], noise: Noise, link_noise: Mapping[str, Tensor] | None = None
    ) -> Iterator[State]:
        """Samples from unit noise `start`: yields its variables after every step, without their scales.

        Generated variables that are not in `start` are in `given`.
        """
        path, s = self.path(start), self.sampler
        sigma, scale = path.sigma(0), path.scale(0)
        x = {name: value * (sigma[name] * scale[name]) for name, value in start.items()}
        churn = Churn(s.churn.amount, s.churn.min, math.inf if s.churn.max is None else s.churn.max, s.churn.noise)
        denoiser = self.bind(given, link_noise)
        states = solve(denoiser, x, path, solver=s.solver, churn=churn, eta=s.eta, noise=noise)
        for step, state in enumerate(states, 1):
            scale = path.scale(step)
            yield {name: value / scale[name] if scale[name] != 1 else value for name, value in state.items()}

    def invert(
        self, values: State, given: Mapping[str, Tensor], link_noise: Mapping[str, Tensor] | None = None
    ) -> Iterator[State]:
        """From values to noise: yields the variables after every step, in units of their levels.

        The last is the `start` from which `sample`, with a deterministic sampler, returns the values. A variable that
        has not left 0 yet is yielded as it is. Raises UserError if the stage's sampler adds noise.
        """
        path, s = self.path(values), self.sampler
        if s.churn.amount or s.eta:
            raise UserError(
                "no noise leads to a given value while sampling adds more of it",
                f"stages.{self.name}.sample.{'eta' if s.eta else 'churn.amount'}",
                "set it to 0 to invert this stage",
            )
        states = invert(self.bind(given, link_noise), values, path, solver=s.solver)
        for step, state in enumerate(states, 1):
            sigma, scale = path.sigma(path.steps - step), path.scale(path.steps - step)
            yield {name: value / ((sigma[name] or 1.0) * scale[name]) for name, value in state.items()}


@dataclass(frozen=True)
class BoundStage:
    """A stage's denoiser with its conditions bound; guided terms are evaluated as one batch."""

    stage: Stage
    condition: Condition
    weights: list[float]
    fixed: State = field(default_factory=dict)  # generated variables that are given

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
        like = next(self.stage.parameters())
        batch, terms = len(next(iter(x.values()))), len(self.weights)
        values, levels = {}, {}
        for name in self.stage.generates:
            value, level = (self.fixed[name], 0.0) if name in self.fixed else (x[name].to(like), sigma[name])
            level = level.to(like) if isinstance(level, Tensor) else torch.full((batch,), level).to(like)
            levels[name] = level.repeat(terms)
            values[name] = value.repeat(terms, *[1] * (value.ndim - 1))
        clean = self.stage.denoise(values, levels, self._fit(batch * terms))
        return Prediction({name: self._guided(clean[name], batch) for name in x})

    def _guided(self, clean: Tensor, batch: int) -> Tensor:
        if len(self.weights) == 1:
            return clean
        weights = clean.new_tensor(self.weights).reshape(-1, *[1] * clean.ndim)
        return (weights * clean.unflatten(0, (len(self.weights), batch))).sum(0)

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
