"""The report as an HTML page: no script, nothing external, one file that prints well.

The charts are computed here, and drawn as SVG by the template; each has a text that says the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

from jinja2 import Environment, PackageLoader

from chronos.migration.console import clock_time, in_bytes, short

WIDTH, HEIGHT = 680.0, 160.0
_MOST_BARS = 62
_MOST_LABELS = 8


@dataclass(frozen=True)
class Bar:
    """A bar of a chart: its position, its meaning, and whether its rows are equal."""

    x: float
    y: float
    width: float
    height: float
    title: str
    well: bool
    label: str


@dataclass(frozen=True)
class Mark:
    """A point in time: its position and its meaning."""

    x: float
    title: str


@dataclass(frozen=True)
class Chart:
    """Bars or a line, within WIDTH by HEIGHT, with the value at the top and a text for screen readers."""

    top: str
    says: str
    bars: tuple[Bar, ...] = ()
    line: str = ""
    marks: tuple[Mark, ...] = ()
    left: str = ""
    right: str = ""


def html(facts: dict[str, Any]) -> str:
    """The page for ``report.facts``."""
    environment = Environment(
        loader=PackageLoader("chronos.migration", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "clock": clock_time,
        "count": partial(_known, "{:,}".format),
        "duration": partial(_known, "{:,.1f} s".format),
        "instant": _instant,
        "number": "{:,}".format,
        "size": partial(_known, in_bytes),
    }
    page: str = environment.get_template("report.html.j2").render(
        **facts,
        rows_chart=rows_chart(facts["periods"]),
        rate_chart=rate_chart(facts["copy"], facts["lock_waits"]),
        width=WIDTH,
        height=HEIGHT,
    )
    return page


def rows_chart(periods: list[dict[str, Any]]) -> Chart | None:
    """Rows of each period; several periods per bar if there are many. None when there is nothing to show."""
    most = max((period["new_rows"] for period in periods), default=0)
    if not most:
        return None
    filled = [place for place, period in enumerate(periods) if period["new_rows"] or period["old_rows"]]
    shown = periods[filled[0] : filled[-1] + 1]
    together = -(-len(shown) // _MOST_BARS)
    groups = [shown[place : place + together] for place in range(0, len(shown), together)]
    totals = [sum(period["new_rows"] for period in group) for group in groups]
    most, step = max(totals), WIDTH / len(groups)
    every = -(-len(groups) // _MOST_LABELS)
    bars = []
    for place, (group, rows) in enumerate(zip(groups, totals, strict=True)):
        well = all(p["old_rows"] == p["new_rows"] and p["alike"] is not False for p in group)
        height = max(1.0, HEIGHT * rows / most)
        bars.append(
            Bar(
                x=round(place * step + step * 0.1, 1),
                y=round(HEIGHT - height, 1),
                width=round(step * 0.8, 1),
                height=round(height, 1),
                title=f"{_day(group[0]['start'])}: {rows:,} rows, {_compared(group, well)}",
                well=well,
                label=_day(group[0]["start"]) if place % every == 0 else "",
            )
        )
    total = sum(totals)
    count = len(shown)
    begins, equal = _day(shown[0]["start"]), all(bar.well for bar in bars)
    return Chart(
        top=f"{most:,}",
        says=f"{total:,} rows in {count} partitions from {begins} on, at most {most:,} in a bar;"
        f" {'each is equal to its source' if equal else 'one differs from its source'}.",
        bars=tuple(bars),
    )


def rate_chart(samples: list[dict[str, Any]], waits: list[dict[str, Any]]) -> Chart | None:
    """Rows per second during the copy, and failed attempts at locks; None without either."""
    last = max((point["seconds"] for point in (*samples, *waits)), default=0.0)
    rates = [
        (
            one["seconds"],
            other["seconds"],
            (other["rows"] - one["rows"]) / (other["seconds"] - one["seconds"]),
        )
        for one, other in itertools.pairwise(samples)
        if other["seconds"] - one["seconds"] >= 0.05 and other["rows"] >= one["rows"]
    ]
    if not last or not (rates or waits):
        return None
    most = max((rate for _, _, rate in rates), default=0.0) or 1.0
    points = [
        f"{WIDTH * at / last:.1f},{HEIGHT - HEIGHT * rate / most:.1f}"
        for begins, ends, rate in rates
        for at in (begins, ends)
    ]
    copied = samples[-1]["rows"] - samples[0]["rows"] if samples else 0
    spent = samples[-1]["seconds"] - samples[0]["seconds"] if samples else 0
    says = f"{copied:,} rows in {spent:.1f} s, at most {most:,.0f} per second; " if rates else ""
    attempts = len(waits)
    return Chart(
        top=f"{short(most)}/s" if rates else "",
        says=f"{says}{attempts or 'no'} failed attempt{'' if attempts == 1 else 's'} at a lock.",
        line=" ".join(points),
        marks=tuple(
            Mark(round(WIDTH * w["seconds"] / last, 1), f"{w['seconds']:.1f} s: {w['what']}, {w['who']}")
            for w in waits[:200]
        ),
        left="0:00",
        right=clock_time(last),
    )


def _known(say: Callable[[Any], str], value: Any) -> str:
    return "unknown" if value is None else say(value)


def _compared(group: list[dict[str, Any]], well: bool) -> str:
    if not well:
        return "different"
    return "compared, equal" if all(period["alike"] for period in group) else "counted, equal"


def _instant(text: str | None) -> str:
    return f"{datetime.fromisoformat(text):%Y-%m-%d %H:%M:%S} UTC" if text else ""


def _day(text: str) -> str:
    start = datetime.fromisoformat(text)
    return f"{start:%m-%d}" if start.hour == 0 else f"{start:%m-%d %H:%M}"
