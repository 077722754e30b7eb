"""How the noise levels of variables that are generated together go down: which levels training draws, and sampling
follows. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat

from chaindiff.specs.base import Name, Probability, Problems, Spec

Time = Annotated[
    Literal["edm", "flow", "cosine", "logsnr"],
    Field(description="progress along a variable's pass is even in: EDM's time steps (eq. 5), or a schedule's time"),
]
Points = Annotated[list[tuple[Probability, Probability]], Field(min_length=2)]


class SharedPath(Spec):
    """All levels go down together: one level for all variables, on the scale of each."""

    kind: Literal["shared"]
    time: Time = "edm"


class OffsetPath(Spec):
    """Each variable starts its pass a part of a pass after the one before (semantic-first diffusion: 0.3)."""

    kind: Literal["offset"]
    offset: Probability = Field(default=0.3, description="in passes; 0: together, 1: one after the other")
    time: Time = "edm"


class TablePath(Spec):
    """Curves of one's own: each variable's progress, from 0 at pure noise to 1 at the clean value."""

    kind: Literal["table"]
    points: dict[Name, Points] = Field(
        description="by variable: [progress of the whole path, progress of the variable] from [0, 0] to [1, 1], both "
        "of which never fall"
    )
    time: Time = "edm"

    def problems(self) -> Problems:
        for name, points in self.points.items():
            if points[0] != (0, 0) or points[-1] != (1, 1):
                yield f"points.{name}", f"should go from [0, 0] to [1, 1], not from {[*points[0]]} to {[*points[-1]]}"
            elif any(b[0] <= a[0] or b[1] < a[1] for a, b in pairwise(points)):
                yield f"points.{name}", "the first numbers should rise, and the second never fall"


SamplePath = Annotated[SharedPath | OffsetPath | TablePath, Field(discriminator="kind")]


class Shares(Spec):
    """Beside the path: how often training has some of the variables, each subset equally often, out of its reach."""

    exact: Probability = Field(
        default=0.0, description="share of samples in which some variables are known exactly, and can so be given"
    )
    pure: Probability = Field(
        default=0.0, description="share in which some are pure noise, as those that sampling has not started yet"
    )
    absent: Probability = Field(
        default=0.0, description="share in which some are replaced by zeros and not learned, for guidance without them"
    )
    only: list[Name] = Field(default=[], description="the variables that these shares concern; none: all, not at once")

    def problems(self) -> Problems:
        if (total := self.exact + self.pure + self.absent) > 1:
            yield "exact", f"the shares exact, pure and absent should sum to at most 1, not {total:g}"
        if self.only and not total:
            yield "only", "is never used: the shares exact, pure and absent are 0"


class IndependentLevels(Shares):
    """Every variable's level is drawn alone: the network learns every path."""

    kind: Literal["independent"] = "independent"
    exact: Probability = Field(default=0.2, description=Shares.model_fields["exact"].description)
    pure: Probability = Field(default=0.2, description=Shares.model_fields["pure"].description)


class SharedLevels(SharedPath, Shares):
    """One level, drawn as the first variable's, for all variables."""


class OffsetLevels(OffsetPath, Shares):
    """One draw, that of the first variable, places all variables on the path."""


class TableLevels(TablePath, Shares):
    """One draw, that of the first variable, places all variables on the path."""

    def problems(self) -> Problems:
        yield from TablePath.problems(self)
        yield from Shares.problems(self)


class CascadedLevels(Shares):
    """One variable is learned in every sample: those before it are finished, those after it are pure noise."""

    kind: Literal["cascaded"]
    shares: dict[Name, NonNegativeFloat] = Field(
        default={}, description="how often each variable is the one that is learned, relative to 1 for the others"
    )
    finished: Probability = Field(
        default=0.0,
        description="noise on finished variables: the time t of flow matching is uniform from 0 to this, sigma = "
        "t / (1 - t) (Latent Forcing: 0.25)",
    )


Family = Annotated[
    IndependentLevels | SharedLevels | OffsetLevels | TableLevels | CascadedLevels,
    Field(discriminator="kind"),
    BeforeValidator(lambda said: {"kind": "independent", **said} if isinstance(said, dict) else said),
]


class Part(Spec):
    """A family with its share of a mixture."""

    share: Annotated[float, Field(gt=0, le=1e6)] = Field(default=1.0, description="relative to the other parts")
    levels: Family


class MixtureLevels(Spec):
    """Every sample's levels come from one of several families; sampling follows the first."""

    kind: Literal["mixture"]
    parts: list[Part] = Field(min_length=1)


TrainPath = Annotated[
    IndependentLevels | SharedLevels | OffsetLevels | TableLevels | CascadedLevels | MixtureLevels,
    Field(discriminator="kind"),
    BeforeValidator(lambda said: {"kind": "independent", **said} if isinstance(said, dict) else said),
]


def hidden(path: TrainPath) -> Literal["absent", "pure"] | None:
    """How a network that was trained so can do without one of its variables: guidance by it needs that."""
    if isinstance(path, MixtureLevels):
        return next((how for part in path.parts if (how := hidden(part.levels))), None)
    return "absent" if path.absent else "pure" if path.pure else None


def hideable(path: TrainPath, names: Sequence[str]) -> list[str]:
    """Those of several variables that a network which was trained so can do without."""
    if isinstance(path, MixtureLevels):
        return [name for name in names if any(name in hideable(part.levels, names) for part in path.parts)]
    return [name for name in names if name in (path.only or names)] if hidden(path) and len(names) > 1 else []


def sampled(path: TrainPath) -> SamplePath:
    """The path that sampling follows unless it says otherwise."""
    if isinstance(path, MixtureLevels):
        return sampled(path.parts[0].levels)
    if isinstance(path, SharedPath | OffsetPath | TablePath):
        fields = path.model_dump(exclude={*Shares.model_fields})
        return {"shared": SharedPath, "offset": OffsetPath, "table": TablePath}[path.kind](**fields)
    return OffsetPath(kind="offset", offset=1.0) if path.kind == "cascaded" else SharedPath(kind="shared")
