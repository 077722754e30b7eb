"""The resolver: what a request (want, given) runs, in which order, and whether it may be answered at all.

Forward chaining over producers: encoders and decoders (deterministic), stages and sources (random), from what is given
to what is wanted. The model is p(everything) = product over stages and sources of p(outputs | inputs). A variable
without a stage or source is a function: of its decoder's input, or without a decoder of its encoder's inputs. An
encoder of a variable that is generated otherwise is an *observation*: it computes the variable from what is given, in
place of its generator; it is never applied to what was sampled. A decoder is a deterministic generator: it runs on
what was sampled too, and its arrow belongs to the generative graph as a stage's do.

**When is a plan correct?** Call E what is given with all that encoders and decoders compute from it. A plan samples
S_1, S_2, ... in topological order, each from p(S_i | inputs_i, those outputs of the same stage that are in E). The
product is p(S_1, S_2, ... | E) if every S_i is independent of the rest of E given what its stage sees. Given its
parents, S_i is independent of its non-descendants (local Markov property); a descendant in E is d-connected to it,
since no parent lies on the way down. So d-separation comes to this: *no variable of E descends from S_i*; and if
outputs of the same stage are in E, the stage must have been trained for that conditional. Other requests are refused,
naming what would be ignored.

**Why decoders do not change this.** A decoded variable is a node of the graph whose conditional is a point mass, so the
local Markov property, and with it every acceptance, holds as it stands: given clip, where clip is encoded from the
image that is decoded from the latent, the latent's stage is refused, since clip descends from it. But a function
implies independences that the graph does not show: d = f(a) carries no information once a is known. A refusal would be
wrong if it rested on such a d alone, and none does: whatever d descends from, a descends from or is, so that a in E is
refused itself, or not sampled; and E holds f(a) whenever it holds a, so that encoders see it (given a latent, clip is
encoded from its image). For the same reason `d` stands for the variable that it is decoded from wherever the question
is whether the stages model a relation (`_observations`): two variables decoded from one latent are never "sampled
separately", and a latent sampled beside an encoding of its image is, though the image itself may not be wanted.

In short: if every stage samples its true conditional, the product of the stages is the distribution of the data, and
encoders agree with it without error, then every accepted request samples p(want | given), and every refused one would
not (but for numerical coincidences). In practice a generated image agrees with its embedding approximately, and
decoding what was encoded gives back an image approximately: conditionals are those of the product of the stages, and an
encoder's output, where an encoder runs, is taken as observed.

A recipe whose stages leave out a dependence that an encoder reveals (image and clip sampled separately, though clip is
an encoding of image) is not such a product; requests that would expose it are refused too. A variable with two encoders
counts as depending on the inputs of both.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import networkx as nx

from chaindiff.io.errors import UserError, did_you_mean


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
        read = {name for step in self.steps for name in step.inputs}
        return tuple(name for name in self.given if name not in read and name not in self.want)


def resolve(producers: Sequence[Producer], want: Sequence[str], given: Iterable[str] = ()) -> Plan:
    """The plan of a request. Steps are in topological order, ties in order of declaration.

    Raises UserError: unknown names, stages or decoders in a cycle, two of them for one variable, nothing produces a
    variable, or sampling would ignore what is given.
    """
    producers, want, given = tuple(producers), tuple(dict.fromkeys(want)), tuple(dict.fromkeys(given))
    names = list(dict.fromkeys(name for p in producers for name in (*p.outputs, *p.inputs)))
    for role, asked in (("want", want), ("given", given)):
        for name in asked:
            if name not in names:
                raise UserError(f"{role}: no variable '{name}' in this chain{did_you_mean(name, names)}")
    if not want:
        raise UserError("nothing is wanted", hint=f"want one or more of: {', '.join(names)}")
    try:
        return _resolve(producers, want, given)
    except _Ignored as refusal:
        raise UserError(refusal.message, hint=_mend(refusal, producers, want, given, names)) from None


class _Ignored(UserError):
    """Sampling `sampled` would ignore `evidence`."""

    def __init__(self, message: str, sampled: tuple[str, ...], evidence: tuple[str, ...]):
        super().__init__(message)
        self.sampled, self.evidence = sampled, evidence


def _resolve(producers: tuple[Producer, ...], want: tuple[str, ...], given: tuple[str, ...]) -> Plan:
    graph = generative_graph(producers)
    makers = _observe(producers, given)
    known = (*given, *makers)
    _generate(producers, makers, known)
    needed = _needed(producers, makers, want, known)
    _refuse_ignored_evidence(producers, needed, graph, given, known)
    _refuse_contradictions(producers, needed, graph, known)
    return Plan(want, given, _schedule(producers, needed, makers, want, known))


# ------------------------------------------------------------ the generative graph


def generative_graph(producers: Iterable[Producer]) -> nx.DiGraph:
    """Variables; an arrow from each that a variable is generated from. Raises UserError if it has a cycle."""
    producers = tuple(producers)
    graph, generator = nx.DiGraph(), dict[str, Producer]()
    for producer in producers:
        graph.add_nodes_from((*producer.inputs, *producer.outputs))
        if producer.kind == "encoder":
            continue
        for output in producer.outputs:
            if output in generator:
                raise UserError(
                    f"'{output}' is generated twice: by {generator[output]} and by {producer}",
                    hint="give each variable one stage, one source or one decoder",
                )
            generator[output] = producer
        graph.add_edges_from((source, output) for source in producer.inputs for output in producer.outputs)
    if not nx.is_directed_acyclic_graph(graph):
        cycle = [edge[0] for edge in nx.find_cycle(graph)]
        makers = dict.fromkeys(generator[name] for name in cycle)
        kinds = " and ".join(f"{kind}s" for kind in ("stage", "decoder") if kind in {maker.kind for maker in makers})
        raise UserError(
            f"{kinds} form a cycle: {' -> '.join([*cycle, cycle[0]])}",
            hint=f"remove an input from one of: {', '.join(map(str, makers))}",
        )
    # An encoding that its own input is generated from cannot be computed: it is given, or encoded from what is.
    stages = graph.copy()
    for producer in producers:
        if producer.kind == "encoder":
            made = [(i, o) for o in producer.outputs if o not in generator for i in producer.inputs]
            graph.add_edges_from((i, o) for i, o in made if not nx.has_path(stages, o, i))
    return graph


def _observations(producers: Sequence[Producer], graph: nx.DiGraph) -> list[tuple[Producer, str, str]]:
    """(encoder, input, output) wherever the output is generated, but not on the way to the input.

    On the way to it (or together with what is), the stages model the relation: clip -> image, and clip is
    encoded from image. What is decoded from a variable on the way is on the way too.
    """
    together = {name: p.outputs for p in producers if p.random for name in p.outputs}
    together |= {name: together.get(root, (root,)) for name, root in _decoded(producers).items()}
    return [
        (encoder, source, output)
        for encoder in producers
        if encoder.kind == "encoder"
        for output in encoder.outputs
        for source in encoder.inputs
        if not any(nx.has_path(graph, name, source) for name in together.get(output, (output,)))
    ]


def _decoded(producers: Iterable[Producer]) -> dict[str, str]:
    """What each decoded variable is made of in the end: one that no decoder makes."""
    roots = {p.outputs[0]: p.inputs[0] for p in producers if p.kind == "decoder"}
    for name in roots:
        while roots[name] in roots:
            roots[name] = roots[roots[name]]
    return roots


# ------------------------------------------------------------ forward chaining


def _observe(producers: Iterable[Producer], given: Iterable[str]) -> dict[str, Producer]:
    """What encoders and decoders compute from what is given: variable -> its maker.

    Encoders come first: where both could make a variable, what is encoded from a given one is nearer to the truth.
    """
    makers: dict[str, Producer] = {}
    have = set(given)
    _chain([p for p in producers if p.kind == "encoder"], makers, have)
    _chain([p for p in producers if not p.random], makers, have)
    return makers


def _generate(producers: Sequence[Producer], makers: dict[str, Producer], known: Iterable[str]) -> None:
    """Adds to `makers` everything else that can be made: by what generates it if anything does, else by an encoder."""
    generated = {name for p in producers if p.kind != "encoder" for name in p.outputs}
    _chain(producers, makers, set(known), refuse_encoding=generated)


def _chain(
    producers: Iterable[Producer], makers: dict[str, Producer], have: set[str], refuse_encoding: Collection[str] = ()
) -> None:
    before = -1
    while before != len(have):
        before = len(have)
        for producer in producers:
            if have.issuperset(producer.inputs):
                skip = refuse_encoding if producer.kind == "encoder" else ()
                new = [name for name in producer.outputs if name not in have and name not in skip]
                makers.update(dict.fromkeys(new, producer))
                have.update(new)


def _needed(
    producers: Sequence[Producer], makers: dict[str, Producer], want: Iterable[str], known: Collection[str]
) -> list[Producer]:
    """Producers that the wanted variables need, in order of declaration."""
    needed: set[Producer] = set()
    todo = list(want)
    seen: set[str] = set()
    while todo:
        name = todo.pop()
        if name in seen or (name in known and name not in makers):  # done, or given
            continue
        seen.add(name)
        if name not in makers:
            raise _cannot_produce(name, producers, makers, known)
        needed.add(makers[name])
        todo.extend(makers[name].inputs)
        if makers[name].random:  # a joint stage reads those of its outputs that are known
            todo.extend(output for output in makers[name].outputs if output in known)
    return [producer for producer in producers if producer in needed]


def _cannot_produce(
    name: str, producers: Iterable[Producer], makers: Collection[str], known: Collection[str]
) -> UserError:
    """Says what was tried, back to the variables that nothing produces."""
    generated = {output for p in producers if p.kind != "encoder" for output in p.outputs}
    tried: list[str] = []
    roots: list[str] = []
    todo = [name]
    for current in todo:  # grows on the way
        makers_of = [p for p in producers if current in p.outputs]
        if not makers_of:
            roots.append(current)
            tried.append(f"no stage, encoder or source produces '{current}'")
        for producer in makers_of:
            if producer.kind == "encoder" and current in generated:
                lacking = [i for i in producer.inputs if i not in known]
                tried.append(f"{producer} needs {_list(lacking)} to be given")
            else:
                lacking = [i for i in producer.inputs if i not in known and i not in makers]
                tried.append(f"{producer} needs {_list(lacking)}")
                todo.extend(i for i in lacking if i not in todo)
    if roots:
        mend = f"give {_list(roots)}, or name a source (empirical or uniform) for what is drawn when sampling"
    else:
        mend = f"give one of {_list(todo, 'or')}"
    return UserError(f"nothing can produce '{name}': {'; '.join(tried)}", hint=mend)


# ------------------------------------------------------------ refusals


def _refuse_ignored_evidence(
    producers: Sequence[Producer],
    needed: Sequence[Producer],
    graph: nx.DiGraph,
    given: Collection[str],
    known: Collection[str],
) -> None:
    """Raises _Ignored if a stage would sample without regard to what is known of its outputs' descendants."""
    depends = graph.copy()
    depends.add_edges_from((i, o) for _, i, o in _observations(producers, graph))
    for producer in needed:
        if not producer.random:
            continue
        fresh = tuple(name for name in producer.outputs if name not in known)
        fixed = tuple(name for name in producer.outputs if name in known)
        if not fresh:
            continue
        if fixed and frozenset(fixed) not in producer.conditionals:
            raise _Ignored(
                f"{producer} generates {_list(producer.outputs)} together and was not trained to generate "
                f"{_list(fresh)} given {_list(fixed)}",
                fresh,
                fixed,
            )
        reached: dict[str, list[str]] = {}
        for source in fresh:
            reached |= nx.single_source_shortest_path(depends, source)
        ignored = [name for name in known if name in reached]
        if ignored:
            first = ignored[0]  # given ones come first
            known_how = "which is given" if first in given else "which an encoder computes from what is given"
            raise _Ignored(
                f"{producer} would sample {_list(fresh)} without regard to '{first}', {known_how} "
                f"and depends on it ({' -> '.join(reached[first])})",
                fresh,
                tuple(ignored),
            )


