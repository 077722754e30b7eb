"""The resolver on chains of Gaussians: every accepted request is exact, and every other is refused."""

from __future__ import annotations

import pytest
from graphs import (
    DIFFERENT,
    EXACT,
    WORLDS,
    check_executable,
    requests,
)

from chaindiff.chain.graph import resolve
from chaindiff.io.errors import UserError


@pytest.mark.parametrize("name", WORLDS)
def test_every_accepted_request_is_exact_and_every_other_refused(name: str) -> None:
    world = WORLDS[name]
    for want, given in requests(world.names):
        try:
            plan = resolve(world.producers, want, given)
        except UserError as error:
            assert "nothing can produce" not in str(error)
            assert error.hint
            assert world.error(want, given, world.heedless(want, given)) > DIFFERENT, (want, given)
        else:
            check_executable(plan)
            steps = [(step.producer, step.inputs, step.outputs) for step in plan.steps]
            assert world.error(want, given, steps) < EXACT, (want, given)


def test_worlds_cover_what_they_should() -> None:
    producers = [p for world in WORLDS.values() for p in world.producers]
    assert sum(len(p.outputs) == 2 for p in producers) > 5
    assert sum(p.kind == "encoder" for p in producers) > 20
    assert sum(p.kind == "decoder" for p in producers) > 20
    assert max(len(world.names) for world in WORLDS.values()) == 5
    answers = []
    for world in list(WORLDS.values())[:12]:
        for want, given in requests(world.names):
            try:
                resolve(world.producers, want, given)
                answers.append("evidence" if given else "scratch")
            except UserError as error:
                answers.append("untrained" if "not trained" in str(error) else "refused")
    assert {kind for kind in answers if answers.count(kind) >= 10} == {"evidence", "scratch", "untrained", "refused"}
