"""Core objects from a recipe's specs: preconditioning, training noise, EMAs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from chaindiff.edm import families, noise, precondition, schedules
from chaindiff.edm.ema import Average, Ema, PowerEma
from chaindiff.edm.families import Family
from chaindiff.edm.noise import TrainingNoise
from chaindiff.edm.precondition import Preconditioning
from chaindiff.specs.noise import (
    CosineNoiseSpec,
    IddpmSpec,
    LogitNormalSpec,
    NoiseLevels,
    NoiseSpec,
    Precondition,
    PreconditionSpec,
    UniformTimeSpec,
    VeSpec,
    VpSpec,
)
from chaindiff.specs.path import (
    CascadedLevels,
    MixtureLevels,
    OffsetPath,
    SamplePath,
    SharedPath,
    Shares,
    TablePath,
    TrainPath,
)
from chaindiff.specs.training import EmaSpec, PowerEmaSpec


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
            return precondition.Direct(sigma_data, velocity=spec.loss == "velocity")
        case PreconditionSpec(kind="v"):
            return precondition.V()
        case _:
            return precondition.Velocity()


def training_noise(spec: NoiseLevels) -> TrainingNoise:
    """The distribution of training levels that a recipe names."""
    shift = getattr(spec, "shift", 1.0)
    return _unshifted(spec) if shift == 1 else noise.Shifted(_unshifted(spec), shift)


def family(spec: TrainPath | SamplePath, names: Sequence[str]) -> Family:
    """The path family that a recipe names, over these variables in their order."""
    match spec:
        case MixtureLevels():
            return families.Mixture([(part.share, family(part.levels, names)) for part in spec.parts])
        case CascadedLevels():
            found: Family = families.Cascaded(spec.shares, spec.finished)
        case SharedPath() | OffsetPath() | TablePath():
            found = curves(spec, names)
        case _:
            found = families.Independent()
    shares = (spec.exact, spec.pure, spec.absent) if isinstance(spec, Shares) else (0.0, 0.0, 0.0)
    return families.Beside(found, *shares, spec.only) if isinstance(spec, Shares) and any(shares) else found


def curves(spec: SamplePath, names: Sequence[str]) -> families.Along:
    """A path with one draw or one progress for all variables."""
    ruler = families.Ruler(spec.time)
    if isinstance(spec, TablePath):
        return families.Along({name: spec.points[name] for name in names}, ruler)
    offset = spec.offset if isinstance(spec, OffsetPath) else 0.0
    return families.Along(families.staggered_curves(names, offset), ruler)


def _unshifted(spec: NoiseLevels) -> TrainingNoise:
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
