"""Write docs/API.md from the signatures and docstrings of the public names of ``chronos``: ``make docs``."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType

import chronos

PAGE = Path(__file__).parent / "API.md"

_HEAD = """\
# API reference

For programs that run migrations, check tables or do the upkeep themselves. The command line calls the same
functions. `make docs` writes this page from the docstrings.

```python
import chronos

held = chronos.migrate("webhook_log", hold=True, rate_limit=20_000, output=print)
print(f"{held.rows_copied:,} rows in {held.seconds:.0f} s; swapping")
try:
    chronos.migrate("webhook_log", resume=True)
except chronos.InterruptedRunError as error:
    print(error)  # what happened, what state the tables are in, what to type next
for problem in chronos.status("webhook_log").problems:
    print(problem)
```

- **Nothing is printed, nobody is asked.** The call is the consent; `confirm` lets you check first.
- **Signals stay yours.** `stop` ends a call at the next batch, from any thread or signal handler; Ctrl-C ends
  it with InterruptedRunError. Of two calls that would change the same table, the second is refused.
- **A call blocks** until it is done. In asyncio: `await asyncio.to_thread(chronos.migrate, stop=stop)`.
- **Settings** are those of the command line: the environment, `.env`, and `chronos.toml` in the working
  directory, read once per process, at the first call. `import chronos` alone reads and loads nothing.
- **Times** are UTC, durations seconds, sizes bytes. The types are complete and checked (`py.typed`).
"""


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), "utf-8")


def page() -> str:
    """The text of the page."""
    offered = {name: getattr(chronos, name) for name in chronos.__all__}
    functions = [name for name in _IN_ORDER if name in offered]
    functions += sorted(
        n for n, what in offered.items() if isinstance(what, FunctionType) and n not in functions
    )
    errors = sorted((n for n, what in offered.items() if _is_error(what)), key=lambda n: offered[n].exit_code)
    values = [name for name in offered if name not in functions and name not in errors]
    parts = [_HEAD, "## Functions\n"]
    parts += [_function(name, offered[name]) for name in functions]
    parts.append("## Results\n")
    parts += [_value(name, offered[name]) for name in values]
    parts.append(
        "## Errors\n\nEach message is one line: what happened, what state the tables are in, what to type"
        " next. Each has the `exit_code` that the command line returns for it.\n"
    )
    parts += [f"### {name}\n\n{_facts(offered[name])}{_text(offered[name])}\n" for name in errors]
    return "\n".join(parts)


# In the order in which a table meets them.
_IN_ORDER = ("migrate", "rollback", "finalize", "status", "overview", "upkeep", "upgrade_functions")


def _is_error(what: object) -> bool:
    return isinstance(what, type) and issubclass(what, chronos.ChronosError)


def _facts(error: type[chronos.ChronosError]) -> str:
    base = "" if error is chronos.ChronosError else f"a {error.__bases__[0].__name__}, "
    return f"Exit code {error.exit_code.value}; {base}".rstrip(", ;") + ". "


def _function(name: str, function: FunctionType) -> str:
    found = inspect.signature(function)
    lines: list[str] = []
    named = False
    for parameter in found.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not named:
            lines.append("*,")
            named = True
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        lines.append(f"{parameter.name}: {parameter.annotation}{default},")
    listed = "".join(f"    {line}\n" for line in lines)
    call = f"{name}(\n{listed}) -> {found.return_annotation}"
    return f"### {name}\n\n```python\n{call}\n```\n\n{_text(function)}\n"


def _value(name: str, kind: type) -> str:
    if issubclass(kind, enum.Enum):
        members = "\n".join(f"- `{member.name}` = {member.value}" for member in kind)
        return f"### {name}\n\n{_text(kind)}\n\n{members}\n"
    assert dataclasses.is_dataclass(kind)
    rows = [f"{field.name}: {field.type}" for field in dataclasses.fields(kind)]
    listed = "\n".join(rows)
    return "\n".join([f"### {name}\n\n{_text(kind)}\n\n```python\n{listed}\n```\n", *_members(kind)])


def _members(kind: type) -> Iterator[str]:
    """Its properties and methods, each with its docstring."""
    members = []
    for name, member in vars(kind).items():
        if name.startswith("_") or not (isinstance(member, property) or inspect.isfunction(member)):
            continue
        function = member.fget if isinstance(member, property) else member
        assert function is not None
        returned = inspect.signature(function).return_annotation
        call = "" if isinstance(member, property) else "()"
        members.append(f"- `{name}{call}`: `{returned}`. {_text(member)}")
    if members:
        yield "\n".join(members) + "\n"


def _text(what: object) -> str:
    """Its docstring as Markdown."""
    return re.sub(r"``([^`]+)``", r"`\1`", inspect.getdoc(what) or "")


if __name__ == "__main__":
    main()
