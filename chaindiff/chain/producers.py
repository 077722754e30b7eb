"""What makes variables of others, and what descends from what: all of a chain that no request changes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from heapq import heappop, heappush
from operator import or_
from typing import Literal

from chaindiff.chain.arrows import ancestors, depth_first
from chaindiff.io.errors import UserError

DETERMINISTIC = ("encoder", "decoder")
ALL = ("source", "stage", *DETERMINISTIC)


@dataclass(frozen=True)
class Producer:
    """Something that makes variables (`outputs`) from others (`inputs`).

    A source makes its outputs from nothing, a decoder one output from one input. `conditionals`: the sets of its own
    outputs that a joint stage (or source) can be given, sampling the others.
    """

    name: str
    kind: Literal["stage", "encoder", "decoder", "source"]
    outputs: tuple[str, ...]
    inputs: tuple[str, ...] = ()
    conditionals: frozenset[frozenset[str]] = frozenset()

    def __str__(self) -> str:
        return f"{self.kind} '{self.name}'"

    @property
    def random(self) -> bool:
        return self.kind in ("stage", "source")


class World:
    """Producers by what they make and read, and the generative graph: an arrow to each variable from its inputs.

    Producers are numbered in order of declaration. Raises UserError if stages and decoders form a cycle, or two of
    them make one variable.
    """

    def __init__(self, producers: Sequence[Producer]):
        self.producers = producers
        self.makers: dict[str, list[int]] = {}
        self.readers: dict[str, list[int]] = {"": []}  # "" is what those read that read nothing
        self.generated: dict[str, Producer] = {}
        graph: dict[str, dict[str, None]] = {}
        for number, producer in enumerate(producers):
            for name in (*producer.inputs, *producer.outputs):
                graph.setdefault(name, {})
                self.makers.setdefault(name, [])
                self.readers.setdefault(name, [])
            for name in dict.fromkeys(producer.inputs or [""]):
                self.readers[name].append(number)
            for name in producer.outputs:
                self.makers[name].append(number)
                if producer.kind != "encoder":
                    if name in self.generated:
                        raise UserError(
                            f"'{name}' is generated twice: by {self.generated[name]} and by {producer}",
                            hint="give each variable one stage, one source or one decoder",
                        )
                    self.generated[name] = producer
            if producer.kind != "encoder":
                for name in producer.inputs:
                    graph[name] |= dict.fromkeys(producer.outputs)
        if cycle := depth_first(graph)[1]:
            makers = dict.fromkeys(self.generated[name] for name in cycle)
            found = {maker.kind for maker in makers}
            kinds = " and ".join(f"{kind}s" for kind in ("stage", "decoder") if kind in found)
            raise UserError(
                f"{kinds} form a cycle: {' -> '.join([*cycle, cycle[0]])}",
                hint=f"remove an input from one of: {', '.join(map(str, makers))}",
            )
        self.bit = {name: 1 << place for place, name in enumerate(graph)}
        self.sampled = [self.bits(p.outputs) if p.random else 0 for p in producers]
        # An encoding that its own input is generated from cannot be computed: it is given, or encoded from what is.
        above = ancestors(graph)
        for _, source, output in self._encodings():
            if output not in self.generated and not above[source] & self.bit[output]:
                graph[source][output] = None
        self.above = ancestors(graph)
        observations = self._observations()
        self.apart = [seen for seen in observations if not self.above[seen[2]] & self.bit[seen[1]]]
        for _, source, output in observations:
            graph[source][output] = None
        self.depends, self.depends_on = graph, ancestors(graph)
        # Where a variable is only encoded, and in two ways, who makes it depends on what else is there.
        self.choices = any(len(made) > 1 for name, made in self.makers.items() if name not in self.generated)

    def _encodings(self) -> list[tuple[Producer, str, str]]:
        """(encoder, input, output)."""
        return [(p, i, o) for p in self.producers if p.kind == "encoder" for o in p.outputs for i in p.inputs]

    def _observations(self) -> list[tuple[Producer, str, str]]:
        """(encoder, input, output) wherever the output is generated, but not on the way to the input.

        On the way to it (or together with what is), the stages model the relation: clip -> image, and clip is
        encoded from image. What is decoded from a variable on the way is on the way too.
        """

        def together(name: str) -> int:
            maker = self.generated.get(root := self.root(name))
            return self.bits(maker.outputs) if maker else self.bit[root]

        return [found for found in self._encodings() if not self.above[found[1]] & together(found[2])]

    def root(self, name: str) -> str:
        """What a decoded variable is made of in the end: one that no decoder makes."""
        while name in self.generated and self.generated[name].kind == "decoder":
            name = self.generated[name].inputs[0]
        return name

    def chain(
        self, have: set[str], kinds: Collection[str], new: Iterable[str] | None = None, skip: Collection[str] = ()
    ) -> dict[str, int]:
        """What producers of these kinds make from what one has, which grows: variable -> its maker.

        Round after round in order of declaration: the first that can make a variable makes it. `new`: the variables
        that were not there when everything was last made of the others. Encoders do not make those in `skip`.
        """
        made: dict[str, int] = {}
        ready: list[tuple[int, int]] = []

        def wake(names: Iterable[str], turn: int, number: int) -> None:
            for reader in {reader for name in names for reader in self.readers[name]}:
                producer = self.producers[reader]
                if producer.kind in kinds and have.issuperset(producer.inputs):
                    heappush(ready, (turn + (reader <= number), reader))

        wake((*have, "") if new is None else new, 0, -1)
        while ready:
            turn, number = heappop(ready)
            producer = self.producers[number]
            not_here = skip if producer.kind == "encoder" else ()
            fresh = [name for name in producer.outputs if name not in have and name not in not_here]
            made |= dict.fromkeys(fresh, number)
            have.update(fresh)
            wake(fresh, turn, number)
        return made

    def bits(self, names: Iterable[str]) -> int:
        """A set of variables as bits."""
        return reduce(or_, (self.bit[name] for name in names), 0)

    def above_any(self, names: Iterable[str]) -> int:
        """What any of these depends on, as bits."""
        return reduce(or_, (self.depends_on[name] for name in names), 0)
