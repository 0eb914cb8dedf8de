"""Make docs/recording.svg from a real run of the demo: ``python -m docs.make_recording``."""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.text import Text
from sqlalchemy.engine import URL

from chronos.demo.run import demo
from chronos.migration.checks import Survey
from chronos.migration.console import Output

PICTURE = Path(__file__).with_name("recording.svg")
ROWS = 200_000


def console() -> Console:
    """A terminal of 80 columns that shows nothing and records everything."""
    return Console(record=True, width=80, file=io.StringIO(), highlight=False, soft_wrap=True)


def shortened(lines: list[Text]) -> Iterator[Text]:
    """The lines, with `...` in the middle of the list of partitions and of the progress."""
    for start, group in groupby(lines, lambda line: line.plain.split(" ")[0]):
        same = list(group)
        if start in ("Created", "Migrated") and len(same) > 4:
            same[2:-1] = [Text("...")]
        yield from same


def agree(url: URL, found: Survey) -> None:
    """Nobody is asked."""


def main() -> None:
    """Run, shorten, draw."""
    screen = console()
    demo(ROWS, keep=False, confirm=agree, output=Output(screen))
    picture = console()
    picture.print(Text("$ make demo", "bold"))
    for line in shortened(list(Text.from_ansi(screen.export_text(styles=True)).split())):
        picture.print(line)
    picture.save_svg(str(PICTURE), title="make demo")


if __name__ == "__main__":
    main()
