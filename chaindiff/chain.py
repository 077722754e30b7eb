"""Chains: stages over shared variables. A chain plans what a request runs, and samples any variable given others."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from chaindiff.edm.random import generator, normal_batch
from chaindiff.graph import Plan, Producer, resolve
from chaindiff.memory import noted
from chaindiff.specs.errors import UserError
from chaindiff.stage import Stage
from chaindiff.variables import Variable

TILE = 16  # samples a call, always, when results must not depend on the batch size
Values = dict[str, Tensor]


class Encoder(Protocol):
    """A deterministic map from the variable `of` to the variable `name`; a decoder too is one."""

    name: str
    of: str

    def __call__(self, value: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Source:
    """A label that nothing produces: `weights` are the classes' probabilities (empirical or uniform)."""

    variable: Variable
    weights: Sequence[float]

    def sample(self, samples: Sequence[int], seed: int) -> Tensor:
        """Labels [len(samples)], each a function of (seed, sample number, variable)."""
        total, edge, edges = sum(self.weights), 0.0, []
        for weight in self.weights:
            edge += weight / total
            edges.append(edge)
        edges[-1] = 1.0
        uniform = [generator(seed, sample, "source", self.variable.name).random() for sample in samples]
        return torch.searchsorted(torch.tensor(edges, dtype=torch.float64), torch.tensor(uniform), right=True)


@dataclass
class Chain:
    """Stages, encoders and sources over shared variables: p(everything) = product of p(generated | given).

    Decoders make variables of generated ones. Raises UserError when stages form a cycle, or one variable is generated
    twice.
    """

    stages: Sequence[Stage]
    encoders: Sequence[Encoder] = ()
    sources: Sequence[Source] = ()
    name: str = "chain"
    variables: dict[str, Variable] = field(default_factory=dict)
    weights: dict[str, Path] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)  # spent in every stage so far
    decoders: Sequence[Encoder] = ()

    def __post_init__(self) -> None:
        for stage in self.stages:
            for variable in (*stage.generates.values(), *stage.given):
                known = self.variables.setdefault(variable.name, variable)
                if known.identity != variable.identity:
                    raise UserError(
                        f"stage '{stage.name}' takes '{variable.name}' for {variable}, elsewhere it is {known}",
                        hint="a link joins variables of one meaning: the same encoder, shape and scaling",
                    )
        self._stages = {stage.name: stage for stage in self.stages}
        self._encoders = {("encoder", e.name): e for e in self.encoders}
        self._encoders |= {("decoder", d.name): d for d in self.decoders}
        self._sources = {s.variable.name: s for s in self.sources}

    # ------------------------------------------------------------ planning

    @property
    def producers(self) -> list[Producer]:
        """What the resolver sees."""
        found = [Producer(s.variable.name, "source", (s.variable.name,)) for s in self.sources]
        found += [
            Producer(s.name, "stage", tuple(s.generates), tuple(v.name for v in s.given), s.conditionals)
            for s in self.stages
        ]
        found += [Producer(d.name, "decoder", (d.name,), (d.of,)) for d in self.decoders]
        return found + [Producer(e.name, "encoder", (e.name,), (e.of,)) for e in self.encoders]

    def resolve(self, want: Sequence[str] | None = None, given: Sequence[str] = ()) -> Plan:
        """Which steps a request runs; everything that is generated is wanted unless told otherwise.

        Raises UserError for unknown names, and for requests that sampling would answer wrongly.
        """
        return resolve(self.producers, want or self.generated(given), given)

    def generated(self, given: Sequence[str] = ()) -> list[str]:
        """The variables that stages generate and what is decoded from them, without the given ones."""
        names = [name for stage in self.stages for name in stage.generates]
        for _ in self.decoders:  # they may decode each other's outputs, in any order
            names += [d.name for d in self.decoders if d.of in names and d.name not in names]
        return [name for name in names if name not in given]

    def plan(self, want: Sequence[str] | None = None, given: Sequence[str] = ()) -> Any:
        """The plan of a request with its costs, ready to print or draw."""
        from chaindiff.planning import ChainPlan

        return ChainPlan.of(self, self.resolve(want, given))

    # ------------------------------------------------------------ sampling

    def sample(
        self,
        count: int,
        *,
        seed: int = 0,
        batch: int = 64,
        want: Sequence[str] | None = None,
        given: Mapping[str, Tensor] | None = None,
        exact: bool = False,
    ) -> Values:
        """`count` samples of every wanted variable, on the CPU: name -> [count, *shape].

        `given` holds known values, [count, *shape] or [1, *shape] for all. Sample i is the same whatever the batch
        size, to rounding, and to the bit with `exact`. Raises UserError for requests that cannot be answered.
        """
        parts = list(self.stream(count, seed=seed, batch=batch, want=want, given=given, exact=exact))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def stream(
        self,
        count: int,
        *,
        seed: int = 0,
        batch: int = 64,
        want: Sequence[str] | None = None,
        given: Mapping[str, Tensor] | None = None,
        exact: bool = False,
        first: int = 0,
    ) -> Iterator[Values]:
        """`sample` a batch at a time, samples `first` to `count`, holding no more than one batch."""
        given = {name: self._check(name, value, count) for name, value in (given or {}).items()}
        plan = self.resolve(want, tuple(given))
        size = TILE if exact else batch
        for begin in range(first - first % size if exact else first, count, size):
            samples = list(range(begin, begin + size if exact else min(begin + size, count)))
            # Rows past the end repeat the last one: they fill the tile and are cut off again.
            rows = [min(s, count - 1) for s in samples]
            values = {n: v.expand(count, *v.shape[1:])[rows] if len(v) == 1 else v[rows] for n, v in given.items()}
            made = self._run(plan, values, samples, seed)
            keep = slice(max(first - begin, 0), count - begin)
            yield {name: made[name][keep] for name in plan.want}

    def _run(self, plan: Plan, values: Values, samples: list[int], seed: int) -> Values:
        values = dict(values)
        for step in plan.steps:
            name = step.producer.name
            if step.producer.kind == "stage":
                stage, began = self._stages[name], time.perf_counter()
                with noted(f"while sampling stage '{name}', {len(samples)} at a time"):
                    values |= run_stage(stage, values, samples, seed, step.outputs)
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
            elif step.producer.kind == "source":
                values[name] = self._sources[name].sample(samples, seed)
            else:
                encoder = self._encoders[step.producer.kind, name]
                values[name] = encoder(values[encoder.of])
            for gone in step.drop:
                del values[gone]
        return {name: value.cpu() for name, value in values.items()}

    def _check(self, name: str, value: Tensor, count: int) -> Tensor:
        variable = self.variables.get(name)
        if variable is None:
            return value  # the resolver refuses it with the nearest name
        shape = () if variable.kind == "label" and not value.is_floating_point() else variable.shape
        if tuple(value.shape[1:]) != tuple(shape) or len(value) not in (1, count):
            raise UserError(
                f"given '{name}' has shape {list(value.shape)}; expected [{count}, {', '.join(map(str, shape))}]",
                hint="or one row for all samples",
            )
        return value


