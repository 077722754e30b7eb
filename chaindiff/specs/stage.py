"""The fields of a stage card: what it generates, given what, and how. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from chaindiff.io.errors import did_you_mean
from chaindiff.specs.base import PROBLEM, Name, Problems, Spec
from chaindiff.specs.code import CODE, is_code
from chaindiff.specs.link import Link
from chaindiff.specs.network import JointNetworkSpec, Network, UNetSpec
from chaindiff.specs.noise import NoiseLevels, NoiseSpec, Precondition, PreconditionSpec, published_noise
from chaindiff.specs.path import (
    CascadedLevels,
    IndependentLevels,
    MixtureLevels,
    Shares,
    TablePath,
    TrainPath,
    hideable,
)
from chaindiff.specs.sampling import SamplerSpec
from chaindiff.specs.training import AugmentSpec, TrainSpec


class Generated(Spec):
    """One of the variables that a stage generates; none: as the stage says."""

    precondition: Precondition | None = None
    noise: NoiseLevels | None = None
    weight: Annotated[float, Field(gt=0, le=1e6)] = Field(default=1.0, description="of its loss among all variables'")


def _named(said: Any) -> Any:
    """A list of names is short for a mapping without settings."""
    if isinstance(said, str):
        raise PydanticCustomError(PROBLEM, "expected a list or a mapping of names, not '{name}'", {"name": said})
    if isinstance(said, list) and all(isinstance(name, str) for name in said):
        if twice := next((name for name in said if said.count(name) > 1), None):
            raise PydanticCustomError(PROBLEM, "'{name}' is named twice", {"name": twice})
        return {name: {} for name in said}
    return said


_Several = Annotated[
    dict[Name, Generated],
    Field(min_length=1),
    BeforeValidator(_named, json_schema_input_type=list[Name] | dict[Name, Generated]),
]


class StageSpec(Spec):
    """One stage: generates a variable given others, or several together."""

    # Editors require a network where the loader does: not of user-defined stages.
    model_config = ConfigDict(
        json_schema_extra={"if": {"properties": {"kind": {"const": "diffusion"}}}, "then": {"required": ["network"]}}
    )

    description: str = ""
    kind: Annotated[str, Field(pattern=f"^(diffusion|{CODE})$")] = Field(
        default="diffusion", description="`diffusion`, or a user-defined class: `MODULE:NAME`, with `--allow-code`"
    )
    settings: dict[str, Any] = Field(default={}, description="keyword arguments of a user-defined class")
    generates: _Several | None = Field(
        default=None,
        description="a list of names, or a mapping of names to settings of their own; none: the variable of the "
        "stage's name; of several, the first leads (`path`)",
    )
    path: TrainPath = Field(
        default=IndependentLevels(), description="of several variables: how training draws their levels together"
    )
    given: list[Link] = []
    network: Network | None = Field(default=None, description="required unless the kind is a user-defined class")
    precondition: Precondition = PreconditionSpec()
    noise: NoiseLevels = Field(default=NoiseSpec(), description="none: what the parametrisation was published with")
    augment: AugmentSpec = AugmentSpec()
    train: TrainSpec
    sample: SamplerSpec = SamplerSpec()
    weights: str | None = Field(
        default=None,
        description="a weights file, or the directory of a run that trained this stage; none: the run's own or the "
        "shipped file",
    )
    init: str | None = Field(default=None, description="a weights file that training starts from")

    @field_validator("network")
    @classmethod
    def _network(cls, said: Network | None, info: ValidationInfo) -> Network | None:
        if said is None and info.data.get("kind") == "diffusion":
            raise PydanticCustomError("missing", "Field required")
        return said

    def model_post_init(self, context: Any) -> None:
        if "noise" not in self.model_fields_set:  # a frozen model is filled in as pydantic itself does it
            object.__setattr__(self, "noise", published_noise(self.precondition))

    def problems(self) -> Problems:
        yield from self._of_code()
        yield from self._of_given()
        yield from self._of_levels()
        yield from self._of_several()

    def _of_code(self) -> Problems:
        """Fields of diffusion stages do not apply to user-defined stages, nor the other way round."""
        if not is_code(self.kind):
            if self.settings:
                yield "settings", "are for user-defined stages, whose kind is MODULE:NAME"
            return
        diffusion = {"network", "precondition", "noise", "path", "sample", "init"}
        said = [*self.model_dump(include=diffusion & self.model_fields_set, exclude_defaults=True)]
        for index, link in enumerate(self.given):
            said += [f"given.{index}.{f}" for f in link.model_dump(exclude={"variable"}, exclude_defaults=True)]
        for field in sorted(said):
            yield field, "is for diffusion stages; arguments of this stage's code go into its `settings`"

    def _of_given(self) -> Problems:
        names = [link.variable for link in self.given]
        for index, link in enumerate(self.given):
            if link.variable in names[:index]:
                yield f"given.{index}", f"'{link.variable}' is given twice"
            if link.null == "learned" and not link.can_be_absent:
                problem = "is never used: the link has no `dropout`, so its value is never absent in training"
                yield f"given.{index}.null", problem

    def _of_levels(self) -> Problems:
        """Whether network, preconditioning and training noise are compatible."""
        kind = self.precondition.kind
        if not isinstance(self.precondition, PreconditionSpec) and self.noise != self.precondition:
            tail = f"leave `noise` out, or use precondition: {{kind: edm}}, which takes noise of kind {self.noise.kind}"
            problem = f"a network of kind {kind} needs training noise of kind {kind} with the same numbers; {tail}"
            yield "noise", problem
        network, place = self.network, "network.arch"
        if isinstance(network, JointNetworkSpec):
            network, place = network.image, "network.image.arch"
        if isinstance(network, UNetSpec) and network.arch == "ncsnpp" and kind not in ("edm", "x0", "ve"):
            tail = f"but {kind} uses times up to 1000; use ddpmpp"
            problem = f"ncsnpp embeds the logarithm of a level (edm, x0, ve), {tail}"
            yield place, problem

    def _of_several(self) -> Problems:
        """Whether options for several variables are used with several variables."""
        names = [*(self.generates or ())]
        if len(names) < 2:
            single = {"path": self.path != IndependentLevels(), "sample.path": self.sample.path is not None}
            for field, unused in (*single.items(), ("sample.variables", bool(self.sample.variables))):
                if unused:
                    yield field, "is for stages that generate several variables together; this one generates one"
            if isinstance(self.network, JointNetworkSpec):
                alone = f"'{names[0]}' alone" if names else "one variable"
                yield "generates", f"a joint network generates one image or map and one or more vectors, not {alone}"
            return
        for own in (self.precondition, *(said.precondition for said in (self.generates or {}).values())):
            if own is not None and not isinstance(own, PreconditionSpec):
                reason = "at which one of several variables is known exactly; use edm, x0, v or flow"
                yield "precondition", f"a network of kind {own.kind} does not accept level 0, {reason}"
        yield from self._of_paths(names)
        if self.init is not None:
            yield "init", "initialises one network with another's weights; a joint network consists of several"

    @property
    def hideable(self) -> list[str]:
        """The variables that it generates and can do without, as guidance by them needs."""
        return hideable(self.path, [*(self.generates or ())])

    def _of_paths(self, names: list[str]) -> Problems:
        """Whether paths name the variables that the stage generates."""
        whole = {"path": self.path, "sample.path": self.sample.path}
        if isinstance(self.path, MixtureLevels):
            whole |= {f"path.parts.{place}.levels": part.levels for place, part in enumerate(self.path.parts)}
        named = {"sample.variables": [*self.sample.variables]}
        for field, path in whole.items():
            if isinstance(path, Shares):
                named[f"{field}.only"] = path.only
            if isinstance(path, TablePath):
                named[f"{field}.points"] = [*path.points]
                if missing := [name for name in names if name not in path.points]:
                    yield f"{field}.points", f"has no curve for '{missing[0]}'"
            elif isinstance(path, CascadedLevels):
                named[f"{field}.shares"] = [*path.shares]
        for field, said in named.items():
            for name in said:
                if name not in names:
                    yield f"{field}.{name}", f"the stage does not generate '{name}'{did_you_mean(name, names)}"
