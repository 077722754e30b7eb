"""The usual stage: a diffusion model, with its network, conditioning and noise levels."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from chaindiff import networks
from chaindiff.chain.bound import Bound
from chaindiff.chain.conditioning import Conditioner, Given, Link, training_level
from chaindiff.chain.formulation import family, preconditioning, training_noise
from chaindiff.chain.sampling import Sampling
from chaindiff.chain.stage import Cost, Values, evaluating
from chaindiff.chain.variable import Variable
from chaindiff.edm.denoiser import Denoiser, Prediction, State
from chaindiff.edm.levels import Path
from chaindiff.edm.noise import TrainingNoise, one_of
from chaindiff.edm.precondition import Coefficients, Preconditioning, Shared
from chaindiff.edm.random import Draws
from chaindiff.edm.solvers import Step, Update, integrate
from chaindiff.guidance.algebra import guided
from chaindiff.io.errors import UserError
from chaindiff.kernels.sums import weighted_error, weighted_sum
from chaindiff.networks.interface import Condition, Interface
from chaindiff.networks.interface import Network as NetworkLike
from chaindiff.specs.link import LinkSpec, largest_grid
from chaindiff.specs.network import Network
from chaindiff.specs.noise import NoiseLevels, Precondition, published_noise
from chaindiff.specs.path import TrainPath, hidden
from chaindiff.specs.sampling import SamplerSpec
from chaindiff.specs.stage import Generated
from chaindiff.specs.validate import config

Wrap = Callable[[Denoiser], Denoiser]  # custom guidance around the bound denoiser
Config = Mapping[str, Any]  # fields as in a recipe

PURE_NOISE = 80.0  # the level at which nothing of the data is left: where EDM's sampler begins


class Diffusion(nn.Module):
    """A diffusion model of p(generated | given) on the EDM core (Karras et al. 2022).

    It may generate several variables together, each with its own noise level, preconditioning, training noise and loss
    weight (`chaindiff.Generated`); `path` says how training draws their levels. Those that it sometimes knows exactly
    can be given instead (UniDiffuser, arXiv 2303.06555).

    `network` is the config of a built-in network, a module with the signature of `chaindiff.Network`, or a function
    that makes one from an `Interface`. `given` are variables, alone or each with its `chaindiff.Link`. Configs are
    objects such as `chaindiff.Sampler(steps=12)`, or mappings as in recipes. `precondition` and `noise` may be custom
    objects; `noise` defaults to the one that the preconditioning was published with.
    Raises UserError if the network does not fit the variables, or the sampler's levels lie outside the
    preconditioning's range.
    """

    def __init__(
        self,
        generates: Variable | Sequence[Variable | tuple[Variable, Generated | Config]],
        *,
        given: Sequence[Variable | tuple[Variable, LinkSpec | Config]] = (),
        network: Network | nn.Module | Callable[[Interface], nn.Module] | Config,
        precondition: Precondition | Preconditioning | Config | str = "edm",
        noise: NoiseLevels | TrainingNoise | Config | None = None,
        sampler: SamplerSpec | Config | None = None,
        path: TrainPath | Config | None = None,
        augment_dim: int = 0,
        name: str | None = None,
    ):
        super().__init__()
        several = [generates] if isinstance(generates, Variable) else [*generates]
        own = [item if isinstance(item, tuple) else (item, {}) for item in several]
        variables = [variable for variable, _ in own]
        self.name, self.augment_dim = name or variables[0].name, augment_dim
        self.generates = {variable.name: variable for variable in variables}
        self.own: dict[str, Generated] = {
            v.name: config(Generated, said, f"{self.name}.generates.{v.name}") for v, said in own
        }
        self.trained_path: TrainPath = config(TrainPath, path or {}, f"{self.name}.path")
        self.family = family(self.trained_path, [*self.generates])
        pairs = [item if isinstance(item, tuple) else (item, {}) for item in given]
        links = [Link(variable, self._link(variable, said), self.target) for variable, said in pairs]
        self.conditioner = Conditioner(links)
        self.sampler: SamplerSpec = config(SamplerSpec, sampler or {}, f"{self.name}.sampler")
        precondition = {"kind": precondition} if isinstance(precondition, str) else precondition
        self.precondition_spec = config(Precondition, precondition, f"{self.name}.precondition")
        self.precondition: Preconditioning = self.precondition_spec
        if not isinstance(self.precondition_spec, Preconditioning):
            self.precondition = preconditioning(self.precondition_spec, variables[0].sigma_data)
            noise = published_noise(self.precondition_spec) if noise is None else noise
        self.preconditions: dict[str, Preconditioning] = {}  # each variable's own, or the stage's with its sigma_data
        for made in variables:
            said = self.own[made.name].precondition or self.precondition_spec
            known = said if isinstance(said, Preconditioning) else preconditioning(said, made.sigma_data)
            self.preconditions[made.name] = known
        self.noise_spec = config(NoiseLevels, {} if noise is None else noise, f"{self.name}.noise")
        custom = callable(self.noise_spec)
        self.noise: TrainingNoise = cast(Any, self.noise_spec) if custom else training_noise(self.noise_spec)
        self.network_spec, self.network = self._network(network)
        sampling = self.sampling()
        for made in self.generates:
            sampling.levels(made)
        self.autocast: torch.dtype | None = None
        self.run: NetworkLike | None = None  # stands in for the network where no gradients are asked for
        # Weights may be channels-last in memory; files hold them contiguous.
        self.register_state_dict_post_hook(_contiguous)

    def _link(self, variable: Variable, said: LinkSpec | Config) -> LinkSpec:
        said = {"variable": variable.name, **said} if isinstance(said, Mapping) else said
        return config(LinkSpec, said, f"{self.name}.given.{variable.name}")

    def _network(self, said: Any) -> tuple[Any, nn.Module]:
        """The network's config, None for custom code, and the network."""
        if isinstance(said, nn.Module):
            return None, said
        if callable(said) and not hasattr(said, "model_fields"):
            return None, cast(nn.Module, said(self.interface))
        spec = config(Network, said, f"{self.name}.network")
        return spec, networks.build(spec, self.interface)

    @property
    def interface(self) -> Interface:
        """What the network must fit."""
        return Interface(
            {name: variable.shape for name, variable in self.generates.items()},
            label_dim=self.conditioner.label_dim,
            image_channels=self.conditioner.image_channels,
            context=self.conditioner.context,
            augment_dim=self.augment_dim,
            label_span=getattr(self.precondition, "label_span", 1.0),
        )

    def training_noise(self, name: str) -> TrainingNoise:
        """The training noise of a generated variable: its own, or the stage's."""
        said = self.own[name].noise
        return self.noise if said is None else training_noise(said)

    def coefficients(self, name: str, sigma: Tensor) -> Coefficients:
        """A generated variable's preconditioning; its noise label [*sigma] spans what the network is built for."""
        own = self.preconditions[name]
        found, span = own(sigma), getattr(self.precondition, "label_span", 1) / getattr(own, "label_span", 1)
        return replace(found, noise=(found.noise * span).expand(sigma.shape))

    def pure(self, name: str) -> float:
        """The level of a variable at which nothing of it is left."""
        return min(PURE_NOISE, self.preconditions[name].sigma_max)

    @property
    def given(self) -> list[Variable]:
        """The variables that sampling is conditioned on."""
        return [link.variable for link in self.conditioner if self.sampler.link(link.variable.name).sampled]

    @property
    def target(self) -> Variable:
        """The variable that given images are resized to: the largest image or map that is generated, if any."""
        grid = largest_grid({name: variable.shape for name, variable in self.generates.items()})
        return self.generates[grid] if grid else next(iter(self.generates.values()))

    @property
    def conditionals(self) -> frozenset[frozenset[str]]:
        """The sets of its own variables that the stage can be given, generating the others."""
        return frozenset(self.family.known([*self.generates]))

    @property
    def like(self) -> Tensor:
        """A tensor with the device and the floating-point type of the stage."""
        found = next(self.parameters(), None)
        return torch.zeros(()) if found is None else found

    def __repr__(self) -> str:
        given = f" given {', '.join(link.variable.name for link in self.conditioner)}" if len(self.conditioner) else ""
        made, size = ", ".join(map(str, self.generates.values())), sum(p.numel() for p in self.parameters())
        return f"Diffusion({self.name}: {made}{given}; {type(self.network).__name__}, {size:,} parameters)"

    # ------------------------------------------------------------ denoising

    def denoise(
        self,
        x: State,
        sigma: Mapping[str, Tensor],
        condition: Condition,
        absent: Mapping[str, Bool[Tensor, " batch"]] | None = None,
    ) -> Prediction:
        """D(x; sigma) = c_skip x + c_out F(c_in x; c_noise) (EDM, eq. 7), for every variable at its own levels [batch].

        The network sees zeros where a variable is `absent`. It alone runs in bf16.
        """
        scales = {name: self.coefficients(name, sigma[name]) for name in self.generates}
        return self.preconditioned(x, scales, condition, absent)

    def preconditioned(
        self,
        x: State,
        scales: Mapping[str, Coefficients],
        condition: Condition,
        absent: Mapping[str, Bool[Tensor, " batch"]] | None = None,
    ) -> Prediction:
        """`denoise` by coefficients, each [batch] or, where all samples share a level, []; a label may be [1]."""
        seen = {name: weighted_sum((c.input, x[name])) for name, c in scales.items()}
        for name, gone in (absent or {}).items():
            seen[name] = seen[name].masked_fill(gone.reshape(-1, *[1] * (seen[name].ndim - 1)), 0.0)
        labels, clean, variance = {}, {}, {}
        for name, c in scales.items():
            rows = len(x[name])
            labels[name] = c.noise if len(c.noise) == rows else c.noise[:1].expand(rows).contiguous()
        network = self.network if self.run is None or torch.is_grad_enabled() else self.run
        found = self.precisely(network, next(iter(x.values())).device.type, seen, labels, condition)
        for name, c in scales.items():
            raw = found[name]
            if raw.shape[1] != x[name].shape[1] and getattr(self.network, "learns_variances", False):
                raw, variance[name] = raw.chunk(2, dim=1)  # a second half (Nichol & Dhariwal 2021)
            clean[name] = weighted_sum((c.skip, x[name]), (c.out, raw))
        return Prediction(clean, variance or None)

    def precisely(self, function: Callable[..., Any], device: str, *inputs: Any) -> Any:
        """What the network, or a part of it, gives in its own precision, whatever surrounds it."""
        if self.autocast is None and not torch.is_autocast_enabled(device):
            return function(*inputs)
        with torch.autocast(device, self.autocast, enabled=self.autocast is not None):
            return function(*inputs)

    def _laid_out(self, value: Tensor) -> Tensor:
        """In the memory format of the network's images, so that no step changes it."""
        layout = getattr(self.network, "memory_format", torch.preserve_format)
        return value.to(memory_format=layout) if value.ndim == 4 else value

    # ------------------------------------------------------------ training

    def loss(self, batch: Values, draws: Draws) -> Float[Tensor, " batch"]:
        """Denoising loss of every sample, mean over elements, weighted by lambda(sigma) (EDM, eq. 2 and table 1).

        Of several variables the mean by their weights, those that are known exactly counting as 0. `batch` holds the
        generated and given variables, and "augment_labels" if the stage was built for them.
        """
        clean = {name: self._laid_out(batch[name]) for name in self.generates}
        like = next(iter(clean.values()))
        draws, given = draws.on(like.device), {}
        for link in self.conditioner:
            name, spec = link.variable.name, link.spec
            present = draws.uniform(f"{name}/present") >= spec.dropout if spec.dropout else None
            sigma = training_level(draws.uniform(f"{name}/level"), spec.noise) if spec.noise else None
            noise = draws.normal(f"{name}/noise", shape=link.received) if spec.noise else None
            keep = one_of(spec.keep, draws.integers(f"{name}/keep", below=len(spec.keep))) if spec.keep else None
            given[name] = Given(batch[name], present, sigma, noise, keep)
        own = {name: draws if len(clean) == 1 else draws.of(name) for name in clean}
        pure = {name: self.pure(name) for name in clean}
        drawn = self.family.draw(draws, {name: self.training_noise(name) for name in clean}, pure)
        levels, counted, absent = (
            {name: value.to(like.device) for name, value in part.items()}
            for part in (drawn.levels, drawn.counted, drawn.absent)
        )
        noisy = {
            name: weighted_sum((1.0, value), (levels[name], own[name].normal("noise", shape=value.shape[1:]).to(value)))
            for name, value in clean.items()
        }
        condition = replace(self.conditioner(given, like.shape[0], like), augment=batch.get("augment_labels"))
        denoised = self.denoise(noisy, levels, condition, absent).x0
        losses = []
        for name, level in levels.items():
            learned = (level > 0) & counted.get(name, level > 0)
            weight = self.own[name].weight * self.preconditions[name].weight(level.masked_fill(~learned, 1.0))
            losses.append(weighted_error(denoised[name], clean[name], weight).masked_fill(~learned, 0.0))
        return torch.stack(losses).mean(0)

    forward = loss  # wrappers for distributed training call the module

    # ------------------------------------------------------------ sampling

    def sampling(self, sampler: SamplerSpec | Config | None = None) -> Sampling:
        """How a sampler samples: the given one or the stage's own; a mapping overrides fields of the stage's own.

        Raises UserError for settings that the stage was not trained for.
        """
        found = self.sampler if sampler is None else sampler
        if isinstance(found, Mapping):
            own = self.sampler.model_dump(exclude_unset=True)
            found = cast(SamplerSpec, config(SamplerSpec, {**own, **found}, f"{self.name}.sampler"))
        return Sampling(self, found)

    def path(self, moving: Iterable[str] | None = None, sampler: SamplerSpec | Config | None = None) -> Path:
        """A sampler's noise levels of the variables that move (`Sampling.path`)."""
        return self.sampling(sampler).path(moving)

    def cost(self, moving: Collection[str], sampler: SamplerSpec | Config | None = None) -> Cost:
        """What one sample of these variables costs (`Sampling.cost`)."""
        return self.sampling(sampler).cost(moving)

    def bind(
        self,
        given: Values,
        draws: Draws | None = None,
        *,
        absent: Collection[str] = (),
        sampler: SamplerSpec | Config | None = None,
        shared: Mapping[str, Shared] | None = None,
    ) -> Bound:
        """A denoiser with this conditioning: whatever does not change between steps is computed here, once per sample.

        `given` may hold some of the variables that the stage generates: these are known exactly, and do not move.
        `draws` supply the noise of links that sampling adds noise to; `shared` are known coefficients.
        Raises UserError for a variable that is not given.
        """
        s, like = self.sampling(sampler).settings, self.like
        batch = len(next(iter(given.values()))) if given else 1
        values = {}
        for link in self.conditioner:
            name, how = link.variable.name, s.link(link.variable.name)
            value = None
            if how.sampled and name not in absent:
                if name not in given:
                    raise UserError(f"stage '{self.name}' needs '{name}', which is not given")
                value = given[name].to(like.device)
            sigma = torch.full((batch,), how.noise, device=like.device) if link.tells_level else None
            noise = None
            if how.noise and value is not None:
                if draws is None:
                    raise ValueError(f"sampling noises '{name}': bind needs draws")
                noise = draws.on(like.device).of(name).normal("link", 0, shape=link.received).to(like)
            keep = None if how.keep is None else torch.full((batch,), how.keep, device=like.device)
            values[name] = Given(value, None, sigma, noise, keep)
        fixed = {name: given[name].to(like) for name in self.generates if name in given}
        unseen = {name: self._unseen(name, batch, draws) for name in self.generates if name in absent}
        shared = self.shared(rows=batch) if shared is None else shared
        return Bound(self, self.conditioner(values, batch, like), shared, fixed, unseen)

    def shared(self, table: Sequence[Update] = (), rows: int = 1) -> dict[str, Shared]:
        """The coefficients of every generated variable, for a denoiser that is called at the levels of a table."""
        levels = [row.sigma for row in table if row.sigma is not None]
        return {
            name: Shared(partial(self.coefficients, name), self.like, (at[name] for at in levels if name in at), rows)
            for name in self.generates
        }

    def _unseen(self, name: str, batch: int, draws: Draws | None) -> Tensor | None:
        """What the network sees in place of a generated variable that it does without: None, or pure noise."""
        if hidden(self.trained_path) == "absent":
            return None
        if draws is None:
            raise ValueError(f"guidance without '{name}' replaces it by noise: bind needs draws")
        return draws.of(name).normal("unseen", 0, shape=self.generates[name].shape).to(self.like) * self.pure(name)

    def denoiser(
        self,
        given: Values,
        draws: Draws | None = None,
        sampler: SamplerSpec | Config | None = None,
        table: Sequence[Update] = (),
    ) -> Denoiser:
        """The bound denoiser with the sampler's guidance, prepared for the levels of a table."""
        sampling = self.sampling(sampler)
        said = sampling.terms(name for name in self.generates if name not in given)
        shared = self.shared(table, len(draws or next(iter(given.values()), [0])) * len(said))
        terms = [
            (self.bind(given, draws, absent=gone, sampler=sampling.settings, shared=shared), weights)
            for gone, weights in said
        ]
        return terms[0][0] if len(terms) == 1 else guided(terms)

    def sample(
        self,
        given: Values,
        draws: Draws,
        *,
        sampler: SamplerSpec | Config | None = None,
        path: Path | None = None,
        wrap: Wrap = lambda denoiser: denoiser,
        start: State | None = None,
    ) -> Iterator[Step]:
        """Samples of the generated variables that are not given, one for each of `draws`: yields every step.

        `sampler` replaces the stage's own, or overrides some of its fields; `path`: custom noise levels; `wrap` is
        applied to the guided denoiser; `start`: unit noise to start from, by default drawn.
        Raises UserError for a stage without weights, and for settings that do not fit it.
        """
        if self.like.is_meta:
            raise UserError(f"stage '{self.name}' has no weights: it was built for planning only")
        sampling, like = self.sampling(sampler), self.like
        draws, state = draws.on(like.device), torch.promote_types(like.dtype, torch.float32)  # float64: no nearer
        shapes = {name: v.shape for name, v in self.generates.items() if name not in given}
        path = sampling.path(shapes) if path is None else path

        def noise(name: str, role: str, number: int) -> Tensor:
            return draws.of(name).normal(role, number, shape=shapes[name]).to(state)

        unit = start or {name: noise(name, "start", 0) for name in shapes}
        x = {name: self._laid_out(unit[name].to(like.device, state)) * level for name, level in path.sigma(0).items()}
        with evaluating(self):
            table = sampling.table(path)
            denoiser = wrap(self.denoiser(given, draws, sampling.settings, table))
            yield from integrate(denoiser, x, table, lambda name, number: noise(name, "churn", number))

    def invert(
        self,
        values: State,
        given: Values,
        draws: Draws | None = None,
        *,
        sampler: SamplerSpec | Config | None = None,
        path: Path | None = None,
        wrap: Wrap = lambda denoiser: denoiser,
    ) -> Iterator[State]:
        """From values to noise: yields the variables after every step, in units of their levels.

        The last is the `start` from which `sample`, with a deterministic sampler, returns the values. A variable still
        at level 0 is yielded unchanged. Raises UserError if the stage's sampler adds noise.
        """
        sampling = self.sampling(sampler)
        if (s := sampling.settings).churn.amount or s.eta:
            raise UserError(
                "a stochastic sampler cannot be inverted",
                f"stages.{self.name}.sample.{'eta' if s.eta else 'churn.amount'}",
                "set it to 0 to invert this stage",
            )
        path = (sampling.path(values) if path is None else path).reversed()
        table = sampling.table(path)
        with evaluating(self):
            x = {name: self._laid_out(value) for name, value in values.items()}
            for step in integrate(wrap(self.denoiser(given, draws, s, table)), x, table):
                yield {name: value / (step.sigma[name] or 1.0) for name, value in step.items()}


def _contiguous(module: nn.Module, tensors: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    for name, value in tensors.items():
        if isinstance(value, Tensor):
            tensors[name] = value.contiguous()
