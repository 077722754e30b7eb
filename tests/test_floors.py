"""What may import what: every folder only those below it, whoever asks and whenever (lazy imports count)."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "chaindiff"

# Lowest first, as the page has them in a table.
TABLE = (PACKAGE.parent / "docs" / "architecture.md").read_text().partition("## The way of one sample")[0]
FLOORS = re.findall(r"^\| `(\w+)` \|", TABLE, re.MULTILINE)
TOP = {"__init__.py", "__main__.py", "cli.py"}


def for_type_checkers(tree: ast.AST) -> set[ast.AST]:
    """What stands under `if TYPE_CHECKING`, which no program runs."""
    tests = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    return {inner for test in tests for statement in test.body for inner in ast.walk(statement)}


def imports(path: Path) -> set[str]:
    """Modules of the package that a file imports, lazily too."""
    found, tree = set(), ast.parse(path.read_text())
    skipped = for_type_checkers(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and node not in skipped:
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node not in skipped:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in found if name.startswith("chaindiff.")}


def test_every_folder_is_a_floor_and_little_lies_loose() -> None:
    folders = {path.parent.relative_to(PACKAGE).parts[0] for path in PACKAGE.glob("*/**/*.py")}
    assert sorted(folders) == sorted({*FLOORS} - {"cli"}) and len(FLOORS) > 10
    assert {path.name for path in PACKAGE.glob("*.py")} == TOP


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_go_down_only(floor: str) -> None:
    files = sorted((PACKAGE / floor).rglob("*.py")) or [PACKAGE / f"{floor}.py"]
    allowed = {*FLOORS[: FLOORS.index(floor) + 1]}
    for path in files:
        floors = {name: name.split(".")[1] for name in imports(path)}
        above = {name for name, there in floors.items() if there in FLOORS and there not in allowed}
        assert not above, f"{path.relative_to(PACKAGE)} imports {sorted(above)}"


def test_the_numerics_know_no_recipes() -> None:
    """`edm` and `guidance` take plain arguments and raise ValueError."""
    for floor in ("edm", "guidance"):
        for path in (PACKAGE / floor).glob("*.py"):
            strange = {name for name in imports(path) if name.split(".")[1] not in ("edm", "guidance", "kernels")}
            assert not strange, f"{floor}/{path.name}: {strange}"


def test_a_chain_and_its_plans_know_no_network() -> None:
    """They speak to stages by the protocol alone."""
    for name in ("chain", "plan", "graph", "stage"):
        found = imports(PACKAGE / "chain" / f"{name}.py")
        strange = {
            module
            for module in found
            if "networks" in module or module.startswith(("chaindiff.specs.stage", "chaindiff.specs.network"))
        }
        assert not strange, f"{name}: {strange}"


def test_the_package_never_imports_what_is_not_in_the_wheel() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not any((name or "").split(".")[0] in ("tools", "tests", "benchmarks") for name in names), path
