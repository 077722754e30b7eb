"""Core objects from a recipe's specs: preconditioning, training noise, EMAs."""

from __future__ import annotations

from torch import nn

from chaindiff.edm import noise, precondition, schedules
from chaindiff.edm.ema import Average, Ema, PowerEma
from chaindiff.edm.noise import TrainingNoise
from chaindiff.edm.precondition import Preconditioning
from chaindiff.specs.stage import (
    CosineNoiseSpec,
    EmaSpec,
    IddpmSpec,
    LogitNormalSpec,
    NoiseLevels,
    NoiseSpec,
    PowerEmaSpec,
    Precondition,
    PreconditionSpec,
    UniformTimeSpec,
    VeSpec,
    VpSpec,
)


def preconditioning(spec: Precondition, sigma_data: float) -> Preconditioning:
    """The preconditioning that a recipe names; `sigma_data` is the standard deviation of its variable."""
    match spec:
        case VpSpec():
            return precondition.VP(spec.beta_d, spec.beta_min, spec.eps)
        case VeSpec():
            return precondition.VE(spec.sigma_min, spec.sigma_max)
        case IddpmSpec():
            return precondition.IDDPM(spec.levels)
        case PreconditionSpec(kind="edm"):
            return precondition.EDM(sigma_data)
        case PreconditionSpec(kind="x0"):
            return precondition.Direct(sigma_data)
        case PreconditionSpec(kind="v"):
            return precondition.V()
        case _:
            return precondition.Velocity()


def training_noise(spec: NoiseLevels) -> TrainingNoise:
    """The distribution of training levels that a recipe names."""
    match spec:
        case NoiseSpec() | LogitNormalSpec():
            return noise.LogNormal(spec.mean, spec.std)
        case VpSpec():
            return noise.VPTime(schedules.VP(spec.beta_d, spec.beta_min), spec.eps)
        case VeSpec():
            return noise.LogUniform(spec.sigma_min, spec.sigma_max)
        case IddpmSpec():
            return noise.DiscreteLevels(spec.levels)
        case CosineNoiseSpec():
            return noise.CosineTime()
        case UniformTimeSpec():
            return noise.FlowTime(spec.min, spec.max)


def averages(spec: EmaSpec | PowerEmaSpec, source: nn.Module) -> dict[str, Average]:
    """The EMAs that a recipe asks for, by their names in a training state; the first gives the stage's weights."""
    if isinstance(spec, PowerEmaSpec):
        return {f"ema{sigma_rel}": PowerEma(source, sigma_rel) for sigma_rel in spec.tracks}
    return {"ema": Ema(source, spec.half_life, spec.rampup)}