@torch.no_grad()
def run_stage(
    stage: Stage, values: Values, samples: Sequence[int], seed: int, outputs: Sequence[str] | None = None
) -> Values:
    """The variables `outputs` of a stage, all unless told otherwise, for these samples, given others in `values`.

    Noise is a function of (seed, sample, candidate, stage, variable, role, number).
    """
    device = next(stage.parameters()).device
    shapes = {name: v.shape for name, v in stage.generates.items() if outputs is None or name in outputs}

    def draw(shape: Sequence[int], variable: str, role: str, number: int) -> Tensor:
        return normal_batch(shape, samples, seed, 0, stage.name, variable, role, number).to(device)

    link_noise = {
        link.variable.name: draw(link.received, link.variable.name, "link", 0)
        for link in stage.conditioner
        if link.spec.sample_noise and link.spec.sampled
    }
    known = [*(v.name for v in stage.given), *(name for name in stage.generates if name not in shapes)]
    given = {name: values[name].to(device) for name in known}
    start = {name: draw(shape, name, "start", 0) for name, shape in shapes.items()}
    states = stage.sample(start, given, lambda name, number: draw(shapes[name], name, "churn", number), link_noise)
    return {name: value.float() for name, value in deque(states, maxlen=1).pop().items()}


def load(source: str | Path, set: Sequence[str] = (), **overrides: Any) -> Chain:
    """The chain of a recipe (a path or a bare name), with shipped or found weights.

    `set` and keyword overrides are those of the command line's `--set`. Raises UserError for mistakes in the recipe
    and for stages that have no weights yet.
    """
    from chaindiff.assemble import assemble
    from chaindiff.specs.load import load_recipe

    return assemble(load_recipe(source, set=set, **overrides)).chain()
