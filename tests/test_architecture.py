"""The drawing in docs/ARCHITECTURE.md is correct: it has every module, and imports point down."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from chronos.table import TableSpec

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "chronos"
PAGE = ROOT / "docs" / "ARCHITECTURE.md"


def drawing() -> str:
    return PAGE.read_text("utf-8").split("```")[1]


def rows() -> list[set[str]]:
    """The modules of each row, from the top; a package ends with a slash."""
    found = re.findall(r"^│ [a-z]+ +│(.*)│$", drawing(), re.MULTILINE)
    assert len(found) > 2
    return [set(row.split()) for row in found]


def modules() -> dict[str, list[Path]]:
    """Each module as the drawing names it, with its files."""
    found = {path.stem: [path] for path in PACKAGE.glob("*.py") if path.stem != "__init__"}
    for folder in PACKAGE.iterdir():
        if files := list(folder.rglob("*.py")):
            found[f"{folder.name}/"] = files
    return found


def imported(path: Path) -> Iterator[str]:
    """The first name below ``chronos`` of each import in a file, at module level or in a function."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("chronos."))


def test_every_module_is_in_the_drawing_once() -> None:
    drawn = [name for row in rows() for name in row]
    assert sorted(drawn) == sorted(modules())


def test_no_module_imports_from_a_row_above_its_own() -> None:
    height = {name.rstrip("/"): number for number, row in enumerate(rows()) for name in row}
    wrong = {
        f"{path.relative_to(ROOT)} imports {other}"
        for name, files in modules().items()
        for path in files
        for other in imported(path)
        if height.get(other, len(height)) < height.get(name.rstrip("/"), 0)
    }
    assert not wrong


def test_what_is_drawn_in_the_servers_has_its_real_name() -> None:
    below = drawing().split("│ PostgreSQL")[1]
    drawn = set(re.findall(r"\b(?:\w+_)?T(?:_\w+)?\b", below))
    table = TableSpec("T", column="at")
    assert drawn == {
        *(table.name, table.new, table.old, table.history),
        *(table.state, table.changes, table.replayed),
        *table.functions,
    }
    shared = set(re.findall(r"chronos_\w+", below))
    script = (PACKAGE / "sql" / "partition_functions.sql").read_text("utf-8")
    assert shared == set(re.findall(r"@schema@\.(chronos_\w+)\(\s*$", script, re.MULTILINE))


def test_every_file_named_on_the_page_exists() -> None:
    named = set(re.findall(r"`(\w+\.py)`", PAGE.read_text("utf-8")))
    assert named
    assert named <= {path.name for path in PACKAGE.rglob("*.py")}