def _refuse_contradictions(
    producers: Sequence[Producer], needed: Sequence[Producer], graph: nx.DiGraph, known: Collection[str]
) -> None:
    """Raises UserError if the plan samples a variable separately from what an encoder computes it from."""
    made = {name for p in needed for name in p.outputs if name not in known}
    sampled = {name for p in needed if p.random for name in p.outputs if name not in known}
    for names in (made, sampled):  # what could be decoded from them is settled with them
        _chain([p for p in producers if p.kind == "decoder"], {}, names)
    for encoder, source, output in _observations(producers, graph):
        if source in made and output in sampled and not nx.has_path(graph, source, output):
            raise UserError(
                f"'{source}' and '{output}' would be sampled separately, though {encoder} computes '{output}' "
                f"from '{source}'",
                hint=f"add '{output}' to what the stage of '{_decoded(producers).get(source, source)}' is given, "
                "or want only one of them",
            )


def _mend(
    refusal: _Ignored,
    producers: tuple[Producer, ...],
    want: tuple[str, ...],
    given: tuple[str, ...],
    names: Iterable[str],
) -> str:
    """Ways out of a refusal, each tried before it is suggested."""

    def works(given: Iterable[str], *more: Producer) -> bool:
        try:
            _resolve((*producers, *more), want, tuple(given))
        except UserError:
            return False
        return True

    ways = []
    gifts = [name for name in names if name not in given and name not in want and works((*given, name))]
    if gifts:
        ways.append(f"give {_list(gifts, 'or')} as well")
    evidence = next((name for name in refusal.evidence if name in given), refusal.evidence[0])
    if works(given, Producer("", "encoder", refusal.sampled, (evidence,))):
        ways.append(f"declare an encoder that computes {_list(refusal.sampled)} from '{evidence}'")
    rest = [name for name in given if name != evidence]
    if evidence in given and works(rest):
        ways.append(f"do not give '{evidence}'")
    return "; or ".join(ways) or f"declare a stage that generates {_list(refusal.sampled)} given '{evidence}'"


