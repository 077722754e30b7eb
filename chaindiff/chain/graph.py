"""The resolver: what a request (want, given) runs, in which order, and whether it may be answered at all.

Forward chaining over producers: encoders and decoders (deterministic), stages and sources (random), from what is given
to what is wanted. The model is p(everything) = product over stages and sources of p(outputs | inputs). A variable
without a stage or source is a function: of its decoder's input, or without a decoder of its encoder's inputs. An
encoder of a variable that is generated otherwise is an *observation*: it computes the variable from what is given, in
place of its generator; it is never applied to what was sampled. A decoder is a deterministic generator: it runs on
what was sampled too, and its arrow belongs to the generative graph as a stage's do.

A request is accepted if no variable that is known descends from one that would be sampled, and every stage some of
whose outputs are known was trained for that conditional; others are refused, naming what would be ignored. Why then
every accepted request samples p(want | given), decoders included, is shown in docs/mathematics.md, "When a request is
exact".

A recipe whose stages leave out a dependence that an encoder reveals (image and clip sampled separately, though clip is
an encoding of image) is not such a product; requests that would expose it are refused too. A variable with two encoders
counts as depending on the inputs of both.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from chaindiff.chain.arrows import shortest_path
from chaindiff.chain.producers import ALL, DETERMINISTIC, Producer, World
from chaindiff.io.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Step:
    """One run of a producer: it reads `inputs` (with those of its own outputs that are known) and makes `outputs`.

    `drop`: variables that are no longer needed after this step.
    """

    producer: Producer
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    drop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What a request runs, in order."""

    want: tuple[str, ...]
    given: tuple[str, ...]
    steps: tuple[Step, ...]

    @property
    def unused(self) -> tuple[str, ...]:
        """Given variables that change nothing: no step reads them, and they are not wanted."""
        used = {name for step in self.steps for name in step.inputs}.union(self.want)
        return tuple(name for name in self.given if name not in used)

    @property
    def running(self) -> dict[str, tuple[str, ...]]:
        """The stages that run, in order, and what each makes."""
        return {step.producer.name: step.outputs for step in self.steps if step.producer.kind == "stage"}


def resolve(producers: Sequence[Producer], want: Sequence[str], given: Iterable[str] = ()) -> Plan:
    """The plan of a request. Steps are in topological order, ties in order of declaration.

    Raises UserError: unknown names, stages or decoders in a cycle, two of them for one variable, nothing produces a
    variable, or sampling would ignore what is given.
    """
    producers, want, given = tuple(producers), tuple(dict.fromkeys(want)), tuple(dict.fromkeys(given))
    names = dict.fromkeys(name for p in producers for name in (*p.outputs, *p.inputs))
    for role, asked in (("want", want), ("given", given)):
        for name in asked:
            if name not in names:
                raise UserError(f"{role}: no variable '{name}' in this chain{did_you_mean(name, names)}")
    if not want:
        raise UserError("nothing is wanted", hint=f"want one or more of: {', '.join(names)}")
    world = World(producers)
    request = _Request.of(world, want, given)
    try:
        needed = request.check()
    except _Ignored as refusal:
        raise UserError(refusal.message, hint=_mend(refusal, request, given, names)) from None
    return Plan(want, given, _schedule(request, needed))


class _Ignored(UserError):
    """Sampling `sampled` would ignore `evidence`."""

    def __init__(self, message: str, sampled: tuple[str, ...], evidence: tuple[str, ...]):
        super().__init__(message)
        self.sampled, self.evidence = sampled, evidence


# ------------------------------------------------------------ a request


