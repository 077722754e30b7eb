"""Directed graphs of names: from each name, in order, those that its arrows lead to. Each function takes one pass."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

Arrows = Mapping[str, Iterable[str]]


def depth_first(after: Arrows) -> tuple[list[str], list[str]]:
    """Names in the order in which a depth-first search leaves them, and the first cycle that it meets, if any."""
    left: list[str] = []
    cycle: list[str] = []
    met: set[str] = set()
    for start in after:
        way: dict[str, Iterator[str]] = {} if start in met else {start: iter(after[start])}
        met.add(start)
        while way:
            for name in way[next(reversed(way))]:
                if name not in met:
                    met.add(name)
                    way[name] = iter(after[name])
                    break
                if name in way and not cycle:
                    cycle = list(way)[list(way).index(name) :]
            else:
                left.append(way.popitem()[0])
    return left, cycle


def ancestors(after: Arrows) -> dict[str, int]:
    """Of each name, those from which arrows lead to it, itself included: a set of bits, by the names' order.

    Cycles are allowed: all names of a strongly connected component have the same ancestors (Kosaraju's algorithm).
    """
    before: dict[str, list[str]] = {name: [] for name in after}
    for name, following in after.items():
        for other in following:
            before[other].append(name)
    bit = {name: 1 << place for place, name in enumerate(after)}
    found: dict[str, int] = {}
    for root in reversed(depth_first(after)[0]):
        if root in found:
            continue
        component, bits = {root: None}, 0
        todo = [root]
        for name in todo:  # grows on the way
            bits |= bit[name]
            for other in before[name]:
                if other in found:
                    bits |= found[other]
                elif other not in component:
                    component[other] = None
                    todo.append(other)
        found |= dict.fromkeys(todo, bits)
    return found


def shortest_path(after: Arrows, start: str, ends: Collection[str]) -> list[str]:
    """The names on a way to the nearest of `ends`; there must be one."""
    came = {start: start}
    todo = [start]
    for name in todo:  # grows on the way
        for other in after[name]:
            if other not in came:
                came[other] = name
                todo.append(other)
    path = [next(name for name in todo if name in ends)]
    while path[-1] != start:
        path.append(came[path[-1]])
    return path[::-1]
