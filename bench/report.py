"""What the bench commands share: rotation, goals, and a part of bench/results.md for each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import click

K = TypeVar("K")
V = TypeVar("V")

RESULTS = Path(__file__).with_name("results.md")


def rotated(items: Sequence[tuple[K, V]], rounds: int) -> Iterable[tuple[int, tuple[K, V]]]:
    """Each item once a round; each round starts with a different one, so that no item is always first."""
    for turn in range(rounds):
        start = turn * len(items) // rounds
        for item in (*items[start:], *items[:start]):
            yield turn, item


def say(text: str) -> None:
    """Print to the terminal while measuring."""
    click.echo(text, err=True)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table: words in its first column, figures in the others."""
    return [
        f"| {' | '.join(head)} |",
        f"|---|{'--:|' * (len(head) - 1)}",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def goal(
    what: str, found: float, *, at_least: float = 0, at_most: float | None = None, unit: str = ""
) -> tuple[str, str, str]:
    """A row with what was measured, the goal, and whether it was missed."""
    limit = f"at least {at_least:g}" if at_most is None else f"at most {at_most:g}"
    missed = found < at_least if at_most is None else found > at_most
    shown = f"{found:,.0f}" if abs(found) >= 10 else f"{found:.2f}"
    return what, f"{shown}{unit}", f"{limit}{unit}{', missed' if missed else ''}"


def goals(rows: Iterable[tuple[str, str, str]]) -> list[str]:
    """The lines of a section with goals."""
    return ["", "## In short", "", *table(("what", "measured", "goal"), rows)]


def write_part(output: Path, title: str, lines: Sequence[str]) -> None:
    """Write the part headed ``# title`` over the one in ``output``, or at its end if there is none."""
    before = output.read_text("utf-8") if output.exists() else ""
    parts = [part.strip() for part in re.split(r"^(?=# )", before, flags=re.MULTILINE) if part.strip()]
    heading = f"# {title}"
    new = "\n".join([heading, "", *lines]).strip()
    places = [place for place, part in enumerate(parts) if part.partition("\n")[0] == heading]
    if places:
        parts[places[0]] = new
    else:
        parts.append(new)
    output.write_text("\n\n".join(parts) + "\n", "utf-8")
    click.echo(new)