@dataclass(frozen=True)
class _Request:
    """What is wanted and `given`; `known`: what is given, then what is computed from it; who makes everything else.

    `unknown`: the others, and `ignorable`: the variables that known ones descend from, as bits.
    """

    world: World
    want: tuple[str, ...]
    given: Collection[str]
    known: Mapping[str, None]
    makers: Mapping[str, int]
    unknown: int
    ignorable: int

    @classmethod
    def of(cls, world: World, want: tuple[str, ...], given: Iterable[str]) -> _Request:
        """Makers: encoders and decoders of what is given, else what generates a variable, else its encoder.

        Encoders come first: where both could make a variable, what is encoded from a given one is nearer to the truth.
        """
        have = set(given := dict.fromkeys(given))
        makers = world.chain(have, ("encoder",)) | world.chain(have, DETERMINISTIC)
        known = given | dict.fromkeys(makers)
        makers |= world.chain(have, ALL, skip=world.generated)
        unknown = world.bits(name for name in world.bit if name not in known)
        return cls(world, want, given, known, makers, unknown, world.above_any(known))

    def also(self, name: str) -> _Request:
        """With one more variable given; everything that is known is taken as given."""
        have, world = {*self.known, name}, self.world
        new = dict.fromkeys((name, *world.chain(have, DETERMINISTIC, (name,))))
        known = {**self.known, **new}
        makers = world.chain(have, ALL, skip=world.generated) if world.choices else self.makers
        unknown, ignorable = self.unknown & ~world.bits(new), self.ignorable | world.above_any(new)
        return _Request(world, self.want, known, known, makers, unknown, ignorable)

    def needed(self) -> Iterator[int]:
        """Producers that the wanted variables need. Raises UserError if there is none."""
        todo, seen, met = list(self.want), set[str](), set[int]()
        while todo:
            name = todo.pop()
            if name in seen or name in self.given:
                continue
            seen.add(name)
            if name not in self.makers:
                raise self._cannot_produce(name)
            number = self.makers[name]
            producer = self.world.producers[number]
            todo.extend(producer.inputs)
            if producer.random and len(producer.outputs) > 1:  # a joint stage reads those of its outputs that are known
                todo.extend(output for output in producer.outputs if output in self.known)
            if number not in met:
                met.add(number)
                yield number

    def _cannot_produce(self, name: str) -> UserError:
        """Says what was tried, back to the variables that nothing produces."""
        tried, roots, queue, met = list[str](), list[str](), [name], {name}
        for current in queue:  # grows on the way
            makers_of = [self.world.producers[number] for number in self.world.makers[current]]
            if not makers_of:
                roots.append(current)
                tried.append(f"no stage, encoder or source produces '{current}'")
            for producer in makers_of:
                lacking = [i for i in producer.inputs if i not in self.known]
                if producer.kind == "encoder" and current in self.world.generated:
                    tried.append(f"{producer} needs {_list(lacking)} to be given")
                else:
                    lacking = [i for i in lacking if i not in self.makers]
                    tried.append(f"{producer} needs {_list(lacking)}")
                    queue.extend(i for i in dict.fromkeys(lacking) if i not in met)
                    met.update(lacking)
        if roots:
            mend = f"give {_list(roots)}, or name a source (empirical or uniform) for what is drawn when sampling"
        else:
            mend = f"give one of {_list(queue, 'or')}"
        return UserError(f"nothing can produce '{name}': {'; '.join(tried)}", hint=mend)

    # -------------------------------------------------------- refusals

    def check(self) -> list[int]:
        """The producers that are needed, in order of declaration. Raises UserError if they cannot answer."""
        needed = sorted(self.needed())
        for number in needed:
            if self.ignores(number):
                raise self.refusal(self.world.producers[number])
        if contradiction := self.contradiction(needed):
            raise contradiction
        return needed

    def answerable(self) -> bool:
        """Whether `check` raises nothing."""
        try:
            return not any(map(self.ignores, self.needed())) and self.contradiction(self.needed()) is None
        except UserError:
            return False

    def ignores(self, number: int) -> bool:
        """Whether a producer would sample without regard to what is known of its outputs or their descendants."""
        outputs = self.world.sampled[number]
        fresh = outputs & self.unknown
        if fresh == outputs or not fresh:
            return bool(fresh & self.ignorable)
        producer = self.world.producers[number]
        untrained = frozenset(producer.outputs).intersection(self.known) not in producer.conditionals
        return untrained or bool(fresh & self.ignorable)

    def refusal(self, producer: Producer) -> _Ignored:
        """The error if it does."""
        fresh = tuple(name for name in producer.outputs if name not in self.known)
        fixed = tuple(name for name in producer.outputs if name in self.known)
        if fixed and frozenset(fixed) not in producer.conditionals:
            told = f"{producer} generates {_list(producer.outputs)} together and was not trained to generate"
            return _Ignored(f"{told} {_list(fresh)} given {_list(fixed)}", fresh, fixed)
        above, bits = self.world.depends_on, self.world.bits(fresh)
        ignored = tuple(name for name in self.known if above[name] & bits)
        first = ignored[0]  # given ones come first
        known_how = "which is given" if first in self.given else "which an encoder computes from what is given"
        last = next(source for source in reversed(fresh) if above[first] & self.world.bit[source])
        way = " -> ".join(shortest_path(self.world.depends, last, (first,)))
        told = f"{producer} would sample {_list(fresh)} without regard to '{first}', {known_how}"
        return _Ignored(f"{told} and depends on it ({way})", fresh, ignored)

    def contradiction(self, needed: Iterable[int]) -> UserError | None:
        """The error if the plan samples a variable separately from what an encoder computes it from."""
        if not self.world.apart:
            return None
        makers = [self.world.producers[number] for number in needed]
        made = {name for p in makers for name in p.outputs if name not in self.known}
        sampled = {name for p in makers if p.random for name in p.outputs if name not in self.known}
        for names in (made, sampled):  # what could be decoded from them is settled with them
            self.world.chain(names, ("decoder",))
        for encoder, source, output in self.world.apart:
            if source in made and output in sampled:
                return UserError(
                    f"'{source}' and '{output}' would be sampled separately, though {encoder} computes '{output}' "
                    f"from '{source}'",
                    hint=f"add '{output}' to what the stage of '{self.world.root(source)}' is given, "
                    "or want only one of them",
                )
        return None

    def ways_to(self, sampled: Collection[str]) -> set[str]:
        """Variables one of which must be given if none of `sampled` is to be sampled as it is.

        Those on one way from what is wanted to it, and what these are encoded or decoded from.
        """
        world = self.world
        if world.choices:
            return set(world.bit)
        needs = {n: () if n in self.known else world.producers[number].inputs for n, number in self.makers.items()}
        needs |= dict.fromkeys(self.given, ()) | {"": self.want}
        found = {*shortest_path(needs, "", sampled), *sampled} - {""}
        todo = list(found)
        for name in todo:  # grows on the way
            makers = [world.producers[number] for number in world.makers[name]]
            new = [source for p in makers if not p.random for source in p.inputs if source not in found]
            found.update(new)
            todo.extend(new)
        return found


