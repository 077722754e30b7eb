"""The one merge: of a card and what stands beside `use`, of `--set`, and of keyword overrides."""

from __future__ import annotations

from typing import Any

from chaindiff.specs.errors import UserError, did_you_mean
from chaindiff.specs.fields import child, default_kind, kinds, model_of
from chaindiff.specs.yaml import Node, position


def merge(base: Node, over: Node, annotation: Any) -> Node:
    """`over` on top of `base`: mappings merge, numbered items of a list too, everything else is replaced.

    Where the schema has a union told apart by `kind`, another kind drops the fields that belonged to the old one.
    """
    if isinstance(base.value, list) and isinstance(over.value, dict):
        return _merge_items(base, over, annotation)
    if not isinstance(base.value, dict) or not isinstance(over.value, dict):
        return over
    kind, new = (node.value["kind"].plain() if "kind" in node.value else None for node in (base, over))
    kind = kind or default_kind(annotation)
    if kinds(annotation) and None not in (kind, new) and new != kind:
        return over
    merged = dict(base.value)
    for key, node in over.value.items():
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


def nest(path: list[str], node: Node) -> Node:
    """A value at the end of a dotted path, as nested mappings."""
    for key in reversed(path):
        node = Node({key: node}, node.where)
    return node


def refuse_strangers(tree: Node, over: Node) -> None:
    """An override may add a whole stage or variable, but part of one under an unknown name is a slip of the pen."""
    for group, word, whole in (("stages", "stage", {"use", "network", "kind"}), ("variables", "variable", {"kind"})):
        known, said = (layer.fields(group) for layer in (tree, over))
        for name, node in said.items():
            if name not in known and not (isinstance(node.value, dict) and whole & node.value.keys()):
                raise UserError(f"there is no {word} '{name}'{did_you_mean(name, known)}", node.where)
