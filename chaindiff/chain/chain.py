"""Chains: stages over shared variables. A chain plans what a request runs, and samples any variable given others."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from chaindiff.chain.diffusion import Diffusion
from chaindiff.chain.graph import Plan, Producer, resolve
from chaindiff.chain.graph import Step as PlanStep
from chaindiff.chain.memory import within
from chaindiff.chain.request import Given, Preview, Request, Value, checked, plain_values, rows_of, tuned
from chaindiff.chain.stage import Cost, Stage, Stages, evaluating
from chaindiff.chain.variable import Variable, difference
from chaindiff.edm.denoiser import State
from chaindiff.edm.random import Draws, generator
from chaindiff.io.errors import UserError, did_you_mean
from chaindiff.io.files import folder_path
from chaindiff.io.memory import noted
from chaindiff.io.processes import sole_writer
from chaindiff.specs.recipe import SampleSpec
from chaindiff.specs.validate import config

if TYPE_CHECKING:
    from chaindiff.chain.plan import ChainPlan

Values = dict[str, Tensor]


@runtime_checkable
class Encoder(Protocol):
    """A deterministic map from the variable `of` to the variable `name`; a decoder too is one."""

    name: str
    of: str

    def __call__(self, value: Any, /) -> Tensor: ...


@dataclass(frozen=True)
class Source:
    """A label that nothing produces: `weights` are proportional to the classes' probabilities, or a function that
    returns them on first use."""

    variable: Variable
    weights: Sequence[float] | Callable[[], Sequence[float]]

    @cached_property
    def frequencies(self) -> Sequence[float]:
        return self.weights() if callable(self.weights) else self.weights

    @cached_property
    def _edges(self) -> Tensor:
        edges = list(accumulate(weight / sum(self.frequencies) for weight in self.frequencies))
        return torch.tensor([*edges[:-1], 1.0], dtype=torch.float64)

    def sample(self, samples: Sequence[int], seed: int) -> Tensor:
        """Labels [len(samples)], each a function of (seed, sample number, variable)."""
        uniform = [generator(seed, sample, "source", self.variable.name).random() for sample in samples]
        return torch.searchsorted(self._edges, torch.tensor(uniform, dtype=torch.float64), right=True)


class Origin(Protocol):
    """What a chain was made from, if not from objects: a recipe, which trains and saves it in its own way."""

    def train(self, chain: Chain, names: Sequence[str], settings: Mapping[str, Any]) -> None: ...
    def save(self, chain: Chain, folder: Path) -> None: ...


class Chain:
    """Stages, encoders and sources over shared variables: p(everything) = product of p(generated | given).

    Decoders make variables of generated ones. `read` turns what a user gives (class names, files) into values.
    Raises UserError when stages form a cycle, or one variable is generated twice.
    """

    def __init__(
        self,
        stages: Iterable[Stage] | Stages,
        encoders: Sequence[Encoder] = (),
        sources: Sequence[Source] = (),
        name: str = "chain",
        variables: Mapping[str, Variable] | None = None,
        *,
        decoders: Sequence[Encoder] = (),
        read: Callable[[Given], Mapping[str, Value]] | None = None,
    ):
        self.stages = stages if isinstance(stages, Stages) else Stages(stages)
        self.name, self.variables, self.seconds = name, dict(variables or {}), dict[str, float]()
        self.weights: dict[str, Path] = {}
        self.origin: Origin | None = None
        for stage in self.stages.outlines.values():
            for variable in (*stage.generates.values(), *stage.given):
                known = self.variables.setdefault(variable.name, variable)
                if not variable.agrees(known):
                    raise UserError(
                        f"stage '{stage.name}' has a different '{variable.name}' from the rest of the chain: "
                        f"{difference(variable, known)}",
                        hint="linked variables must mean the same: one encoder, shape and scaling",
                    )
        self.encoders = {e.name: e for e in encoders}
        self.decoders = {d.name: d for d in decoders}
        self.sources = {s.variable.name: s for s in sources}
        self._read = read

    # ------------------------------------------------------------ planning

    @property
    def producers(self) -> list[Producer]:
        """What the resolver sees."""
        found = [Producer(s, "source", (s,)) for s in self.sources]
        found += [
            Producer(name, "stage", tuple(s.generates), tuple(v.name for v in s.given), s.conditionals)
            for name, s in self.stages.outlines.items()
        ]
        found += [Producer(d.name, "decoder", (d.name,), (d.of,)) for d in self.decoders.values()]
        return found + [Producer(e.name, "encoder", (e.name,), (e.of,)) for e in self.encoders.values()]

    def resolve(self, want: Sequence[str] | None = None, given: Iterable[str] = ()) -> Plan:
        """The steps that a request runs; by default everything that is generated is wanted.

        Raises UserError for unknown names, and for requests that sampling would answer wrongly.
        """
        given = tuple(given)
        return resolve(self.producers, want or self.generated(given), given)

    def generated(self, given: Sequence[str] = ()) -> list[str]:
        """The variables that stages generate and what is decoded from them, without the given ones."""
        names = dict.fromkeys(name for stage in self.stages.outlines.values() for name in stage.generates)
        # Decoders may decode each other's outputs, in any order.
        while new := [d.name for d in self.decoders.values() if d.of in names and d.name not in names]:
            names |= dict.fromkeys(new)
        return [name for name in names if name not in given]

    def plan(self, want: Sequence[str] | None = None, given: Iterable[str] = ()) -> ChainPlan:
        """The plan of a request with its costs, ready to print or draw; needs no weights."""
        from chaindiff.chain.plan import ChainPlan

        return ChainPlan(self, self.resolve(want, given))

    def cost(self, name: str, moving: Sequence[str] | None = None, **settings: Any) -> Cost:
        """What a sample of a stage's variables costs: of the `moving` ones, by default all; `settings` are a call's."""
        stage: Any = self.stages.outlines[name]
        return stage.cost(tuple(stage.generates) if moving is None else moving, **settings)

    def diffusions(self, request: Request) -> Iterator[tuple[str, Diffusion]]:
        """The diffusion stages that a request runs, each with its weights until the next one follows."""
        for name in request.plan.running:
            if isinstance(stage := self.stages.only(name) if request.frugal else self.stages[name], Diffusion):
                yield name, stage

    def __repr__(self) -> str:
        made = "; ".join(
            f"{', '.join(stage.generates)}{' given ' * bool(given)}{', '.join(given)}"
            for stage in self.stages.outlines.values()
            for given in [[variable.name for variable in stage.given]]
        )
        return f"Chain({self.name}: {made})"

    def _repr_svg_(self) -> str:
        """The chain's picture, for notebooks."""
        return self.plan(given=[n for n in self._roots() if n not in self.sources]).svg()

    def _roots(self) -> list[str]:
        """The variables that stages are conditioned on and nothing produces."""
        made = {name for producer in self.producers for name in producer.outputs}
        given = [v.name for stage in self.stages.outlines.values() for v in stage.given]
        texts = [e.of for e in self.encoders.values() if e.name in given and e.name not in self.generated()]
        return [name for name in dict.fromkeys([*given, *texts]) if name not in made]

    # ------------------------------------------------------------ sampling

    def sample(
        self,
        count: int,
        *,
        given: Given | None = None,
        want: Sequence[str] | None = None,
        seed: int = 0,
        batch: int = 64,
        exact: bool = False,
        noise: int | Sequence[int] | None = None,
        steps: int | None = None,
        solver: str | None = None,
        guidance: float | Mapping[str, float] | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        execution: str | None = None,
        precision: str | None = None,
        max_memory: str | None = None,
        stages: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> Values:
        """`count` samples of every wanted variable, on the CPU: name -> [count, *shape].

        `given` holds known values, [count, *shape] or [1, *shape] for all; labels as numbers or names, texts as str or
        lists. Sample i does not depend on the batch size, up to rounding, or bit for bit with `exact`. It uses the
        noise of sample number `noise[i]`, by default i; a single number shares its noise among all samples.

        `steps`, `solver` and `guidance` apply to every diffusion stage in this call; `stages` holds further settings by
        stage, any that its `sample` takes: {"image16": {"sampler": {"eta": 1.0}, "wrap": my_guidance}}.
        `device` and `dtype` say where and in which precision networks are evaluated in this call. `execution`,
        `precision` and `max_memory`, such as "4GB", are what a recipe says of them under `sample`.
        Raises UserError for requests that cannot be answered.
        """
        options = {"given": given, "want": want, "seed": seed, "batch": batch, "exact": exact, "noise": noise}
        options |= {"steps": steps, "solver": solver, "guidance": guidance, "device": device, "dtype": dtype}
        options |= {"execution": execution, "precision": precision, "max_memory": max_memory}
        parts = list(self.stream(count, **options, stages=stages))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def stream(self, count: int, *, first: int = 0, **options: Any) -> Iterator[Values]:
        """`sample` a batch at a time, samples `first` to `count`, holding no more than one batch."""
        request = self.request(count, **options)
        start = first - first % request.size if request.exact else first
        with self._executed(request):
            for begin in range(start, count, request.size):
                yield self.part(request, begin, max(first, begin))

    def part(self, request: Request, begin: int, first: int | None = None) -> Values:
        """The samples of one batch of a request, from number `begin` (those before `first` are cut off)."""
        return _drained(self._batch(request, begin, begin if first is None else first))

    def previews(self, count: int, **options: Any) -> Iterator[Preview]:
        """`sample` step by step: every stage's variables, predictions and levels after each step, batch after batch.

        The last preview of a stage holds its samples.
        """
        request = self.request(count, **options)
        with self._executed(request):
            for begin in range(0, count, request.size):
                yield from self._batch(request, begin, begin)

    def request(
        self,
        count: int,
        *,
        given: Given | None = None,
        want: Sequence[str] | None = None,
        seed: int = 0,
        batch: int = 64,
        exact: bool = False,
        noise: int | Sequence[int] | None = None,
        stages: Mapping[str, Mapping[str, Any]] | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> Request:
        """A request, read, checked and planned; see `sample`."""
        read = self._read or (lambda given: plain_values(given, self.variables))
        values = {name: checked(name, value, self.variables, count) for name, value in read(given or {}).items()}
        numbers = noise if isinstance(noise, int) else range(count) if noise is None else list(noise)
        if not isinstance(numbers, int | range) and len(numbers) != count:
            raise UserError(f"noise has {len(numbers)} numbers for {count} samples")
        settings = {name: dict(more) for name, more in (stages or {}).items()}
        if strange := [name for name in settings if name not in self.stages]:
            raise UserError(f"there is no stage '{strange[0]}'{did_you_mean(strange[0], self.stages)}")
        plan = self.resolve(want, tuple(values))
        asked = {key: value for key, value in options.items() if value is not None}
        ways = {key: asked.pop(key) for key in ("execution", "precision", "max_memory") if key in asked}
        memory = config(SampleSpec, {"exact": exact, **ways}, "sample").max_memory
        if asked:
            one = self.stages.__getitem__ if memory is None else self.stages.only
            for name, own in tuned([one(name) for name in plan.running], asked).items():
                mine = settings.setdefault(name, {})
                whole = mine.get("sampler") or {}  # a whole sampler stands as it is
                mine["sampler"] = {**own, **whole} if isinstance(whole, Mapping) else whole
        if (device, dtype) != (None, None) and ways.keys() - {"max_memory"}:
            raise UserError(
                "execution and precision take neither `device` nor `dtype`", hint="chain.to(device) moves it"
            )
        found = Request(plan, values, count, seed, batch, exact, numbers, settings, (device, dtype), ways)
        return found if memory is None else within(self, found, memory)

    def _batch(self, request: Request, begin: int, first: int) -> Generator[Preview, None, Values]:
        """One batch: yields previews, returns the wanted values."""
        end = begin + request.size if request.exact else min(begin + request.size, request.count)
        # Rows past the end repeat the last given values; they fill the tile and are cut off again.
        rows = [min(s, request.count - 1) for s in range(begin, end)]
        noise = request.noise
        numbers = [
            s if s >= request.count else noise if isinstance(noise, int) else noise[s] for s in range(begin, end)
        ]
        values: dict[str, Any] = {name: rows_of(value, rows) for name, value in request.given.items()}
        running = [*request.plan.running]
        for step in request.plan.steps:
            name = step.producer.name
            if step.producer.kind == "stage":
                place = (begin / request.count, (end - begin) / request.count, running.index(name) / len(running))
                with self._placed(request, name):
                    values |= yield from self._stage(request, step, values, numbers, place)
            elif step.producer.kind == "source":
                values[name] = self.sources[name].sample(numbers, request.seed)
            else:
                maps = self.encoders if step.producer.kind == "encoder" else self.decoders
                with torch.no_grad():
                    values[name] = maps[name](values[maps[name].of])
            for gone in step.drop:
                del values[gone]
        keep = slice(first - begin, request.count - begin)
        return {name: values[name][keep].cpu() for name in request.plan.want}

    def _stage(
        self, request: Request, step: PlanStep, values: Values, numbers: Sequence[int], place: tuple[float, ...]
    ) -> Generator[Preview, None, Values]:
        """Run one stage. Noise is a function of (seed, sample, candidate, stage, variable, role, number)."""
        name, stage = step.producer.name, self.stages[step.producer.name]
        own = [v for v in stage.generates if v not in step.outputs]
        given = {v: values[v] for v in (*(variable.name for variable in stage.given), *own)}
        draws = Draws(numbers, request.seed, 0, name, dtype=torch.float64)
        batches, share, before = place
        stages = len(request.plan.running)
        began, state = time.perf_counter(), None
        with evaluating(stage), noted(f"while sampling stage '{name}', {len(numbers)} at a time"):
            states = stage.sample(given, draws, **request.settings.get(name, {}))
            for count, state in enumerate(_without_gradients(iter(states)), 1):
                at, of = getattr(state, "number", count), getattr(state, "total", count)
                done = min(batches + share * (before + at / of / stages), 1.0)
                sigma, x0 = getattr(state, "sigma", {}), getattr(state, "x0", {})
                yield Preview(name, numbers, dict(state), x0, sigma, at, of, done)
        made = self._made(stage, step.outputs, state, len(numbers))
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
        return made

    def _made(self, stage: Stage, outputs: Sequence[str], state: Mapping[str, Tensor] | None, count: int) -> Values:
        """The last state of a stage as values. Raises UserError if they are not what the stage generates."""
        made = {}
        for name in outputs:
            variable, value = self.variables[name], (state or {}).get(name)
            if value is None or len(value) != count or tuple(value.shape[1:]) not in variable.value_shapes:
                found = "nothing" if value is None else f"shape {list(value.shape)}"
                raise UserError(
                    f"stage '{stage.name}' should give {count} samples of {variable}, but its `sample` gave {found}"
                )
            made[name] = value.float() if value.is_floating_point() else value
        return made

    @contextmanager
    def _placed(self, request: Request, name: str) -> Iterator[None]:
        """A stage on the request's device and in its precision; restored afterwards."""
        (device, dtype), stage = request.placement, self.stages.only(name) if request.frugal else self.stages[name]
        with ExitStack() as after:
            if isinstance(stage, nn.Module) and device is not None:
                after.callback(stage.to, next((p.device for p in stage.parameters()), torch.device("cpu")))
                stage.to(device)
            if isinstance(stage, Diffusion) and request.placement != (None, None):
                after.callback(vars(stage).update, run=stage.run, autocast=stage.autocast)
                chosen = stage.autocast if dtype is None else None if dtype == torch.float32 else dtype
                stage.run, stage.autocast = None, chosen
            yield

    @contextmanager
    def _executed(self, request: Request) -> Iterator[None]:
        """Networks executed as the request says; restored afterwards."""
        if not request.ways.keys() - {"max_memory"}:
            return (yield)
        from chaindiff.execution.prepare import Preparation

        said = {"execution": "eager", "precision": "float32", "exact": request.exact, **request.ways}
        ready = Preparation(self, request, SampleSpec.model_validate(said))
        with ExitStack() as after:
            for stage in ready.stages.values():
                after.callback(vars(stage).update, run=stage.run, autocast=stage.autocast)
            ready.apply()
            yield

    # ------------------------------------------------------------ objects

    def to(self, device: str | torch.device) -> Chain:
        """Move the stages, and those not loaded yet when they are. Returns the chain itself."""
        self.stages.to(device)
        return self

    def save(self, folder: str | Path) -> Path:
        """Write the chain with its weights into a folder that `chaindiff.load` reads anywhere."""
        from chaindiff.chain.saving import save_chain

        folder = folder_path(folder)
        with sole_writer(folder):
            (save_chain if self.origin is None else self.origin.save)(self, folder)
        return folder


def _without_gradients(states: Iterator[State]) -> Iterator[State]:
    """What a stage yields; the caller's gradient mode is restored between steps."""
    while True:
        with torch.no_grad():
            state = next(states, None)
        if state is None:
            return
        yield state


def _drained(states: Generator[Any, None, Values]) -> Values:
    """A generator's return value."""
    while True:
        try:
            next(states)
        except StopIteration as done:
            return done.value
