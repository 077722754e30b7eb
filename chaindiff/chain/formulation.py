"""Core objects from a recipe's specs: preconditioning, training noise, EMAs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from chaindiff.edm import families, noise, precondition, schedules
from chaindiff.edm.ema import Average, Ema, PowerEma
from chaindiff.edm.families import Family
from chaindiff.edm.noise import TrainingNoise
from chaindiff.edm.precondition import Preconditioning
from chaindiff.specs import noise as noises
from chaindiff.specs import path as paths
from chaindiff.specs.training import EmaSpec, PowerEmaSpec


def preconditioning(spec: noises.Precondition, sigma_data: float) -> Preconditioning:
    """The preconditioning that a recipe names; `sigma_data` is the standard deviation of its variable."""
    match spec:
        case noises.VpSpec():
            return precondition.VP(spec.beta_d, spec.beta_min, spec.eps)
        case noises.VeSpec():
            return precondition.VE(spec.sigma_min, spec.sigma_max)
        case noises.IddpmSpec():
            return precondition.IDDPM(spec.levels)
        case noises.PreconditionSpec(kind="edm"):
            return precondition.EDM(sigma_data)
        case noises.PreconditionSpec(kind="x0"):
            return precondition.Direct(sigma_data, velocity=spec.loss == "velocity")
        case noises.PreconditionSpec(kind="v"):
            return precondition.V()
        case _:
            return precondition.Velocity()


def training_noise(spec: noises.NoiseLevels) -> TrainingNoise:
    """The distribution of training levels that a recipe names."""
    shift = getattr(spec, "shift", 1.0)
    return _unshifted(spec) if shift == 1 else noise.Shifted(_unshifted(spec), shift)


def family(spec: paths.TrainPath | paths.SamplePath, names: Sequence[str]) -> Family:
    """The path family that a recipe names, over these variables in their order."""
    match spec:
        case paths.MixtureLevels():
            return families.Mixture([(part.share, family(part.levels, names)) for part in spec.parts])
        case paths.CascadedLevels():
            found: Family = families.Cascaded(spec.shares, spec.finished)
        case paths.SharedPath() | paths.OffsetPath() | paths.TablePath():
            found = curves(spec, names)
        case _:
            found = families.Independent()
    shares = (spec.exact, spec.pure, spec.absent) if isinstance(spec, paths.Shares) else (0.0, 0.0, 0.0)
    return families.Beside(found, *shares, spec.only) if isinstance(spec, paths.Shares) and any(shares) else found


def curves(spec: paths.SamplePath, names: Sequence[str]) -> families.Along:
    """A path with one draw or one progress for all variables."""
    ruler = families.Ruler(spec.time)
    if isinstance(spec, paths.TablePath):
        return families.Along({name: spec.points[name] for name in names}, ruler)
    offset = spec.offset if isinstance(spec, paths.OffsetPath) else 0.0
    return families.Along(families.staggered_curves(names, offset), ruler)


def _unshifted(spec: noises.NoiseLevels) -> TrainingNoise:
    match spec:
        case noises.NoiseSpec() | noises.LogitNormalSpec():
            return noise.LogNormal(spec.mean, spec.std)
        case noises.VpSpec():
            return noise.VPTime(schedules.VP(spec.beta_d, spec.beta_min), spec.eps)
        case noises.VeSpec():
            return noise.LogUniform(spec.sigma_min, spec.sigma_max)
        case noises.IddpmSpec():
            return noise.DiscreteLevels(spec.levels)
        case noises.CosineNoiseSpec():
            return noise.CosineTime()
        case noises.UniformTimeSpec():
            return noise.FlowTime(spec.min, spec.max)


def averages(spec: EmaSpec | PowerEmaSpec, source: nn.Module) -> dict[str, Average]:
    """The EMAs that a recipe asks for, by their names in a training state; the first gives the stage's weights."""
    if isinstance(spec, PowerEmaSpec):
        return {f"ema{sigma_rel}": PowerEma(source, sigma_rel) for sigma_rel in spec.tracks}
    return {"ema": Ema(source, spec.half_life, spec.rampup)}
