"""Consistency of a recipe's variables and stages, as far as it can be checked without data and weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import Any

from chaindiff.io.errors import UserError, did_you_mean
from chaindiff.specs.base import Problems
from chaindiff.specs.clip_models import HUB, REPOSITORY, known_models, model_folder
from chaindiff.specs.code import CodeSpec, is_code
from chaindiff.specs.link import largest_grid, no_channels
from chaindiff.specs.network import JointNetworkSpec, PriorSpec, TransformerSpec, UNetSpec
from chaindiff.specs.recipe import (
    A,
    DataSpec,
    Decoder,
    Encoder,
    EnlargeSpec,
    FileSpec,
    OpenClipSpec,
    Recipe,
    ResizeSpec,
    VariableSpec,
)
from chaindiff.specs.stage import StageSpec
from chaindiff.specs.validate import raise_all
from chaindiff.specs.yaml import describe

_ADM_HEAD = 64  # channels of one attention head
_DEEPEST = 50  # longest chain of encoders
FITS = {"unet": ("image", "map"), "prior": ("vector",), "transformer": ("image", "map", "vector", "tokens")}


def check(recipe: Recipe, where: Callable[[str], str | None]) -> None:
    """Raises one UserError that lists every inconsistency."""
    problems = (*_variables(recipe), *_stages(recipe), *_sample(recipe))
    said = ((path, *problem.split("\n  ", 1)) for path, problem in problems)
    raise_all([UserError(f"{path}: {problem}", where(path), *hint) for path, problem, *hint in said])


def outputs(name: str, stage: StageSpec) -> Sequence[str]:
    """The variables that a stage generates: by default the one of its own name."""
    return [*(stage.generates or [name])]


def _unknown(name: str, recipe: Recipe) -> str:
    return f"there is no variable '{name}'{did_you_mean(name, recipe.variables)}"


def _circle(edges: Mapping[str, Sequence[str]]) -> list[str]:
    """The names along a cycle, back to the first; empty if there is none."""
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        circle = error.args[1][:0:-1]
        first = circle.index(next(name for name in edges if name in circle))
        return [*circle[first:], *circle[:first], circle[first]]
    return []


# ---------------------------------------------------------------- variables


def _variables(recipe: Recipe) -> Problems:
    roots = [name for name, v in recipe.variables.items() if v.kind == "image" and v.encoder is None]
    for name in roots[1:]:
        problem = f"images without an encoder are read from the data, and '{roots[0]}' already is"
        yield f"variables.{name}", f"{problem}\n  give one of them an encoder, such as {{kind: resize, of: {roots[0]}}}"
    for name, variable in recipe.variables.items():
        path, encoder = f"variables.{name}", variable.encoder
        if name in roots and isinstance(recipe.data, DataSpec) and variable.shape[0] not in (1, 3):
            yield f"{path}.shape", f"images of the data have 3 channels (RGB) or 1 (grey), not {variable.shape[0]}"
        model = encoder.model if isinstance(encoder, OpenClipSpec) else None
        if model is not None and (problem := _model(model)):
            yield f"{path}.encoder.model", problem
        for field, coder in (("encoder", encoder), ("decoder", variable.decoder)):
            if coder is not None and not isinstance(coder, FileSpec):
                source = recipe.variables.get(coder.of)
                problems = [_unknown(coder.of, recipe)] if source is None else _coder(coder, source, variable)
                yield from ((f"{path}.{field}.of", problem) for problem in problems)
    encoded = {name: [v.reads] for name, v in recipe.variables.items() if v.reads is not None}
    for field, edges in (("encoder", encoded), ("decoder", _decoded(recipe))):
        if circle := _circle(edges):
            yield f"variables.{circle[0]}.{field}", f"{field}s form a cycle: {' -> '.join(circle)}"
            continue
        depth: dict[str, int] = {}
        for name in TopologicalSorter(edges).static_order():
            depth[name] = 1 + depth[edges[name][0]] if name in edges else 0
        if deep := next((name for name in edges if depth[name] > _DEEPEST), None):
            yield f"variables.{deep}.{field}", f"{field}s are chained more than {_DEEPEST} deep"


def _model(model: str) -> str | None:
    """What is wrong with the name or folder of an open_clip model."""
    try:
        if model.startswith(HUB):
            wrong = f"expected hf-hub:ORG/NAME or hf-hub:ORG/NAME@REVISION, not '{model}'"
            return None if REPOSITORY.fullmatch(model) else wrong
        if model_folder(model) is None and model not in (known := known_models()):
            return f"there is no open_clip model '{model}'{did_you_mean(model, known)}"
    except UserError as error:
        return error.message
    return None


def _coder(coder: Encoder | Decoder, source: VariableSpec, variable: VariableSpec) -> Iterator[str]:
    """What is wrong with the variable that an encoder or a decoder reads."""
    pair = f"{A[source.kind]} to {A[variable.kind]}"
    if isinstance(coder, OpenClipSpec):
        made = ("vector", "label", "map") if source.kind == "image" else ("vector", "label")
        if source.kind not in ("image", "text") or variable.kind not in made:
            yield f"open_clip maps an image or a text to a vector, or an image to a map, not {pair}"
    elif isinstance(coder, ResizeSpec | EnlargeSpec):
        if {source.kind, variable.kind} != {"image"}:
            yield f"resize maps an image to an image, not {pair}"
            return
        (channels, width, _), (ours, size, _) = source.shape, variable.shape
        if channels != ours:
            yield f"'{coder.of}' has {channels} channels, but this variable has {ours}"
        if isinstance(coder, ResizeSpec) and width < size:
            yield f"resize only shrinks images, but '{coder.of}' is {width} pixels wide"
        if isinstance(coder, EnlargeSpec) and width > size:
            yield f"a decoder only enlarges images, but '{coder.of}' is {width} pixels wide"


def _decoded(recipe: Recipe) -> dict[str, list[str]]:
    return {name: [v.decoder.of] for name, v in recipe.variables.items() if v.decoder is not None}


# ---------------------------------------------------------------- stages


def _stages(recipe: Recipe) -> Problems:
    makers: dict[str, str] = {}
    if not recipe.stages:
        yield "stages", "a chain needs at least one stage"
    for name, stage in recipe.stages.items():
        path = f"stages.{name}"
        for output in outputs(name, stage):
            place, variable = f"{path}.generates" if stage.generates else path, recipe.variables.get(output)
            if variable is None:
                hint = "" if stage.generates else "\n  by default a stage generates the variable of its own name"
                yield place, f"{_unknown(output, recipe)}{hint}"
            if output in makers:
                yield place, f"stage '{makers[output]}' already generates '{output}'"
            elif variable and variable.decoder is not None:
                problem = f"stage '{name}' already generates '{output}'; a variable has a stage or a decoder, not both"
                yield f"variables.{output}.decoder", problem
            makers.setdefault(output, name)
        for field, problem in (*_given(recipe, name, stage), *_network(recipe, name, stage)):
            yield f"{path}.{field}", problem
        for used in (*outputs(name, stage), *(link.variable for link in stage.given)):
            variable = recipe.variables.get(used)
            made = (
                variable is None
                or variable.encoder
                or variable.of
                or stage.weights
                or isinstance(recipe.data, CodeSpec)
            )
            if variable and variable.kind in ("vector", "tokens", "map") and not made:
                problem = f"stage '{name}' trains with '{used}', which needs an encoder: data has no {variable.kind}"
                yield f"variables.{used}", problem
    links = {
        output: [link.variable for link in stage.given if link.variable not in outputs(name, stage)]
        for name, stage in recipe.stages.items()
        for output in outputs(name, stage)
    }
    decoded = _decoded(recipe)
    circle = _circle({**decoded, **links})
    if circle and not {*circle} <= decoded.keys() - links.keys():  # decoders alone: reported above
        who = "stages and decoders" if {*circle} - links.keys() else "stages"
        place = f"stages.{makers[next(name for name in circle if name in links)]}.given"
        yield place, f"{who} form a cycle: {' -> '.join(circle)}"


def _given(recipe: Recipe, name: str, stage: StageSpec) -> Problems:
    for index, link in enumerate(stage.given):
        field, variable = f"given.{index}", recipe.variables.get(link.variable)
        if variable is None:
            yield field, _unknown(link.variable, recipe)
            continue
        if link.variable in outputs(name, stage):
            yield field, f"the stage generates '{link.variable}' itself, so it cannot be conditioned on it"
        if variable.kind == "text":
            yield field, f"a network cannot take text; give a variable that encodes '{link.variable}'"
        if len(variable.shape) == 3 and isinstance(stage.network, PriorSpec):
            yield field, f"a prior takes no {variable.kind}s; give a vector that encodes it"
        made = {output: recipe.variables[output].shape for output in outputs(name, stage) if output in recipe.variables}
        if variable.kind == "map" and made and not is_code(stage.kind):
            target = largest_grid(made) or next(iter(made))
            if wrong := no_channels(link.variable, variable.shape, target, made[target]):
                yield field, wrong
        if link.keep and variable.kind != "vector":
            yield f"{field}.keep", f"counts the entries of a vector, but '{link.variable}' is {A[variable.kind]}"
        elif link.keep and (most := max(link.keep)) > variable.shape[0]:
            yield f"{field}.keep", f"{most} is more than the {variable.shape[0]} entries of '{link.variable}'"

    links = {link.variable: link for link in stage.given}
    yield from ((f"sample.{field}", problem) for field, problem in stage.sample.untrained(links, stage.hideable))


def _network(recipe: Recipe, name: str, stage: StageSpec) -> Problems:
    """Whether the network fits what the stage generates; custom networks are checked when they are built."""
    network, names = stage.network, outputs(name, stage)
    made = [recipe.variables[output] for output in names if output in recipe.variables]
    if network is None or isinstance(network, CodeSpec) or len(made) < len(names):
        return
    if isinstance(network, JointNetworkSpec):
        yield from _joint(network, names, made)
    elif len(names) > 1 and not isinstance(network, TransformerSpec):
        tail = "use a joint network or a transformer"
        yield "network.kind", f"a {network.kind} generates one variable, not {len(names)}; {tail}"
    elif other := next((variable.kind for variable in made if variable.kind not in FITS[network.kind]), None):
        things = " and ".join(A[kind].split()[-1].removesuffix("s") + "s" for kind in FITS[network.kind])
        tail = " or a ".join(use for use, kinds in FITS.items() if other in kinds)
        yield "network.kind", f"a {network.kind} generates {things}, not {A[other]}{tail and f'; use a {tail}'}"
    elif isinstance(network, UNetSpec):
        yield from _unet(network, made[0].shape, "network")
    elif isinstance(network, TransformerSpec):
        given = [recipe.variables.get(link.variable) for link in stage.given]
        pictured = any(variable is not None and len(variable.shape) == 3 for variable in given)
        shapes = {name: variable.shape for name, variable in zip(names, made, strict=True)}
        yield from ((f"network.{field}", problem) for field, problem in network.misfits(shapes, pictured))


def _joint(network: JointNetworkSpec, names: Sequence[str], made: list[VariableSpec]) -> Problems:
    kinds = [variable.kind for variable in made]
    grids = [variable.shape for variable in made if len(variable.shape) == 3]
    if len(grids) != 1 or kinds.count("vector") != len(kinds) - 1:
        listed = ", ".join(f"'{name}' ({kind})" for name, kind in zip(names, kinds, strict=True))
        tail = "a transformer generates any number of each"
        yield "generates", f"a joint network generates one image or map and one or more vectors, not {listed}; {tail}"
        return
    yield from _unet(network.image, grids[0], "network.image")


def _unet(network: UNetSpec, shape: Sequence[int], path: str) -> Problems:
    _, size, width = shape
    if size != width:
        yield f"{path}.kind", f"a unet generates square images and maps, not {size} x {width}"
        return
    levels = len(network.mult)
    if size % 2 ** (levels - 1):
        yield f"{path}.mult", f"{levels} levels halve the image {levels - 1} times, but {size} pixels do not allow it"
        return
    widths = {size >> level: network.channels * factor for level, factor in enumerate(network.mult)}
    for resolution in network.attention:
        if resolution not in widths:
            known = ", ".join(map(str, widths))
            yield f"{path}.attention", f"{resolution} is not one of this network's resolutions: {known}"
    attending = [widths[at] for at in {*network.attention, min(widths)} if at in widths]
    odd = [width for width in attending if width % _ADM_HEAD]
    if network.arch == "adm" and odd:
        yield f"{path}.channels", f"adm has attention heads of {_ADM_HEAD} channels, which does not divide {min(odd)}"


# ---------------------------------------------------------------- sampling


def _sample(recipe: Recipe) -> Problems:
    for index, name in enumerate(recipe.sample.want):
        if name not in recipe.variables:
            yield f"sample.want.{index}", _unknown(name, recipe)
    for name, value in recipe.sample.given.items():
        variable = recipe.variables.get(name)
        problem = _unknown(name, recipe) if variable is None else _value(variable, value)
        if problem:
            yield f"sample.given.{name}", problem


def _value(variable: VariableSpec, value: Any) -> str | None:
    """What is wrong with a given value. Python may give tensors, which are checked when they are used."""
    said = isinstance(value, (bool, int, float, str, list, dict, type(None)))
    if variable.kind == "label" and said:
        classes = value if isinstance(value, list) and value else [value]
        for one in classes:
            if isinstance(one, bool) or not isinstance(one, (int, str)):
                return f"expected a class's name or number, or a list of them, not {describe(one)}"
            if isinstance(one, int) and variable.shape and not 0 <= one < variable.shape[0]:
                return f"{one} is not one of {variable.shape[0]} classes, numbered from 0"
    elif variable.kind == "text" and said:
        texts = value if isinstance(value, list) else [value]
        if not texts or any(isinstance(text, (list, dict, type(None))) for text in texts):
            return f"expected a text, or a list of texts, not {describe(value)}"
    elif said and not isinstance(value, str):
        return f"expected a file or folder, not {describe(value)}"
    return None
