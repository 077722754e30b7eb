"""What the variables of a recipe must satisfy: shapes, encoders and reducers that fit each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import PurePath

from chaindiff.io.errors import UserError, did_you_mean
from chaindiff.specs.clip_models import known_models, model_folder
from chaindiff.specs.code import CodeSpec
from chaindiff.specs.recipe import (
    DataSpec,
    FileSpec,
    KMeansSpec,
    OpenClipSpec,
    PcaSpec,
    Recipe,
    ResizeSpec,
    VariableSpec,
)

Where = Callable[[str], str | None]

SHAPES = {
    "image": "[channels, height, width]",
    "vector": "[elements]",
    "tokens": "[length, width]",
    "label": "[number of classes]",
    "text": "[]",
}
A = {"image": "an image", "vector": "a vector", "tokens": "tokens", "label": "a label", "text": "a text"}
_DEEPEST = 50  # encoders in a row


def unknown(name: str, recipe: Recipe) -> str:
    return f"there is no variable '{name}'{did_you_mean(name, recipe.variables)}"


def circle_of(edges: Mapping[str, Sequence[str]]) -> list[str] | None:
    """Names that lead back to the first of them, or None."""
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        circle = error.args[1][:0:-1]
        first = circle.index(next(name for name in edges if name in circle))
        return [*circle[first:], *circle[:first], circle[first]]
    return None


def check_variables(recipe: Recipe, where: Where) -> Iterator[UserError]:
    roots = [name for name, v in recipe.variables.items() if v.kind == "image" and v.encoder is None]
    for name in roots[1:]:
        yield UserError(
            f"variables.{name}: images without an encoder are the data, and '{roots[0]}' is that already",
            where(f"variables.{name}"),
            "give one of them an encoder, such as {kind: resize, of: " + roots[0] + "}",
        )
    for name, variable in recipe.variables.items():
        path = f"variables.{name}"
        if problem := shape_problem(variable):
            yield UserError(f"{path}.shape: {problem}", where(f"{path}.shape"))
        elif name in roots and isinstance(recipe.data, DataSpec) and variable.shape[0] != 3:
            problem = f"images of the data have 3 channels (RGB), not {variable.shape[0]}"
            yield UserError(f"{path}.shape: {problem}", where(f"{path}.shape"))
        elif variable.encoder is not None:
            for field, problem in _encoder(recipe, variable):
                yield UserError(f"{path}.encoder.{field}: {problem}", where(f"{path}.encoder.{field}"))
        for field, problem in _decoder(recipe, variable):
            yield UserError(f"{path}.decoder{field}: {problem}", where(f"{path}.decoder{field}"))
        if variable.of is not None and variable.kind not in ("label", "text"):
            problem = f"only a label or a text is read from a field of the data, not a variable of kind {variable.kind}"
            yield UserError(f"{path}.of: {problem}", where(f"{path}.of"))
        elif variable.of is not None and variable.encoder is not None:
            problem = "is never used: this variable comes of its encoder, not of a field of the data"
            yield UserError(f"{path}.of: {problem}", where(f"{path}.of"))
        if variable.source in ("uniform", "empirical") and variable.kind != "label":
            how = "uniformly" if variable.source == "uniform" else "from the data"
            problem = f"only a label can be drawn {how}, not {A[variable.kind]}"
            yield UserError(f"{path}.source: {problem}", where(f"{path}.source"))
        elif variable.source == "empirical" and isinstance(variable.encoder, CodeSpec):
            problem = "how often the encoder's own code makes which class is not known; use uniform"
            yield UserError(f"{path}.source: {problem}", where(f"{path}.source"))
    circle = circle_of({name: [v.reads] for name, v in recipe.variables.items() if v.reads is not None})
    if circle:
        place = f"variables.{circle[0]}.encoder"
        yield UserError(f"{place}: encoders read each other in a circle: {' -> '.join(circle)}", where(place))
    elif deep := next((name for name in recipe.variables if _depth(recipe, name) > _DEEPEST), None):
        place = f"variables.{deep}.encoder"
        yield UserError(f"{place}: encoders read each other more than {_DEEPEST} deep", where(place))

    circle = circle_of({name: [v.decoder.of] for name, v in recipe.variables.items() if v.decoder is not None})
    if circle:
        place = f"variables.{circle[0]}.decoder"
        yield UserError(f"{place}: decoders read each other in a circle: {' -> '.join(circle)}", where(place))


def _depth(recipe: Recipe, name: str) -> int:
    """How many encoders in a row make a variable; it counts no further than one too many."""
    depth = 0
    while depth <= _DEEPEST and (variable := recipe.variables.get(name)) and variable.reads:
        depth, name = depth + 1, variable.reads
    return depth


def shape_problem(variable: VariableSpec) -> str | None:
    kind, shape = variable.kind, variable.shape
    if len(shape) != (0 if kind == "text" else SHAPES[kind].count(",") + 1):
        return f"expected {SHAPES[kind]} for kind {kind}, not {shape}"
    if kind == "image" and shape[1] != shape[2]:
        return f"images are square, not {shape[1]} x {shape[2]}"
    return None


def _encoder(recipe: Recipe, variable: VariableSpec) -> Iterator[tuple[str, str]]:
    """What is wrong with an encoder: the field, and the problem."""
    encoder = variable.encoder
    assert encoder is not None
    if isinstance(encoder, FileSpec):
        if PurePath(encoder.path).suffix not in (".safetensors", ".npy"):
            yield "path", f"expected a .safetensors or .npy file, not '{encoder.path}'"
        if variable.kind not in ("vector", "label"):
            yield "kind", f"a file holds vectors, or what becomes clusters, not {A[variable.kind]}"
        else:
            yield from _reducer(encoder, variable)
        return
    source = recipe.variables.get(encoder.of)
    if source is None:
        yield "of", unknown(encoder.of, recipe)
    elif isinstance(encoder, ResizeSpec):
        if {source.kind, variable.kind} != {"image"}:
            yield "of", f"resize makes an image of an image, not {A[variable.kind]} of {A[source.kind]}"
        elif not shape_problem(source):
            if source.shape[0] != variable.shape[0]:
                yield "of", f"'{encoder.of}' has {source.shape[0]} channels, but this variable {variable.shape[0]}"
            if source.shape[1] < variable.shape[1]:
                yield "of", f"resize makes images smaller, but '{encoder.of}' is {source.shape[1]} pixels wide"
    elif isinstance(encoder, OpenClipSpec):
        if model_folder(encoder.model) is None and encoder.model not in (known := known_models()):
            yield "model", f"there is no open_clip model '{encoder.model}'{did_you_mean(encoder.model, known)}"
        if source.kind not in ("image", "text") or variable.kind not in ("vector", "label"):
            yield "of", f"open_clip makes a vector of an image or a text, not {A[variable.kind]} of {A[source.kind]}"
        else:
            yield from _reducer(encoder, variable)


def _decoder(recipe: Recipe, variable: VariableSpec) -> Iterator[tuple[str, str]]:
    """What is wrong with a decoder: the field, and the problem."""
    decoder = variable.decoder
    if decoder is None:
        return
    source = recipe.variables.get(decoder.of)
    if source is None:
        yield ".of", unknown(decoder.of, recipe)
    elif isinstance(decoder, CodeSpec):
        return
    elif {source.kind, variable.kind} != {"image"}:
        yield ".of", f"resize makes an image of an image, not {A[variable.kind]} of {A[source.kind]}"
    elif not shape_problem(source) and not shape_problem(variable):
        if source.shape[0] != variable.shape[0]:
            yield ".of", f"'{decoder.of}' has {source.shape[0]} channels, but this variable {variable.shape[0]}"
        if source.shape[1] > variable.shape[1]:
            yield ".of", f"a decoder makes images larger, but '{decoder.of}' is {source.shape[1]} pixels wide"


def _reducer(encoder: OpenClipSpec | FileSpec, variable: VariableSpec) -> Iterator[tuple[str, str]]:
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
