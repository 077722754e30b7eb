"""The fields of preconditioning and training noise. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from chaindiff.specs.base import Positive, Problems, Spec, by_default


class VpSpec(Spec):
    """The variance-preserving formulation (Song et al. 2021b; EDM, table 1): its network, or its training noise."""

    kind: Literal["vp"]
    beta_d: Positive = 19.9
    beta_min: Positive = 0.1
    eps: Annotated[float, Field(gt=0, lt=1)] = Field(default=1e-5, description="smallest time of training")


class VeSpec(Spec):
    """The variance-exploding formulation (Song et al. 2021b; EDM, table 1): its network, or its training noise."""

    kind: Literal["ve"]
    sigma_min: Positive = 0.02
    sigma_max: Positive = 100.0

    def problems(self) -> Problems:
        if self.sigma_min >= self.sigma_max:
            yield "sigma_min", f"{self.sigma_min:g} should be below sigma_max, {self.sigma_max:g}"


class IddpmSpec(Spec):
    """iDDPM's discrete formulation (Nichol & Dhariwal 2021; EDM, table 1): its network, or its training noise."""

    kind: Literal["iddpm"]
    levels: Annotated[int, Field(ge=2)] = 1000


class PreconditionSpec(Spec):
    """What the network predicts, for parametrisations that accept every noise level."""

    kind: Literal["edm", "x0", "v", "flow"] = Field(
        default="edm",
        description="x0: the network predicts the clean value (VCDM's prior); v: Salimans & Ho's velocity; "
        "flow: the velocity of flow matching",
    )
    loss: Literal["own", "velocity"] = Field(
        default="own",
        description="own: as published with what the network predicts; velocity: that of flow matching, 1 - t at least "
        "0.05 (x0 alone: JiT, Latent Forcing)",
    )

    def problems(self) -> Problems:
        if self.loss != "own" and self.kind != "x0":
            yield "loss", f"'{self.loss}' is for networks that predict x0, not {self.kind}"


Precondition = Annotated[PreconditionSpec | VpSpec | VeSpec | IddpmSpec, Field(discriminator="kind"), by_default("edm")]


class _Shiftable(Spec):
    shift: Positive = Field(
        default=1.0, description="multiplies the levels: the time shift of flow matching (SD3; RAE: 6.93), 1: none"
    )


class NoiseSpec(_Shiftable):
    """Training noise: ln sigma ~ N(mean, std^2) (EDM, table 1)."""

    kind: Literal["lognormal"] = "lognormal"
    mean: float = -1.2
    std: Positive = 1.2


class LogitNormalSpec(_Shiftable):
    """Training noise of flow matching: logit t ~ N(mean, std^2), which is ln sigma (Esser et al. 2024)."""

    kind: Literal["logit_normal"]
    mean: float = 0.0
    std: Positive = 1.0


class UniformTimeSpec(_Shiftable):
    """Training noise of flow matching: t ~ U(min, max), sigma = t / (1 - t) (Liu et al. 2022)."""

    kind: Literal["uniform_time"]
    min: Annotated[float, Field(gt=0, lt=1)] = 1e-3
    max: Annotated[float, Field(gt=0, lt=1)] = 1 - 1e-3

    def problems(self) -> Problems:
        if self.min >= self.max:
            yield "min", f"{self.min:g} should be below max, {self.max:g}"


class CosineNoiseSpec(_Shiftable):
    """Training noise: uniform time of the cosine schedule, log-SNR within 20 of 0 (Salimans & Ho 2022)."""

    kind: Literal["cosine"]


NoiseLevels = Annotated[
    NoiseSpec | LogitNormalSpec | UniformTimeSpec | CosineNoiseSpec | VpSpec | VeSpec | IddpmSpec,
    Field(discriminator="kind"),
    by_default("lognormal"),
]


def published_noise(precondition: Precondition) -> NoiseLevels:
    """The training noise that a parametrisation was published with."""
    if not isinstance(precondition, PreconditionSpec):
        return precondition
    published = {"v": CosineNoiseSpec(kind="cosine"), "flow": LogitNormalSpec(kind="logit_normal")}
    return published.get(precondition.kind, NoiseSpec())
