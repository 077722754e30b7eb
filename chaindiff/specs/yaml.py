"""YAML with the file and line of every value, read as YAML 1.2 does: `1e-4` is a number, `on` and `no` are text.

Built on the parser's events, so that size and depth are bounded before any value is constructed.
"""

from __future__ import annotations

import numbers
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from chaindiff.io.errors import UserError
from chaindiff.io.files import regular

MAX_BYTES, MAX_DEPTH, MAX_NODES = 1_000_000, 50, 100_000
MAX_INT = 2**63 - 1

_Parser = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_NULL = re.compile(r"(~|null|Null|NULL)?")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
# What YAML calls not printable (1.2.2, section 5.1): control characters, lone surrogates, noncharacters.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff\ufffe\uffff]")
_INDENT_TAB = re.compile(r" *\t")


@dataclass(frozen=True)
class Node:
    """A value and where it was written: a scalar, a list of nodes, or a mapping from text to nodes."""

    value: Any
    where: str | None

    def plain(self) -> Any:
        """The value without its positions."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        return [node.plain() for node in self.value] if isinstance(self.value, list) else self.value

    def get(self, key: str | int) -> Node | None:
        """The node under a key or an index; None if there is none."""
        if isinstance(self.value, dict):
            return self.value.get(str(key))
        if isinstance(self.value, list):
            index = position(key, len(self.value))
            return None if index is None else self.value[index]
        return None

    def fields(self, key: str) -> dict[str, Node]:
        """The mapping under a key; empty if there is none."""
        node = self.get(key)
        return node.value if node is not None and isinstance(node.value, dict) else {}

    def deepest(self, path: Sequence[str | int]) -> Node:
        """The node at a path, or the last that exists on the way there."""
        node = self
        for key in path:
            if (child := node.get(key)) is None:
                break
            node = child
        return node


def position(key: str | int, count: int) -> int | None:
    """The key as the index of one of `count` items; None if it is not one."""
    known = isinstance(key, int) or (key.isdecimal() and len(key) <= len(str(MAX_INT)))
    return int(key) if known and 0 <= int(key) < count else None


def wrap(value: Any, where: str | None) -> Node:
    """Plain data (and pydantic models within it) as nodes that share one position; nodes retain theirs."""
    if isinstance(value, Node):
        return value
    if hasattr(value, "model_dump"):
        value = value.model_dump(exclude_unset=True)
    if isinstance(value, Mapping):
        return Node({str(key): wrap(part, where) for key, part in value.items()}, where)
    if isinstance(value, (list, tuple)):
        return Node([wrap(part, where) for part in value], where)
    if isinstance(value, os.PathLike):
        return Node(os.fspath(value), where)
    integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)  # NumPy's integers too
    return Node(int(value) if integer else value, where)


def display(path: Path) -> str:
    """A path as messages show it: relative to the current directory if it is below."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith(os.pardir) else relative


def read(path: Path) -> Node:
    """The top-level mapping of a YAML file. Raises UserError with file and line for anything else."""
    name = display(path)
    try:
        with regular(path) as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", name) from error
    if len(content) > MAX_BYTES:
        raise UserError(f"is larger than {MAX_BYTES // 1_000_000} MB, too large for a recipe or a stage card", name)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError("is not a text file in UTF-8", f"{name}:{line}", "save it in UTF-8") from error
    node = parse(text, lambda line: f"{name}:{line}")
    if node is None:
        raise UserError("is empty", name)
    if not isinstance(node.value, dict):
        raise UserError(f"should hold fields (`name: value`), not {describe(node.value)}", f"{name}:1")
    return node


def parse(text: str, place: Callable[[int], str]) -> Node | None:
    """The one value in a YAML text, None if it is empty; `place` turns a line number (from 1) into a position."""
    if found := _CONTROL.search(text):
        line = text.count("\n", 0, found.start()) + 1
        raise UserError(f"contains the control character {found[0]!r}, so it is not text", place(line))
    return _Builder(text, place).document()


def assignment(text: str, option: str = "--set") -> tuple[list[str], Node]:
    """`a.b=value` on the command line as a path and a value, which is parsed as YAML."""
    where = f"{option} {text}"
    key, equals, value = text.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise UserError(f"expected NAME=VALUE after {option}", where, f"for example {option} name=value")
    return path, parse(value, lambda line: where) or Node(None, where)


