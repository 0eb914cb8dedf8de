"""What docs/TROUBLESHOOTING.md says about an id, an exit code or an SQLSTATE.

The page is in the package as a symbolic link to docs/.
"""

from __future__ import annotations

import re
from difflib import get_close_matches
from functools import cache
from importlib.resources import files

from psycopg2 import errorcodes
from sqlalchemy.exc import DBAPIError

from chronos.db import sqlstate
from chronos.errors import ChronosError, RefusedError


def explain(word: str) -> str:
    """The paragraph for ``word``, with or without its brackets. Raises RefusedError when there is none."""
    known, wanted = paragraphs(), word.strip("[]")
    by_case = {one.lower(): one for one in known}
    found = by_case.get(wanted.lower())
    if found is None:
        close = [by_case[one] for one in get_close_matches(wanted.lower(), by_case, 3)]
        meant = f"did you mean {' or '.join(close)}?" if close else "for example inbound-fk"
        raise RefusedError(f"{word} is not known; messages end with their id in brackets: {meant}")
    return known[found]


@cache
def paragraphs() -> dict[str, str]:
    """Each id with its paragraph; ids that share a heading share the paragraph."""
    page = (files("chronos") / "TROUBLESHOOTING.md").read_text("utf-8")
    found: dict[str, str] = {}
    for section in re.split(r"^### ", page, flags=re.MULTILINE)[1:]:
        heading, _, text = section.partition("\n")
        text = re.split(r"^## ", text, maxsplit=1, flags=re.MULTILINE)[0].strip()
        text = re.sub(r"\[([^]]+)\]\(([^)#]*)#?[^)]*\)", lambda link: _in_words(*link.groups()), text)
        found |= dict.fromkeys(re.findall(r"`([^`]+)`", heading), text)
    return found


def _in_words(text: str, target: str) -> str:
    """A link as plain text."""
    return f"{text} in docs/{target}" if target else text


def id_of(error: BaseException | None) -> str | None:
    """The id of an error, or of the one that it was raised from."""
    while error is not None:
        if isinstance(error, ChronosError) and error.id:
            return error.id
        if isinstance(error, DBAPIError) and sqlstate(error) == errorcodes.DISK_FULL:
            return "disk-full"
        error = error.__cause__
    return None
