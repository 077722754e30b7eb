"""Merging of stage cards, the fields beside `use`, `--set` and keyword overrides."""

from __future__ import annotations

from typing import Any

from chaindiff.io.errors import UserError, did_you_mean
from chaindiff.specs.fields import child, default_kind, kinds, model_of, named, named_values
from chaindiff.specs.yaml import Node, position

EVERY = "*"
STANDS = "stands for the names of stages, variables or given values: stages.*, variables.*, sample.given.*"


def merge(base: Node, over: Node, annotation: Any) -> Node:
    """`over` on top of `base`: mappings merge, numbered items of a list too, everything else is replaced.

    Where a list of names is short for a mapping, a mapping is merged with that one.
    Where the schema has a union discriminated by `kind`, another kind drops the fields that belonged to the old one.
    In a mapping from names to plain values, `{}` removes all entries and `null` removes one.
    """
    if isinstance(base.value, list) and isinstance(over.value, dict):
        if not named(annotation) or any(key.isdecimal() for key in over.value):
            return _merge_items(base, over, annotation)
        base = Node(
            {str(item.value): Node({}, item.where) for item in base.value}, base.where
        )  # a list is short for it
    if not isinstance(base.value, dict) or not isinstance(over.value, dict):
        return over
    clears = named_values(annotation)
    if clears and not over.value:
        return over
    kind, new = (node.value["kind"].plain() if "kind" in node.value else None for node in (base, over))
    kind = kind or default_kind(annotation)
    if kinds(annotation) and None not in (kind, new) and new != kind:
        return over
    merged = dict(base.value)
    for key, node in over.value.items():
        if clears and key in merged and node.value is None:
            del merged[key]
            continue
        merged[key] = merge(merged[key], node, child(annotation, key, new or kind)) if key in merged else node
    return Node(merged, base.where)


def _merge_items(base: Node, over: Node, annotation: Any) -> Node:
    """`given.0.noise=0.1`: the items of a list by their position."""
    items = list(base.value)
    for key, node in over.value.items():
        index = position(key, len(items))
        if index is None:
            counted = f"its items are 0 to {len(items) - 1}" if items else "it is empty"
            raise UserError(f"this list has no item '{key}'; {counted}, or replace it as a whole", node.where)
        item, inner = items[index], child(annotation, index)
        model = model_of(inner)
        if model is not None and not isinstance(item.value, dict):  # a bare name stands for the first field
            item = Node({next(iter(model.model_fields)): item}, item.where)
        items[index] = merge(item, node, inner)
    return Node(items, base.where)


def spread(over: Node, tree: Node | None, annotation: Any, path: str = "") -> Node:
    """An override with `*` expanded to every name that `tree` has there; an explicit name takes precedence.

    Raises UserError for a `*` that matches nothing, or stands where no names are expected.
    """
    if not isinstance(over.value, dict):
        return over
    known = tree.value if tree is not None and isinstance(tree.value, dict) else {}
    said = dict(over.value)
    if (everywhere := said.pop(EVERY, None)) is not None:
        if not named(annotation):
            raise UserError(f"{path}{EVERY}: `*` {STANDS}", everywhere.where)
        if not known:
            raise UserError(f"{path}{EVERY}: `*` matches nothing, since there are no entries", everywhere.where)
        inner = child(annotation, EVERY)
        said = {n: merge(everywhere, said[n], inner) if n in said else everywhere for n in [*known, *said]}
    below = {n: spread(node, known.get(n), child(annotation, n), f"{path}{n}.") for n, node in said.items()}
    return Node(below, over.where)


def nest(path: list[str], node: Node) -> Node:
    """A value at the end of a dotted path, as nested mappings."""
    for key in reversed(path):
        node = Node({key: node}, node.where)
    return node


def refuse_strangers(tree: Node, over: Node) -> None:
    """An override may add a whole stage or variable, but part of one under an unknown name is a typo."""
    for group, word, whole in (("stages", "stage", {"use", "network", "kind"}), ("variables", "variable", {"kind"})):
        known, said = (layer.fields(group) for layer in (tree, over))
        for name, node in said.items():
            if name not in known and not (isinstance(node.value, dict) and whole & node.value.keys()):
                raise UserError(f"there is no {word} '{name}'{did_you_mean(name, known)}", node.where)