def describe(value: Any) -> str:
    """A value in a message, in a few words."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (dict, list)):
        return "a mapping" if isinstance(value, dict) else "a list"
    text = repr(value)
    return text if len(text) <= 60 else text[:56] + "...'"


class _Builder:
    """Builds nodes from the parser's events."""

    def __init__(self, text: str, place: Callable[[int], str]):
        self.text, self.place = text, place
        self.anchors: dict[str, Node] = {}
        self.nodes = 0
        self.events = self._events()

    def _events(self) -> Iterator[Any]:
        try:
            for event in yaml.parse(self.text, Loader=_Parser):
                if getattr(event, "tag", None) not in (None, "!"):
                    self._refuse(event, f"the tag {event.tag!r} has no meaning here")
                yield event
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = mark.line + 1 if mark else 1
            lines = self.text.splitlines()
            if line <= len(lines) and _INDENT_TAB.match(lines[line - 1]):
                raise UserError("a tab cannot indent YAML; use spaces", self.place(line)) from error
            problem = "; ".join(part for part in (error.problem, error.context) if part)
            raise UserError(f"is not valid YAML: {problem}", self.place(line)) from error
        except (yaml.YAMLError, UnicodeError) as error:
            raise UserError(f"is not valid YAML: {getattr(error, 'reason', error)}", self.place(1)) from error

    def document(self) -> Node | None:
        root = None
        for event in self.events:
            if isinstance(event, yaml.DocumentStartEvent):
                if root is not None:
                    self._refuse(event, "holds more than one document (`---`)")
                root = self._node(next(self.events), 1)
        return root

    def _refuse(self, event: Any, message: str, hint: str | None = None) -> NoReturn:
        raise UserError(message, self._where(event), hint)

    def _where(self, event: Any) -> str:
        return self.place(event.start_mark.line + 1)

    def _count(self, event: Any, nodes: int, depth: int) -> None:
        self.nodes += nodes
        if depth > MAX_DEPTH:
            self._refuse(event, f"is nested more than {MAX_DEPTH} levels deep")
        if self.nodes > MAX_NODES:
            self._refuse(event, f"holds more than {MAX_NODES} values, counting what aliases repeat")

    def _node(self, event: Any, depth: int) -> Node:
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in self.anchors:
                self._refuse(event, f"the alias *{event.anchor} is undefined: no &{event.anchor} ends before it")
            node = self.anchors[event.anchor]
            nodes, height = _measure(node)
            self._count(event, nodes, depth + height)
            return node
        self._count(event, 1, depth)
        if isinstance(event, yaml.ScalarEvent):
            node = Node(self._scalar(event), self._where(event))
        elif isinstance(event, yaml.SequenceStartEvent):
            where, items = self._where(event), []
            while not isinstance(item := next(self.events), yaml.SequenceEndEvent):
                items.append(self._node(item, depth + 1))
            node = Node(items, where)
        else:
            node = self._mapping(event, depth)
        if event.anchor:
            self.anchors[event.anchor] = node
        return node

    def _mapping(self, start: Any, depth: int) -> Node:
        fields: dict[str, Node] = {}
        while not isinstance(key := next(self.events), yaml.MappingEndEvent):
            if not isinstance(key, yaml.ScalarEvent):
                self._refuse(key, "a field's name should be plain text")
            if key.value == "<<" and key.implicit[0]:
                self._refuse(key, "merge keys (`<<`) are not read", "put what is shared in a stage card and `use` it")
            if key.value in fields:
                self._refuse(key, f"'{key.value}' is given twice; first at {fields[key.value].where}")
            # A field's position is the line of its name.
            fields[key.value] = Node(self._node(next(self.events), depth + 1).value, self._where(key))
        return Node(fields, self._where(start))

    def _scalar(self, event: Any) -> Any:
        text = event.value
        if not event.implicit[0]:  # quoted, or a block of text
            return text
        if _NULL.fullmatch(text):
            return None
        if _BOOL.fullmatch(text):
            return text.lower() == "true"
        bare = text.replace("_", "").lower()
        if _INT.fullmatch(text):  # of 64 bits, which every reader supports
            number = MAX_INT + 1 if len(bare) > 30 else int(bare, 0 if bare[:2] in ("0o", "0x") else 10)
            if abs(number) > MAX_INT:
                self._refuse(event, "is too large: whole numbers have at most 64 bits")
            return number
        return float(bare.replace(".inf", "inf").replace(".nan", "nan")) if _FLOAT.fullmatch(text) else text


def _measure(node: Node) -> tuple[int, int]:
    """How many nodes there are, and how many levels below this one."""
    children = node.value.values() if isinstance(node.value, dict) else node.value
    sizes = [_measure(child) for child in children] if isinstance(node.value, (dict, list)) else []
    return 1 + sum(size for size, _ in sizes), max((1 + height for _, height in sizes), default=0)


class _Dumper(yaml.SafeDumper):
    """Quotes what would be read as a number, here or by YAML 1.1 readers."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(rf"(?:{_FLOAT.pattern})\Z"), list("-+.0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(rf"(?:{_INT.pattern})\Z"), None)


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # Unicode line separators survive only within double quotes.
    style = '"' if any(mark in text for mark in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def dump(value: Any) -> str:
    """Plain data as YAML that `parse` and YAML 1.1 readers read alike."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, default_flow_style=None, allow_unicode=True, width=110)