# ------------------------------------------------------------ order


def _schedule(
    producers: Sequence[Producer],
    needed: Sequence[Producer],
    makers: dict[str, Producer],
    want: Collection[str],
    known: Collection[str],
) -> tuple[Step, ...]:
    """Needed producers in topological order, each with what nothing needs after it."""
    order = nx.DiGraph()
    order.add_nodes_from(needed)
    reads: dict[Producer, tuple[str, ...]] = {}
    for producer in needed:
        fixed = [name for name in producer.outputs if producer.random and name in known]
        reads[producer] = (*producer.inputs, *fixed)
        order.add_edges_from((makers[name], producer) for name in reads[producer] if name in makers)
    ordered = list(nx.lexicographical_topological_sort(order, key=producers.index))
    steps: list[Step] = []
    keep = set(want)
    for producer in reversed(ordered):  # backwards: the first reader met is the last one
        makes = tuple(name for name in producer.outputs if makers.get(name) == producer)
        drop = tuple(name for name in dict.fromkeys((*reads[producer], *makes)) if name not in keep)
        keep.update(reads[producer])
        steps.append(Step(producer, reads[producer], makes, drop))
    return tuple(reversed(steps))


def _list(names: Iterable[str], word: str = "and") -> str:
    quoted = [f"'{name}'" for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} {word} {quoted[-1]}"
