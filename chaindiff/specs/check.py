"""What a recipe must satisfy beyond the types of its fields, as far as that can be told without data or weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import Any

from pydantic import BaseModel

from chaindiff.specs.errors import UserError, did_you_mean
from chaindiff.specs.recipe import KMeansSpec, OpenClipSpec, PcaSpec, Recipe, ResizeSpec, VariableSpec
from chaindiff.specs.stage import (
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

Where = Callable[[str], str | None]

_SHAPES = {
    "image": "[channels, height, width]",
    "vector": "[elements]",
    "tokens": "[length, width]",
    "label": "[number of classes]",
    "text": "[]",
}
_A = {"image": "an image", "vector": "a vector", "tokens": "tokens", "label": "a label", "text": "a text"}
_ADM_HEAD = 64  # channels of one attention head
_DEEPEST = 50  # encoders in a row
# Beyond these numbers nothing could be built, or even planned, in anybody's lifetime and memory.
_MOST = {"shape": 1_000_000, "batch": 1_000_000, "steps": 100_000, "channels": 16_384, "mult": 1_000}
_MOST |= {"blocks": 1_000, "width": 65_536, "depth": 1_000, "heads": 65_536, "k": 1_000_000}


def check(recipe: Recipe, where: Where) -> None:
    """Raises one UserError that lists everything that does not fit together."""
    raise_all([UserError(f"{path}: {problem}", where(path)) for path, problem in _limits(recipe)])
    raise_all([*_variables(recipe, where), *_stages(recipe, where), *_sample(recipe, where)])


def outputs(name: str, stage: StageSpec) -> Sequence[str]:
    """The variables that a stage generates: the one of its own name unless it says otherwise."""
    return stage.generates or [name]


def _unknown(name: str, recipe: Recipe) -> str:
    return f"there is no variable '{name}'{did_you_mean(name, recipe.variables)}"


def _circle(edges: Mapping[str, Sequence[str]]) -> list[str] | None:
    """Names that lead back to the first of them, or None."""
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        circle = error.args[1][:0:-1]
        first = circle.index(next(name for name in edges if name in circle))
        return [*circle[first:], *circle[:first], circle[first]]
    return None


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


# ---------------------------------------------------------------- variables


def _variables(recipe: Recipe, where: Where) -> Iterator[UserError]:
    roots = [name for name, v in recipe.variables.items() if v.kind == "image" and v.encoder is None]
    for name in roots[1:]:
        yield UserError(
            f"variables.{name}: images without an encoder are the data, and '{roots[0]}' is that already",
            where(f"variables.{name}"),
            "give one of them an encoder, such as {kind: resize, of: " + roots[0] + "}",
        )
    for name, variable in recipe.variables.items():
        path = f"variables.{name}"
        if problem := _shape(variable):
            yield UserError(f"{path}.shape: {problem}", where(f"{path}.shape"))
        elif name in roots and variable.shape[0] != 3:
            problem = f"images of the data have 3 channels (RGB), not {variable.shape[0]}"
            yield UserError(f"{path}.shape: {problem}", where(f"{path}.shape"))
        elif variable.encoder is not None:
            for field, problem in _encoder(recipe, variable):
                yield UserError(f"{path}.encoder.{field}: {problem}", where(f"{path}.encoder.{field}"))
        if variable.of is not None and variable.kind not in ("label", "text"):
            problem = f"only a label or a text is read from a field of the data, not a variable of kind {variable.kind}"
            yield UserError(f"{path}.of: {problem}", where(f"{path}.of"))
        elif variable.of is not None and variable.encoder is not None:
            problem = "is never used: this variable comes of its encoder, not of a field of the data"
            yield UserError(f"{path}.of: {problem}", where(f"{path}.of"))
        if variable.source in ("uniform", "empirical") and variable.kind != "label":
            how = "uniformly" if variable.source == "uniform" else "from the data"
            problem = f"only a label can be drawn {how}, not {_A[variable.kind]}"
            yield UserError(f"{path}.source: {problem}", where(f"{path}.source"))
    circle = _circle({name: [v.encoder.of] for name, v in recipe.variables.items() if v.encoder is not None})
    if circle:
        place = f"variables.{circle[0]}.encoder"
        yield UserError(f"{place}: encoders read each other in a circle: {' -> '.join(circle)}", where(place))
    elif deep := next((name for name in recipe.variables if _depth(recipe, name) > _DEEPEST), None):
        place = f"variables.{deep}.encoder"
        yield UserError(f"{place}: encoders read each other more than {_DEEPEST} deep", where(place))


def _depth(recipe: Recipe, name: str) -> int:
    """How many encoders in a row make a variable; it counts no further than one too many."""
    depth = 0
    while depth <= _DEEPEST and (variable := recipe.variables.get(name)) and variable.encoder:
        depth, name = depth + 1, variable.encoder.of
    return depth


def _shape(variable: VariableSpec) -> str | None:
    kind, shape = variable.kind, variable.shape
    if len(shape) != (0 if kind == "text" else _SHAPES[kind].count(",") + 1):
        return f"expected {_SHAPES[kind]} for kind {kind}, not {shape}"
    if kind == "image" and shape[1] != shape[2]:
        return f"images are square, not {shape[1]} x {shape[2]}"
    return None


def _encoder(recipe: Recipe, variable: VariableSpec) -> Iterator[tuple[str, str]]:
    """What is wrong with an encoder: the field, and the problem."""
    encoder = variable.encoder
    assert encoder is not None
    source = recipe.variables.get(encoder.of)
    if source is None:
        yield "of", _unknown(encoder.of, recipe)
    elif isinstance(encoder, ResizeSpec):
        if {source.kind, variable.kind} != {"image"}:
            yield "of", f"resize makes an image of an image, not {_A[variable.kind]} of {_A[source.kind]}"
        elif not _shape(source):
            if source.shape[0] != variable.shape[0]:
                yield "of", f"'{encoder.of}' has {source.shape[0]} channels, but this variable {variable.shape[0]}"
            if source.shape[1] < variable.shape[1]:
                yield "of", f"resize makes images smaller, but '{encoder.of}' is {source.shape[1]} pixels wide"
    elif isinstance(encoder, OpenClipSpec):
        if source.kind not in ("image", "text") or variable.kind not in ("vector", "label"):
            yield "of", f"open_clip makes a vector of an image or a text, not {_A[variable.kind]} of {_A[source.kind]}"
        else:
            yield from _reducer(encoder, variable)


def _reducer(encoder: OpenClipSpec, variable: VariableSpec) -> Iterator[tuple[str, str]]:
    """What is wrong with the way from an embedding to the variable."""
    reduce, size = encoder.reduce, variable.shape[0]
    if variable.kind == "vector":
        if isinstance(reduce, PcaSpec) and reduce.k != size:
            yield "reduce.k", f"{reduce.k} components do not make a vector of shape {variable.shape}"
    elif not isinstance(reduce, KMeansSpec):
        yield "reduce", f"an embedding becomes a label as the nearest of its clusters: {{kind: kmeans, k: {size}}}"
    elif reduce.k != size:
        yield "reduce.k", f"{reduce.k} clusters do not make a label of {size} classes"
    elif encoder.scaling == "raw":
        yield "scaling", "is never used: the number of a cluster is not scaled"


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
                yield UserError(f"{place}: {_unknown(output, recipe)}", where(place), hint)
            if output in makers:
                yield UserError(f"{place}: stage '{makers[output]}' generates '{output}' already", where(place))
            makers.setdefault(output, name)
        of_stage = (*_given(recipe, name, stage), *_network(recipe, name, stage), *_formulation(stage))
        for field, problem in (*of_stage, *_numbers(stage)):
            yield UserError(f"{path}.{field}: {problem}", where(f"{path}.{field}"))
        for used in (*outputs(name, stage), *(link.variable for link in stage.given)):
            variable = recipe.variables.get(used)
            if variable and variable.kind in ("vector", "tokens") and not variable.encoder and not stage.weights:
                problem = f"stage '{name}' trains with '{used}', which needs an encoder: data holds no {variable.kind}"
                yield UserError(f"variables.{used}: {problem}", where(f"variables.{used}"))
    links = {
        output: [link.variable for link in stage.given if link.variable not in outputs(name, stage)]
        for name, stage in recipe.stages.items()
        for output in outputs(name, stage)
    }
    if circle := _circle(links):
        place = f"stages.{makers[circle[0]]}.given"
        yield UserError(f"{place}: stages are given each other in a circle: {' -> '.join(circle)}", where(place))


def _given(recipe: Recipe, name: str, stage: StageSpec) -> Iterator[tuple[str, str]]:
    seen: set[str] = set()
    for index, link in enumerate(stage.given):
        field, variable = f"given.{index}", recipe.variables.get(link.variable)
        if variable is None:
            yield field, _unknown(link.variable, recipe)
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
        if link.sample_noise > link.noise:
            problem = f"{link.sample_noise:g} is above {link.noise:g}, the largest level in training (`noise`)"
            yield f"{field}.sample_noise", problem
        if link.null == "learned" and not link.can_be_absent:
            yield f"{field}.null", "is never used: the link has no `dropout`, so its value is never absent in training"
        for problem in _absence(link, variable):
            yield f"{field}.{problem[0]}", problem[1]
    if stage.sample.guidance != 1 and not any(link.can_be_absent and link.sampled for link in stage.given):
        problem = f"{stage.sample.guidance:g} compares with an absent value, but no link of this stage has a `dropout`"
        yield "sample.guidance", problem


def _absence(link: LinkSpec, variable: VariableSpec) -> Iterator[tuple[str, str]]:
    """What is wrong with how much of a variable a link gives."""
    if link.keep and variable.kind != "vector":
        yield "keep", f"counts the entries of a vector, but '{link.variable}' is {_A[variable.kind]}"
    elif link.keep and max(link.keep) > variable.shape[0]:
        yield "keep", f"{max(link.keep)} is more than the {variable.shape[0]} entries of '{link.variable}'"
    elif link.keep and not max(link.keep):
        yield "keep", "0 alone never gives anything; leave the link out"
    if link.sample_keep is not None and link.sample_keep not in link.keep:
        known = f"one of {link.keep}" if link.keep else "which this link has not"
        yield "sample_keep", f"{link.sample_keep} was not trained: it should be in `keep`, {known}"
    if link.sample_absent and not link.can_be_absent:
        yield "sample_absent", "the value is never absent in training: the link has no `dropout`, and no 0 in `keep`"


def _network(recipe: Recipe, name: str, stage: StageSpec) -> Iterator[tuple[str, str]]:
    network = stage.network
    variable = recipe.variables.get(outputs(name, stage)[0])
    if isinstance(network, PriorSpec) and (network.width % network.heads or network.width % 2):
        yield "network.width", f"should be even and a multiple of heads ({network.heads}), not {network.width}"
    if variable is None or _shape(variable):
        return
    fits = {"unet": "image", "prior": "vector"}
    if variable.kind != fits[network.kind]:
        others = [kind for kind, made in fits.items() if made == variable.kind]
        tail = f"; use a {others[0]}" if others else ""
        yield "network.kind", f"a {network.kind} generates {fits[network.kind]}s, not {_A[variable.kind]}{tail}"
    elif isinstance(network, UNetSpec):
        yield from _unet(network, variable.shape[1])


def _unet(network: UNetSpec, size: int) -> Iterator[tuple[str, str]]:
    levels = len(network.mult)
    if not levels:
        yield "network.mult", "expected a factor for at least one resolution"
        return
    if size % 2 ** (levels - 1):
        yield "network.mult", f"{levels} levels halve the image {levels - 1} times, but {size} pixels do not allow it"
        return
    widths = {size >> level: network.channels * factor for level, factor in enumerate(network.mult)}
    for resolution in network.attention:
        if resolution not in widths:
            known = ", ".join(map(str, widths))
            yield "network.attention", f"{resolution} is none of this network's resolutions, which are {known}"
    if network.channels % 2:
        yield "network.channels", f"should be even, not {network.channels}"
    attending = [widths[at] for at in {*network.attention, min(widths)} if at in widths]
    odd = [width for width in attending if width % _ADM_HEAD]
    if network.arch == "adm" and odd:
        yield "network.channels", f"adm attends with heads of {_ADM_HEAD} channels, which do not divide {min(odd)}"


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
    network = stage.network
    if isinstance(network, UNetSpec) and network.arch == "ncsnpp" and kind not in ("edm", "x0", "ve"):
        problem = f"ncsnpp embeds the logarithm of a level (edm, x0, ve), but {kind} tells times up to 1000; use ddpmpp"
        yield "network.arch", problem


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
            yield UserError(f"sample.want: {_unknown(name, recipe)}", where(f"sample.want.{index}"))
    for name, value in recipe.sample.given.items():
        place, variable = f"sample.given.{name}", recipe.variables.get(name)
        if variable is None:
            yield UserError(f"sample.given: {_unknown(name, recipe)}", where(place))
        elif problem := _value(variable, value):
            yield UserError(f"{place}: {problem}", where(place))


def _value(variable: VariableSpec, value: Any) -> str | None:
    """What is wrong with a given value. Python may give tensors, which are checked when they are used."""
    said = isinstance(value, (bool, int, float, str, list, dict, type(None)))
    if variable.kind == "label" and said:
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            return f"expected a class's name or number, not {describe(value)}"
        if isinstance(value, int) and variable.shape and not 0 <= value < variable.shape[0]:
            return f"{value} is not one of {variable.shape[0]} classes, which count from 0"
    elif variable.kind == "text" and said:
        texts = value if isinstance(value, list) else [value]
        if not texts or any(isinstance(text, (list, dict, type(None))) for text in texts):
            return f"expected a text, or a list of texts, not {describe(value)}"
    elif said and not isinstance(value, str):
        return f"expected a file or folder, not {describe(value)}"
    return None
