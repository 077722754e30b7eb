"""Decides how each stage of a request is executed, and prepares its network for it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import TypeAdapter, ValidationError

from chaindiff.execution import packages
from chaindiff.execution.costs import Costs, Weighed, measured
from chaindiff.execution.graphs import Graphed
from chaindiff.execution.machine import bf16, compiler, machine, settle
from chaindiff.execution.packages import UntrustedError
from chaindiff.execution.precision import DTYPES, ERROR, compare
from chaindiff.execution.runner import Call, Flat, Tiled
from chaindiff.io.digest import digest
from chaindiff.io.processes import from_main, processes
from chaindiff.io.progress import say
from chaindiff.specs.code import CodeSpec
from chaindiff.specs.recipe import SampleSpec

if TYPE_CHECKING:
    from chaindiff.chain.chain import Chain
    from chaindiff.chain.diffusion import Diffusion
    from chaindiff.chain.request import Request

WORTH = 1e11  # floating-point operations of a request that `auto` measures nothing for: less than a second's


@dataclass(frozen=True)
class Choice:
    """How a stage's network is executed; `error` is what bf16 was measured to change, relative to the data."""

    mode: Literal["eager", "compile"] = "eager"
    precision: Literal["float32", "bf16"] = "float32"
    error: float | None = None


Choices = dict[str, Choice]


def kept(lock: Mapping[str, Any], asked: SampleSpec) -> Choices | None:
    """What a run's lock says was decided; None if it says nothing, or what was not asked for."""
    try:
        found = TypeAdapter(Choices).validate_python(lock.get("execution"))
    except ValidationError:
        return None
    ways = ("eager" if asked.exact or asked.max_memory else asked.execution, asked.precision)
    fits = all(ways[0] in ("auto", c.mode) and ways[1] in ("auto", c.precision) for c in found.values())
    return found if fits else None


def locked(choices: Choices) -> dict[str, Any]:
    """Choices as plain data for a run's lock."""
    return {name: {k: v for k, v in asdict(choice).items() if v is not None} for name, choice in choices.items()}


