"""What a recipe must satisfy beyond the types of its fields, as far as that can be told without data or weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from chaindiff.io.errors import UserError
from chaindiff.specs.check_variables import A, Where, check_variables, circle_of, shape_problem, unknown
from chaindiff.specs.code import CodeSpec, is_code
from chaindiff.specs.recipe import Recipe, VariableSpec
from chaindiff.specs.sampling import sampling_problems
from chaindiff.specs.stage import (
    JointNetworkSpec,
    JointSpec,
    LinkSpec,
    PowerEmaSpec,
    PreconditionSpec,
    PriorSpec,
    SamplerSpec,
    StageSpec,
    UNetSpec,
    UniformTimeSpec,
    VeSpec,
)
from chaindiff.specs.validate import raise_all
from chaindiff.specs.yaml import describe

_DIFFUSION = {"network", "precondition", "noise", "joint", "sample", "init"}  # what only our own stages read
_ADM_HEAD = 64  # channels of one attention head
# Beyond these numbers nothing could be built, or even planned, in anybody's lifetime and memory.
_MOST = {"shape": 1_000_000, "batch": 1_000_000, "steps": 100_000, "channels": 16_384, "mult": 1_000}
_MOST |= {"blocks": 1_000, "width": 65_536, "depth": 1_000, "heads": 65_536, "k": 1_000_000}


def check(recipe: Recipe, where: Where) -> None:
    """Raises one UserError that lists everything that does not fit together."""
    raise_all([UserError(f"{path}: {problem}", where(path)) for path, problem in _limits(recipe)])
    raise_all([*check_variables(recipe, where), *_stages(recipe, where), *_sample(recipe, where)])


def outputs(name: str, stage: StageSpec) -> Sequence[str]:
    """The variables that a stage generates: the one of its own name unless it says otherwise."""
    return stage.generates or [name]


def _limits(spec: BaseModel, path: str = "") -> Iterator[tuple[str, str]]:
    """Numbers that are too large: the field, and the problem."""
    for name, value in spec:
        inside = value if isinstance(value, Mapping) else {}
        for key, part in {"": value, **inside}.items():
            if isinstance(part, BaseModel):
                yield from _limits(part, f"{path}{name}.{key}." if key else f"{path}{name}.")
        numbers = value if isinstance(value, list) else [value]
        if name in _MOST and (most := max((n for n in numbers if isinstance(n, int)), default=0)) > _MOST[name]:
            yield f"{path}{name}", f"{most} is more than {_MOST[name]}, the most that is allowed"


# ---------------------------------------------------------------- stages


def _stages(recipe: Recipe, where: Where) -> Iterator[UserError]:
    makers: dict[str, str] = {}
    if not recipe.stages:
        yield UserError("stages: a chain has at least one stage", where("stages"))
    for name, stage in recipe.stages.items():
        path = f"stages.{name}"
        for output in outputs(name, stage):
            place = f"{path}.generates" if stage.generates else path
            if output not in recipe.variables:
                hint = None if stage.generates else "a stage generates what bears its name unless it says `generates`"
                yield UserError(f"{place}: {unknown(output, recipe)}", where(place), hint)
            if output in makers:
                yield UserError(f"{place}: stage '{makers[output]}' generates '{output}' already", where(place))
            elif output in recipe.variables and recipe.variables[output].decoder is not None:
                problem = f"stage '{name}' generates '{output}' already; a variable has a stage or a decoder"
                place = f"variables.{output}.decoder"
                yield UserError(f"{place}: {problem}", where(place))
            makers.setdefault(output, name)
        of_stage = (*_given(recipe, name, stage), *_code(stage), *_network(recipe, name, stage), *_formulation(stage))
        for field, problem in (*of_stage, *_numbers(stage)):
            yield UserError(f"{path}.{field}: {problem}", where(f"{path}.{field}"))
        for used in (*outputs(name, stage), *(link.variable for link in stage.given)):
            variable = recipe.variables.get(used)
            made = variable is None or variable.encoder or stage.weights or isinstance(recipe.data, CodeSpec)
            if variable and variable.kind in ("vector", "tokens") and not made:
                problem = f"stage '{name}' trains with '{used}', which needs an encoder: data holds no {variable.kind}"
                yield UserError(f"variables.{used}: {problem}", where(f"variables.{used}"))
    links = {
        output: [link.variable for link in stage.given if link.variable not in outputs(name, stage)]
        for name, stage in recipe.stages.items()
        for output in outputs(name, stage)
    }
    decoded = {name: [v.decoder.of] for name, v in recipe.variables.items() if v.decoder is not None}
    circle = circle_of({**decoded, **links})
    if circle and not {*circle} <= decoded.keys() - links.keys():  # that of decoders alone is told with the variables
        who = "stages and decoders" if {*circle} - links.keys() else "stages"
        place = f"stages.{makers[next(name for name in circle if name in links)]}.given"
        yield UserError(f"{place}: {who} are given each other in a circle: {' -> '.join(circle)}", where(place))


def _given(recipe: Recipe, name: str, stage: StageSpec) -> Iterator[tuple[str, str]]:
    seen: set[str] = set()
    for index, link in enumerate(stage.given):
        field, variable = f"given.{index}", recipe.variables.get(link.variable)
        if variable is None:
            yield field, unknown(link.variable, recipe)
            continue
        if link.variable in outputs(name, stage):
            yield field, f"the stage generates '{link.variable}' itself, so it cannot be given it"
        if link.variable in seen:
            yield field, f"'{link.variable}' is given twice"
        seen.add(link.variable)
        if variable.kind == "text":
            yield field, f"a network cannot take text; give a variable that encodes '{link.variable}'"
        if variable.kind == "image" and isinstance(stage.network, PriorSpec):
            yield field, "a prior takes no images; give a vector that encodes it"
        if link.null == "learned" and not link.can_be_absent:
            yield f"{field}.null", "is never used: the link has no `dropout`, so its value is never absent in training"
        for problem in _absence(link, variable):
            yield f"{field}.{problem[0]}", problem[1]
    for field, problem in sampling_problems({link.variable: link for link in stage.given}, stage.sample):
        yield f"sample.{field}", problem


def _code(stage: StageSpec) -> Iterator[tuple[str, str]]:
    """What only our own stages read is no part of a stage of one's own, nor the other way round."""
    if not is_code(stage.kind):
        if stage.settings:
            yield "settings", "are for code: for a stage whose kind is MODULE:NAME"
        return
    said = [f for f in _DIFFUSION & stage.model_fields_set if getattr(stage, f) != StageSpec.model_fields[f].default]
    for index, link in enumerate(stage.given):
        said += [f"given.{index}.{f}" for f in link.model_dump(exclude={"variable"}, exclude_defaults=True)]
    for field in sorted(said):
        yield field, "is for diffusion stages; what the code of this stage is to know stands in its `settings`"


