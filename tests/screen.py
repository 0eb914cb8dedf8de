"""What a terminal finally shows of what was written to it: overwritten lines are gone."""

from __future__ import annotations

import re

_TOKENS = re.compile(r"\x1b\[([\d;?]*)([A-Za-z])|\r|\n|[^\x1b\r\n]+")


def lines_on_the_screen(written: str) -> list[str]:
    """All lines, including those that have scrolled away."""
    lines, row, column = [""], 0, 0
    for token in _TOKENS.finditer(written):
        text, command = token[0], token[2]
        if text == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif text == "\r":
            column = 0
        elif command == "A":
            row = max(0, row - int(token[1] or 1))
        elif command == "K":
            lines[row] = ""
        elif command is None:
            lines[row] = lines[row][:column].ljust(column) + text + lines[row][column + len(text) :]
            column += len(text)
    return [line.rstrip() for line in lines]
