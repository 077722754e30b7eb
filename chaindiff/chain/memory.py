"""Memory of a request: how many samples at a time fit, with only the weights of the stage that runs."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import ByteSize, TypeAdapter

from chaindiff.chain.plan import amount
from chaindiff.chain.request import TILE, Request
from chaindiff.io.errors import UserError

if TYPE_CHECKING:
    from chaindiff.chain.chain import Chain

COPIES = 8  # of what a stage makes: its state, predictions and noise, and those of the step before


def within(chain: Chain, request: Request, asked: str) -> Request:
    """The request with the largest part of its batch that fits into so much memory for weights and activations.

    Weights that can be read again are not kept while other stages run. Encoders, decoders, and what Python and torch
    take by themselves, are not counted. Raises UserError if not even the least fits.
    """
    limit, least = TypeAdapter(ByteSize).validate_python(asked), TILE if request.exact else 1
    running = request.plan.running
    held = {*request.plan.given, *(name for step in request.plan.steps for name in step.outputs)}
    sizes = {name: 4 * math.prod(chain.variables[name].shape) for name in held if name in chain.variables}
    said = {n: {"sampler": own} for n, more in request.settings.items() if (own := more.get("sampler"))}
    costs = {n: chain.cost(n, made, **said.get(n, {})) for n, made in running.items()}
    whole = sum(cost.weight_bytes for cost in costs.values())
    needs = []  # of every stage: weights, and bytes for one sample
    for name, cost in costs.items():
        gone = sum(costs[other].weight_bytes for other in costs if other != name and chain.stages.releasable(other))
        made = sum(sizes.values()) + COPIES * sum(sizes[made] for made in running[name])
        needs.append((whole - gone, cost.activation_bytes + made, name))
    if all(whole + request.size * each <= limit for _, each, _ in needs):
        return request
    kept, each, name = max(needs, key=lambda need: need[0] + least * need[1])
    if kept + least * each > limit:
        raise UserError(
            f"{asked} of memory are too little: stage '{name}' takes {amount(kept)}B for weights and "
            f"{amount(least * each)}B for {least} sample{'s' * (least > 1)}",
            "sample.max_memory",
            f"at least {amount(kept + least * each)}B let this request run",
        )
    fits = min(request.batch, *((limit - kept) // each for kept, each, _ in needs))
    while request.batch % fits:  # files hold whole parts
        fits -= 1
    return replace(request, batch=fits, frugal=True)
