"""What may import what: the numerics know no recipes, whoever asks for them and whenever."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "chaindiff"


def imports(path: Path) -> set[str]:
    """Modules of the package that a file imports, lazily too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in found if name.startswith("chaindiff")}


@pytest.mark.parametrize(
    ("floor", "below"), [("edm", ("chaindiff.edm",)), ("guidance", ("chaindiff.guidance", "chaindiff.edm"))]
)
def test_the_core_imports_nothing_from_above(floor: str, below: tuple[str, ...]) -> None:
    files = sorted((PACKAGE / floor).rglob("*.py"))
    assert len(files) > 3
    for path in files:
        strange = {name for name in imports(path) if not f"{name}.".startswith(tuple(f"{b}." for b in below))}
        assert strange <= {"chaindiff"}, f"{path.name}: {strange}"


def test_a_chain_and_its_plans_know_no_network() -> None:
    """They speak to stages by the protocol alone."""
    for name in ("chain", "plan", "graph", "stage"):
        strange = {
            module
            for module in imports(PACKAGE / "chain" / f"{name}.py")
            if "networks" in module or "specs.stage" in module
        }
        assert not strange, f"{name}: {strange}"