def _mend(refusal: _Ignored, request: _Request, given: tuple[str, ...], names: Iterable[str]) -> str:
    """Ways out of a refusal, each tried before it is suggested."""
    world, want = request.world, request.want
    ways = []
    tried = request.ways_to(refusal.sampled).difference(given, want)
    if gifts := [name for name in names if name in tried and request.also(name).answerable()]:
        ways.append(f"give {_list(gifts, 'or')} as well")
    evidence = next((name for name in refusal.evidence if name in request.given), refusal.evidence[0])
    encoder = Producer("", "encoder", refusal.sampled, (evidence,))
    if _Request.of(World((*world.producers, encoder)), want, given).answerable():
        ways.append(f"declare an encoder that computes {_list(refusal.sampled)} from '{evidence}'")
    if evidence in request.given and _Request.of(world, want, [n for n in given if n != evidence]).answerable():
        ways.append(f"do not give '{evidence}'")
    return "; or ".join(ways) or f"declare a stage that generates {_list(refusal.sampled)} given '{evidence}'"


# ------------------------------------------------------------ order


def _schedule(request: _Request, needed: Sequence[int]) -> tuple[Step, ...]:
    """Needed producers in topological order, each with what nothing needs after it."""
    makers, producers = request.makers, request.world.producers
    reads, before = dict[int, tuple[str, ...]](), dict[int, set[int]]()
    after: dict[int, list[int]] = {number: [] for number in needed}
    for number in needed:
        producer = producers[number]
        fixed = [name for name in producer.outputs if producer.random and name in request.known]
        reads[number] = (*producer.inputs, *fixed)
        before[number] = {makers[name] for name in reads[number] if name in makers}
        for other in before[number]:
            after[other].append(number)
    ordered: list[int] = []
    ready = [number for number in needed if not before[number]]
    while ready:
        ordered.append(number := heappop(ready))
        for other in after[number]:
            before[other].remove(number)
            if not before[other]:
                heappush(ready, other)
    steps: list[Step] = []
    keep = set(request.want)
    for number in reversed(ordered):  # backwards: the first reader met is the last one
        makes = tuple(name for name in producers[number].outputs if makers.get(name) == number)
        drop = tuple(name for name in dict.fromkeys((*reads[number], *makes)) if name not in keep)
        keep.update(reads[number])
        steps.append(Step(producers[number], reads[number], makes, drop))
    return tuple(reversed(steps))


def _list(names: Iterable[str], word: str = "and") -> str:
    quoted = [f"'{name}'" for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} {word} {quoted[-1]}"
