"""What executing networks was measured to cost on this machine, kept in the user's cache; by it `auto` decides."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, ValidationError

from chaindiff.io.errors import UserError
from chaindiff.io.files import cache_folder, read_whole, write_whole

BUILDING = 40.0  # seconds that building a package takes, until one was built here
GAIN = {"float32": 1.0, "bf16": 2.0}  # eager seconds over compiled ones, until both were measured
KEPT = 1000  # networks and stages remembered

Seconds = dict[str, float]  # of one evaluation for one sample, by "eager float32", "compile bf16" and so on


class Weighed(BaseModel):
    """A stage with its weights: bf16's measured error, whether it is faster, and seconds of eager evaluation so far."""

    error: float | None = None
    faster: bool = False
    spent: float = 0.0


class Costs(BaseModel):
    """All that is known: `building` of the last package, and of networks and stages by their keys."""

    building: float = BUILDING
    networks: dict[str, Seconds] = {}
    stages: dict[str, Weighed] = {}

    def pays(self, network: str, stage: str, eager: str, compiled: str, evaluations: float) -> bool:
        """Whether a package pays: evaluating eagerly has lost, and would lose now, more than building takes.

        `eager` and `compiled` are precisions. By this rule, that of ski rental, no more than twice the least possible
        time is spent, whatever comes later.
        """
        known = self.networks.get(network, {})
        slow, fast = known.get(f"eager {eager}"), known.get(f"compile {compiled}")
        if slow is None:
            return False
        gain = GAIN[compiled] if fast is None else slow / fast
        spent = self.stages.get(stage, Weighed()).spent + evaluations * slow
        return spent * (1 - 1 / gain) > self.building

    def save(self) -> None:
        """For later commands; two that save at once lose some of what one of them measured."""
        for found in (self.networks, self.stages):
            for key in [*found][:-KEPT]:
                del found[key]
        with suppress(UserError):  # it is measured again
            write_whole(_path(), self.model_dump_json(), sync=False)


def measured() -> Costs:
    """What was measured so far; nothing, if the file is damaged."""
    try:
        return Costs.model_validate_json(read_whole(_path()))
    except (OSError, ValidationError):
        return Costs()


def _path() -> Path:
    return cache_folder() / "execution.json"