def _absence(link: LinkSpec, variable: VariableSpec) -> Iterator[tuple[str, str]]:
    """What is wrong with how much of a variable a link gives."""
    if link.keep and variable.kind != "vector":
        yield "keep", f"counts the entries of a vector, but '{link.variable}' is {A[variable.kind]}"
    elif link.keep and max(link.keep) > variable.shape[0]:
        yield "keep", f"{max(link.keep)} is more than the {variable.shape[0]} entries of '{link.variable}'"
    elif link.keep and not max(link.keep):
        yield "keep", "0 alone never gives anything; leave the link out"


def _network(recipe: Recipe, name: str, stage: StageSpec) -> Iterator[tuple[str, str]]:
    network, names = stage.network, outputs(name, stage)
    known = [variable for output in names if (variable := recipe.variables.get(output)) and not shape_problem(variable)]
    if isinstance(network, JointNetworkSpec):
        yield from _prior(network.vector, "network.vector")
        if len(known) == len(names):
            yield from _joint(network, names, known)
        return
    if isinstance(network, PriorSpec):
        yield from _prior(network, "network")
    if network is None or isinstance(network, CodeSpec):  # what it fits, it says itself when it is built
        return
    if len(names) > 1:
        yield "network.kind", f"a {network.kind} generates one variable, not {len(names)}; use a joint network"
    elif known:
        yield from _single(network, known[0])


