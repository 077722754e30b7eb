"""What a request runs and what it costs, as text and as a picture."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from chaindiff.chain.graph import Plan
from chaindiff.chain.stage import Cost
from chaindiff.io.errors import in_lines
from chaindiff.show.drawing import Arrow, Box, chain_svg
from chaindiff.show.page import amount

if TYPE_CHECKING:
    from chaindiff.chain.chain import Chain


@dataclass(frozen=True)
class ChainPlan:
    """A plan with its costs. `str()` gives a table, `svg()` and `drawing()` the chain's picture."""

    chain: Chain
    plan: Plan

    @cached_property
    def costs(self) -> dict[str, Cost]:
        """Of every stage of the chain, including those that do not run; counted on first use."""
        return {name: self.chain.cost(name, self.plan.running.get(name)) for name in self.chain.stages}

    @cached_property
    def running(self) -> list[str]:
        """Names of the stages that run, in order."""
        return [*self.plan.running]

    def share(self, stage: str) -> float:
        """The stage's share of the request's floating-point operations."""
        return self._shares.get(stage, 0.0)

    @cached_property
    def _shares(self) -> dict[str, float]:
        flops = {name: self.costs[name].total_flops for name in self.running}
        total = sum(flops.values()) or 1
        return {name: own / total for name, own in flops.items()}

    def facts(self) -> dict[str, Any]:
        """The plan and its costs as plain data: for one sample, bytes in float32."""
        steps, variables = [], self.chain.variables
        for step in self.plan.steps:
            name = step.producer.name
            facts: dict[str, Any] = {
                "kind": step.producer.kind,
                "name": name,
                "makes": {v: list(variables[v].shape) if v in variables else None for v in step.outputs},
                "reads": list(step.inputs),
                "drops": list(step.drop),
            }
            if step.producer.kind == "stage":
                cost = self.costs[name]
                plain = asdict(cost)
                facts |= {"sampler": plain.pop("how"), **plain, "total_flops": cost.total_flops}
                facts["share"] = self.share(name)
            steps.append(facts)
        costs = [self.costs[name] for name in self.running]
        return {
            "name": self.chain.name,
            "want": list(self.plan.want),
            "given": list(self.plan.given),
            "unused": list(self.plan.unused),
            "steps": steps,
            "weights": {name: str(path) for name, path in self.chain.weights.items()},
            "nfe": sum(cost.nfe for cost in costs),
            "total_flops": sum(cost.total_flops for cost in costs),
            "weight_bytes": sum(cost.weight_bytes for cost in costs),
            "activation_bytes": max((cost.activation_bytes for cost in costs), default=0),
        }

    def __str__(self) -> str:
        given = f", given {', '.join(self.plan.given)}" if self.plan.given else ""
        variables = self.chain.variables
        said = [f"{self.chain.name}: sample {', '.join(self.plan.want)}{given}", "", self.sketch(), ""]
        if not self.plan.steps:
            said.append("nothing runs: everything that is wanted is given")
        for number, step in enumerate(self.plan.steps, 1):
            made = ", ".join(str(variables.get(v, v)) for v in step.outputs)
            said.append(
                f"{number}. {step.producer.kind} {step.producer.name}: {made} from {', '.join(step.inputs) or '-'}"
            )
            if step.producer.kind == "stage":
                cost, share = self.costs[step.producer.name], self.share(step.producer.name)
                total, once = amount(cost.total_flops), amount(cost.flops)
                said += [
                    f"     {cost.how}; NFE {cost.nfe}; {cost.parameters:,} parameters",
                    f"     {total}FLOP a sample ({once}FLOP x {cost.nfe}), {share:.1%} of all",
                    f"     memory {amount(cost.weight_bytes)}B + {amount(cost.activation_bytes)}B a sample",
                    *([f"     warning: {cost.warning}"] if cost.warning else []),
                ]
            if step.drop:
                said.append(f"     then drops {', '.join(step.drop)}")
        facts = self.facts()
        weights, peak = amount(facts["weight_bytes"]), amount(facts["activation_bytes"])
        said += [
            "",
            f"in all: NFE {facts['nfe']}, {amount(facts['total_flops'])}FLOP a sample, weights {weights}B, "
            f"activations {peak}B a sample (float32)",
        ]
        if self.plan.unused:
            said.append(f"given but not needed: {', '.join(self.plan.unused)}")
        return in_lines(*said)

    def sketch(self) -> str:
        """The steps in one line: clip -> image16 -> image; given variables in brackets."""
        parts = [f"[{name}]" for name in self.plan.given if name not in self.plan.unused]
        said = {"encoder": " (encoded)", "decoder": " (decoded)"}
        parts += [f"{'+'.join(s.outputs)}{said.get(s.producer.kind, '')}" for s in self.plan.steps]
        return "  " + " -> ".join(parts)

    def drawing(self) -> tuple[list[Box], list[Arrow]]:
        """Boxes and arrows: variables, what makes them; a decoder is an arrow, an encoder a dashed one."""
        known = {v for step in self.plan.steps for v in step.outputs} | set(self.plan.given)
        parts = [(p.name, p.kind, p.outputs, p.inputs) for p in self.chain.producers]
        shown = {v for _, kind, outputs, inputs in parts if kind != "encoder" for v in (*outputs, *inputs)} | known
        runs = {(s.producer.kind, s.producer.name) for s in self.plan.steps}
        boxes, arrows, variables = [], [], self.chain.variables
        unsaid = sorted(shown - variables.keys())  # encoded or decoded in Python, and not declared
        for name in (*(v for v in variables if v in shown), *unsaid):
            variable = variables.get(name)
            style = "given" if name in self.plan.given else "wanted" if name in self.plan.want else "variable"
            small = (f"{variable.kind} {' x '.join(map(str, variable.shape))}",) if variable else ()
            boxes.append(Box(name, small, style if name in known else "idle"))
        for name, kind, outputs, inputs in parts:
            on = (kind, name) in runs
            if kind == "decoder":
                arrows.append(Arrow(inputs[0], outputs[0], "", "decoder" if on else "idle"))
                continue
            if kind == "encoder":
                if inputs[0] in shown and outputs[0] in shown:
                    arrows.append(
                        Arrow(inputs[0], outputs[0], "", "encoder" if on or not known & {inputs[0]} else "idle")
                    )
                continue
            box = f"{kind} {name}"
            small = [] if kind == "source" else [f"{amount(self.costs[name].parameters)} parameters"]
            if on and kind == "stage":
                small += [f"NFE {self.costs[name].nfe}", f"{self.share(name):.1%} of the FLOPs"]
            boxes.append(Box(box, tuple(small), ("source" if kind == "source" else "stage") if on else "idle"))
            arrows += [Arrow(box, output, "", "link" if on else "idle") for output in outputs]
            for reads in inputs:
                note = self.costs[name].notes.get(reads, "")
                arrows.append(Arrow(reads, box, note, ("noisy" if note else "link") if on else "idle"))
        return boxes, arrows

    def svg(self) -> str:
        return chain_svg(*self.drawing())