class Preparation:
    """The networks of one request's stages: how each is executed, and what was measured of that."""

    def __init__(self, chain: Chain, request: Request, asked: SampleSpec):
        self.chain, self.request, self.asked = chain, request, asked
        self.stages: dict[str, Diffusion] = {}
        self.weights: dict[str, str] = {}
        for name, stage in chain.diffusions(request):
            self.stages[name], self.weights[name] = stage, packages.weights_key(stage)
        costs = {name: chain.cost(name, request.plan.running[name]) for name in self.stages}
        self.evaluations = {name: request.count * costs[name].nfe for name in self.stages}  # of one sample each
        self.flops = request.count * sum(costs[name].total_flops for name in self.stages)
        self.rows = min(request.size, request.count)

    def apply(self, decided: Choices | None = None) -> Choices:
        """Execute the stages from now on as was `decided`, or as is decided here; returns how they are executed."""
        settle(self.asked.exact)
        choices = self._decided() if decided is None else decided
        return {name: self._apply(name, stage, choices.get(name, Choice())) for name, stage in self.stages.items()}

    def together(self, decided: Choices | None = None) -> Choices:
        """`apply` in all processes, which divide the request: the first decides and builds."""
        choices = from_main(lambda: self.apply(decided))
        return choices if processes().is_main_process else self.apply(choices)

    def record(self, choices: Choices, samples: int) -> None:
        """Note how long the stages of a large request took for so many samples."""
        if self.flops < WORTH:
            return
        costs = measured()
        for name, stage in self.stages.items():
            shape, seconds = self._shape(stage), self.chain.seconds.get(name)
            if shape is None or not seconds or not samples:
                continue
            choice, evaluations = choices[name], self.evaluations[name] / self.request.count * samples
            costs.networks.setdefault(shape, {})[f"{choice.mode} {choice.precision}"] = seconds / evaluations
            if choice.mode == "eager":
                costs.stages.setdefault(self._key(name), Weighed()).spent += seconds
        costs.save()

    # ------------------------------------------------------------ deciding

    def _decided(self) -> Choices:
        asked, costs = self.asked, measured()
        large = self.flops >= WORTH and not asked.exact
        if asked.precision == "auto" and large:
            self._measure(costs)
        return {name: self._choice(name, stage, costs, large) for name, stage in self.stages.items()}

    def _choice(self, name: str, stage: Diffusion, costs: Costs, large: bool) -> Choice:
        asked, known = self.asked, costs.stages.get(self._key(name), Weighed())
        eager = compiled = "float32" if asked.precision == "auto" else asked.precision
        error = None
        if asked.precision == "auto" and large and known.error is not None:
            error = known.error
            if error <= ERROR:
                compiled, eager = "bf16", "bf16" if known.faster else "float32"
        mode = "eager" if asked.exact or asked.max_memory else asked.execution  # packages keep weights in memory
        if mode == "auto":
            mode = "compile" if large and self._pays(name, stage, eager, compiled, costs) else "eager"
        return Choice(mode, compiled if mode == "compile" else eager, error)

    def _measure(self, costs: Costs) -> None:
        """Compare precisions for stages that they were not compared for."""
        new = [n for n, stage in self.stages.items() if self._key(n) not in costs.stages and bf16(stage.like.device)]
        if not new:
            return
        for name, probe in compare(self.chain, self.request, new).items():
            faster = probe.seconds["bf16"] < probe.seconds["float32"]
            costs.stages[self._key(name)] = Weighed(error=round(probe.error, 5), faster=faster)
            if (shape := self._shape(probe.stage)) is not None:
                known = costs.networks.setdefault(shape, {})
                for precision, seconds in probe.seconds.items():
                    known.setdefault(f"eager {precision}", seconds)
        costs.save()

    def _pays(self, name: str, stage: Diffusion, eager: str, compiled: str, costs: Costs) -> bool:
        """Whether a package is there, or pays at once."""
        if (shape := self._shape(stage)) is None:
            return False
        try:
            if packages.find(self._package(name, shape, compiled)) is not None:
                return True
        except UntrustedError:
            return False
        pays = costs.pays(shape, self._key(name), eager, compiled, self.evaluations[name])
        return pays and compiler() is not None

    # ------------------------------------------------------------ preparing

    def _apply(self, name: str, stage: Diffusion, choice: Choice) -> Choice:
        stage.run, stage.autocast = None, DTYPES[choice.precision]
        if choice.mode == "compile":
            try:
                call = self._compiled(name, stage, choice.precision)
            except Exception as error:  # whatever the compiler stumbles over
                reason = str(error).strip().partition("\n")[0] or type(error).__name__
                say(f"stage {name} is not compiled: {reason}")
                return replace(choice, mode="eager")
            if stage.like.is_cuda:
                call = Graphed(call)
            stage.run = Tiled(stage.network, call, stage.interface, self.rows)
        return choice

    def _compiled(self, name: str, stage: Diffusion, precision: str) -> Call:
        """A stage's package, built if there is none; networks of custom code are compiled for this process alone."""
        device, dtype = stage.like.device, DTYPES[precision]
        if (shape := self._shape(stage)) is None:
            return torch.compile(Flat(stage.network, stage.interface, dtype), dynamic=False)
        key = self._package(name, shape, precision)
        if (path := packages.find(key)) is None:
            if compiler() is None:
                raise UserWarning("there is no C++ compiler (g++)")
            costs = measured()
            say(f"compiling stage {name} for this machine, once; about {costs.building:.0f} s")
            began = time.perf_counter()
            path = packages.build(key, stage.network, stage.interface, self.rows, dtype, device)
            costs.building = time.perf_counter() - began
            costs.save()
        return packages.load(path, device)

    def _shape(self, stage: Diffusion) -> str | None:
        """The key of a stage's network without its weights; None for custom code, whose changes nothing tells."""
        spec = stage.network_spec
        if spec is None or isinstance(spec, CodeSpec):
            return None
        return packages.shape_key(spec, stage.interface, stage.like.device)

    def _package(self, name: str, shape: str, precision: str) -> str:
        return digest([shape, self.weights[name], self.rows, precision])

    def _key(self, name: str) -> str:
        """The key of a stage with its weights and its sampler, on which the error depends."""
        stage = self.stages[name]
        return digest([self.weights[name], stage.sampler.model_dump(mode="json"), machine(stage.like.device)])