def _single(network: UNetSpec | PriorSpec, variable: VariableSpec) -> Iterator[tuple[str, str]]:
    fits = {"unet": "image", "prior": "vector"}
    if variable.kind != fits[network.kind]:
        others = [kind for kind, made in fits.items() if made == variable.kind]
        tail = f"; use a {others[0]}" if others else ""
        yield "network.kind", f"a {network.kind} generates {fits[network.kind]}s, not {A[variable.kind]}{tail}"
    elif isinstance(network, UNetSpec):
        yield from _unet(network, variable.shape[1], "network")


def _joint(network: JointNetworkSpec, names: Sequence[str], made: list[VariableSpec]) -> Iterator[tuple[str, str]]:
    kinds = [variable.kind for variable in made]
    if kinds.count("image") != 1 or kinds.count("vector") != len(kinds) - 1 or len(kinds) < 2:
        listed = ", ".join(f"'{name}' ({kind})" for name, kind in zip(names, kinds, strict=True))
        yield "generates", f"a joint network generates one image and one or more vectors, not {listed}"
        return
    if len(spreads := {variable.sigma_data for variable in made}) > 1:
        listed = " and ".join(f"{spread:g}" for spread in sorted(spreads))
        yield "generates", f"what is generated together needs one sigma_data, not {listed}"
    yield from _unet(network.image, made[kinds.index("image")].shape[1], "network.image")


def _prior(network: PriorSpec, path: str) -> Iterator[tuple[str, str]]:
    if network.width % network.heads or network.width % 2:
        yield f"{path}.width", f"should be even and a multiple of heads ({network.heads}), not {network.width}"


def _unet(network: UNetSpec, size: int, path: str) -> Iterator[tuple[str, str]]:
    levels = len(network.mult)
    if not levels:
        yield f"{path}.mult", "expected a factor for at least one resolution"
        return
    if size % 2 ** (levels - 1):
        yield f"{path}.mult", f"{levels} levels halve the image {levels - 1} times, but {size} pixels do not allow it"
        return
    widths = {size >> level: network.channels * factor for level, factor in enumerate(network.mult)}
    for resolution in network.attention:
        if resolution not in widths:
            known = ", ".join(map(str, widths))
            yield f"{path}.attention", f"{resolution} is none of this network's resolutions, which are {known}"
    if network.channels % 2:
        yield f"{path}.channels", f"should be even, not {network.channels}"
    attending = [widths[at] for at in {*network.attention, min(widths)} if at in widths]
    odd = [width for width in attending if width % _ADM_HEAD]
    if network.arch == "adm" and odd:
        yield f"{path}.channels", f"adm attends with heads of {_ADM_HEAD} channels, which do not divide {min(odd)}"


def _formulation(stage: StageSpec) -> Iterator[tuple[str, str]]:
    """Whether network, preconditioning and training noise belong together."""
    kind, noise = stage.precondition.kind, stage.noise
    for field, spec in (("precondition", stage.precondition), ("noise", noise)):
        if isinstance(spec, VeSpec) and spec.sigma_min >= spec.sigma_max:
            yield f"{field}.sigma_min", f"{spec.sigma_min:g} should be below sigma_max, {spec.sigma_max:g}"
    if isinstance(noise, UniformTimeSpec) and noise.min >= noise.max:
        yield "noise.min", f"{noise.min:g} should be below max, {noise.max:g}"
    if not isinstance(stage.precondition, PreconditionSpec) and noise != stage.precondition:
        tail = f"leave `noise` out, or say precondition: {{kind: edm}}, which takes noise of kind {noise.kind}"
        yield "noise", f"a network of kind {kind} knows the noise levels of {kind} with the same numbers alone; {tail}"
    network = stage.network.image if isinstance(stage.network, JointNetworkSpec) else stage.network
    if isinstance(network, UNetSpec) and network.arch == "ncsnpp" and kind not in ("edm", "x0", "ve"):
        problem = f"ncsnpp embeds the logarithm of a level (edm, x0, ve), but {kind} tells times up to 1000; use ddpmpp"
        yield "network.image.arch" if network is not stage.network else "network.arch", problem
    yield from _together(stage)


