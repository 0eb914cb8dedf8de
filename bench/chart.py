"""The chart that the README shows."""

from __future__ import annotations

from pathlib import Path

import pygal
from pygal.style import CleanStyle


def draw(path: Path, title: str, ways: dict[str, tuple[float, int]]) -> None:
    """Bars, as SVG: by way, the rows a second that it moved and the reads that missed rows meanwhile."""
    chart = pygal.HorizontalBar(
        style=CleanStyle(background="white", plot_background="white"),
        title=title,
        x_title="rows a second, from the first command to the end of the last",
        show_legend=False,
        print_values=True,
        js=[],
        disable_xml_declaration=True,
    )
    chart.x_labels = list(ways)
    chart.add("rows/s", [rate for rate, _ in ways.values()])
    path.write_text(chart.render(is_unicode=True), "utf-8")
