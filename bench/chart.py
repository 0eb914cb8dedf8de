"""The chart that the README shows."""

from __future__ import annotations

from pathlib import Path

import pygal
from pygal.style import Style

_WHOLE, _SHORT = "#2a78b5", "#c8483c"


def draw(path: Path, title: str, ways: dict[str, tuple[float, int, int]]) -> None:
    """Draw an SVG bar for each way: its rows a second; red where reads missed rows or rows differ.

    ``ways`` has those three figures. The labels repeat them, for readers who cannot see the colours.
    """
    font = "sans-serif"
    style = Style(
        background="white",
        plot_background="white",
        colors=(_WHOLE,),
        font_family=font,
        title_font_size=18,
        label_font_size=15,
        major_label_font_size=15,
        value_font_size=15,
        value_label_font_size=15,
    )
    chart = pygal.HorizontalBar(
        style=style,
        title=title,
        x_title="rows a second; red: rows missed or wrong",
        show_x_labels=False,
        show_x_guides=False,
        show_legend=False,
        print_values=True,
        value_formatter="{:,.0f}".format,
        truncate_label=-1,
        width=1100,
        height=110 + 75 * len(ways),
        spacing=14,
        js=[],
    )
    # Bars are drawn from the bottom up.
    shown = list(reversed(ways.items()))
    chart.x_labels = [
        f"{name}: {short:,} reads short, {differ:,} rows wrong" for name, (_, short, differ) in shown
    ]
    chart.add(
        "rows/s",
        [
            {"value": rate, "color": _SHORT if short or differ else _WHOLE}
            for _, (rate, short, differ) in shown
        ],
    )
    path.write_text(chart.render(is_unicode=True), "utf-8")