def _together(stage: StageSpec) -> Iterator[tuple[str, str]]:
    """Whether what is said of several variables has several to say it of."""
    joint, kind = stage.joint, stage.precondition.kind
    if len(stage.generates or ()) < 2:
        for field, unused in (("joint", joint != JointSpec()), ("sample.offset", stage.sample.offset != 0)):
            if unused:
                yield field, "is for stages that generate several variables together; this one generates one"
    elif joint.exact + joint.pure > 1:
        yield "joint.pure", f"{joint.pure:g} and exact, {joint.exact:g}, should be no more than 1 together"
    elif not isinstance(stage.precondition, PreconditionSpec):
        problem = f"a network of kind {kind} does not know level 0, at which one of several variables is known exactly"
        yield "precondition", f"{problem}; use edm, x0, v or flow"
    if len(stage.generates or ()) > 1 and stage.init is not None:
        yield "init", "begins one network from another's weights; a joint network is made of several"


def _numbers(stage: StageSpec) -> Iterator[tuple[str, str]]:
    sample, train = stage.sample, stage.train
    if max(train.optimizer.betas) >= 1:
        yield "train.optimizer.betas", f"should be below 1, not {max(train.optimizer.betas):g}"
    low, high = sample.levels
    if low >= high:
        if sample.sigma_min:
            yield "sample.sigma_min", f"{low:g} should be below sigma_max, {high:g}"
        else:
            yield "sample.sigma_max", f"{high:g} should be above sigma_min, {low:g}"
    if sample.rho != SamplerSpec().rho and sample.discretisation != "edm":
        yield "sample.rho", f"shapes the steps of discretisation edm alone, not of {sample.discretisation}"
    if sample.eta and sample.solver not in ("ddim", "dpmpp_2m"):
        yield "sample.eta", f"is for ddim and dpmpp_2m; {sample.solver} takes its noise from `churn`"
    elif sample.eta and sample.churn.amount:
        yield "sample.eta", "and churn both add noise to every step; set one of them to 0"
    if sample.churn.max is not None and sample.churn.min > sample.churn.max:
        yield "sample.churn.min", f"{sample.churn.min:g} should not be above churn.max, {sample.churn.max:g}"
    if isinstance(train.ema, PowerEmaSpec) and len(set(train.ema.tracks)) < len(train.ema.tracks):
        yield "train.ema.tracks", f"an average is kept once, not twice: {train.ema.tracks}"
    if train.batch % train.accumulate:
        yield "train.accumulate", f"{train.accumulate} micro-batches do not divide a batch of {train.batch}"


# ---------------------------------------------------------------- sampling


def _sample(recipe: Recipe, where: Where) -> Iterator[UserError]:
    for index, name in enumerate(recipe.sample.want):
        if name not in recipe.variables:
            yield UserError(f"sample.want: {unknown(name, recipe)}", where(f"sample.want.{index}"))
    for name, value in recipe.sample.given.items():
        place, variable = f"sample.given.{name}", recipe.variables.get(name)
        if variable is None:
            yield UserError(f"sample.given: {unknown(name, recipe)}", where(place))
        elif problem := _value(variable, value):
            yield UserError(f"{place}: {problem}", where(place))


def _value(variable: VariableSpec, value: Any) -> str | None:
    """What is wrong with a given value. Python may give tensors, which are checked when they are used."""
    said = isinstance(value, (bool, int, float, str, list, dict, type(None)))
    if variable.kind == "label" and said:
        classes = value if isinstance(value, list) and value else [value]
        for one in classes:
            if isinstance(one, bool) or not isinstance(one, (int, str)):
                return f"expected a class's name or number, or a list of them, not {describe(one)}"
            if isinstance(one, int) and variable.shape and not 0 <= one < variable.shape[0]:
                return f"{one} is not one of {variable.shape[0]} classes, which count from 0"
    elif variable.kind == "text" and said:
        texts = value if isinstance(value, list) else [value]
        if not texts or any(isinstance(text, (list, dict, type(None))) for text in texts):
            return f"expected a text, or a list of texts, not {describe(value)}"
    elif said and not isinstance(value, str):
        return f"expected a file or folder, not {describe(value)}"
    return None
