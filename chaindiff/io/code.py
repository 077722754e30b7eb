"""User-defined code in a recipe, `kind: "my.module:Net"`: imported and called in this one place.

Permission was checked before: an `Assembly` is never built from a recipe whose code is not allowed.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from chaindiff.io.errors import UserError, did_you_mean

NOT_HERE = "the current directory is not searched: install the package, or set PYTHONPATH=FOLDER before the command"


class Named(Protocol):
    """A spec that names code."""

    @property
    def kind(self) -> str: ...
    @property
    def settings(self) -> dict[str, Any]: ...


def create(spec: Named, *arguments: Any, where: str | None = None, made: Any = object, **keywords: Any) -> Any:
    """The result of calling the code of a spec with these arguments and its settings, an instance of `made`.

    Raises UserError, with the field `where`, for missing code and for whatever the code raises itself.
    """
    found = resolve(spec.kind, where)
    _check_settings(spec, found, arguments, keywords, where)
    with _guarded(f"'{spec.kind}' could not be created", where):
        result = found(*arguments, **keywords, **spec.settings)
    if not isinstance(result, made):
        raise UserError(f"'{spec.kind}' returns an object of type {type(result).__name__}, not {made.__name__}", where)
    return result


def resolve(kind: str, where: str | None = None) -> Callable[..., Any]:
    """The class or function that `module:Name` names. Raises UserError if there is none."""
    name, _, attribute = kind.partition(":")
    with _guarded(f"'{name}' could not be imported", where):
        importlib.invalidate_caches()  # the module may have been written a moment ago
        try:
            module = sys.modules.get(name) or importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise  # it exists, and fails to import another module
            raise UserError(f"there is no module '{error.name}'", where, NOT_HERE) from error
        found = getattr(module, attribute, None)  # some modules import their names lazily
    if not callable(found):
        names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        problem = f"there is no '{attribute}' in '{name}'{did_you_mean(attribute, names)}"
        raise UserError(problem if found is None else f"'{kind}' is not a class, but {found!r}", where)
    return found


def _check_settings(spec: Named, found: Callable[..., Any], arguments: Any, keywords: Any, where: str | None) -> None:
    """Raises UserError for unknown and for missing settings."""
    try:
        signature = inspect.signature(found)
    except ValueError:  # some classes written in C have no signature
        return
    parameters = list(signature.parameters.values())[len(arguments) :]
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    known = [name for name in named if name not in keywords]
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        for name in (name for name in spec.settings if name not in known):
            raise UserError(f"'{spec.kind}' takes no setting '{name}'{did_you_mean(name, known)}", where)
    for name in (name for name in known if named[name].default is inspect.Parameter.empty):
        if name not in spec.settings:
            raise UserError(f"'{spec.kind}' needs the setting '{name}'", where, f"add settings: {{{name}: ...}}")
    try:
        signature.bind(*arguments, **keywords, **spec.settings)
    except TypeError as error:
        raise UserError(f"'{spec.kind}' cannot be called by a recipe: {error}", where) from error


@contextmanager
def _guarded(what: str, where: str | None) -> Iterator[None]:
    """Imports installed modules, not the current directory's; turns whatever is raised into a UserError."""
    own = {os.path.realpath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path}
    here = os.getcwd()
    removed = [(i, p) for i, p in enumerate(sys.path) if os.path.realpath(p) == os.path.realpath(here)]
    removed = [] if os.path.realpath(here) in own else removed
    for _, path in removed:
        sys.path.remove(path)
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # user-defined code may raise anything
        raise UserError(f"{what}: {type(error).__name__}: {error}", where, "--debug shows the traceback") from error
    finally:
        for index, path in removed:
            sys.path.insert(index, path)
