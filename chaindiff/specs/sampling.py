"""Whether a sampler asks of a stage what it was trained for. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from chaindiff.io.errors import did_you_mean
from chaindiff.specs.stage import LinkSpec, SamplerSpec


def sampling_problems(links: Mapping[str, LinkSpec], sampler: SamplerSpec) -> Iterator[tuple[str, str]]:
    """What is wrong with what sampling does to given variables, against what training taught: field and problem."""
    for name, said in sampler.links.items():
        field, link = f"links.{name}", links.get(name)
        if link is None:
            yield field, f"the stage is not given '{name}'{did_you_mean(name, links)}"
            continue
        if said.noise > link.noise:
            yield f"{field}.noise", f"{said.noise:g} is above {link.noise:g}, the largest level in training (`noise`)"
        if said.keep is not None and said.keep not in link.keep:
            known = f"one of {link.keep}" if link.keep else "which this link has not"
            yield f"{field}.keep", f"{said.keep} was not trained: it should be in the link's `keep`, {known}"
        if said.absent and not link.can_be_absent:
            problem = "the value is never absent in training: the link has no `dropout`, and no 0 in `keep`"
            yield f"{field}.absent", problem
    droppable = [name for name, link in links.items() if link.can_be_absent and sampler.link(name).sampled]
    scales = sampler.guidance
    if isinstance(scales, dict):
        for name in scales:
            if name not in droppable:
                tail = "has no `dropout`, so it is never absent" if name in links else "is not given to this stage"
                yield f"guidance.{name}", f"compares with an absent value, but '{name}' {tail}"
    elif scales != 1 and not droppable:
        problem = f"{scales:g} compares with an absent value, but no link of this stage has a `dropout`"
        yield "guidance", problem
    if sampler.guidance_interval is not None and sampler.guidance_interval[0] >= sampler.guidance_interval[1]:
        yield "guidance_interval", "should rise: the level is above the first number and at most the second"
