"""Which table a command means: by the configuration, by the state of its migration, or as it is described."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from sqlalchemy.engine import Connection, Engine

from chronos import commands
from chronos.catalog.locate import locate, require_located
from chronos.db import opened, transaction
from chronos.errors import RefusedError
from chronos.migration import state as states
from chronos.settings import CONFIGURATION, Settings
from chronos.table import Interval, TableSpec


@dataclass(frozen=True)
class Description:
    """What the command line says of a table; None where it says nothing."""

    column: str | None = None
    every: Interval | None = None
    retention_days: int | None = None
    ahead_days: int | None = None

    @property
    def given(self) -> dict[str, object]:
        """What it says."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}

    def require_agreement(self, table: TableSpec, source: str) -> None:
        """Raise RefusedError when it contradicts ``table``, which is as ``source`` says."""
        for what, value in self.given.items():
            known = getattr(table, what)
            if value != known:
                option = f"--{what.replace('_', '-')}"
                instead = "nothing" if known is None else str(known)
                raise RefusedError(
                    f"{option} {value} contradicts {source}, which says {instead} for {table.typed};"
                    " nothing was changed. Leave the option out"
                )

    def applied(self, table: TableSpec) -> TableSpec:
        """``table`` as it is described."""
        return replace(table, **self.given)  # type: ignore[arg-type]


def which_table(
    engine: Engine, settings: Settings, name: str | None, described: Description | None = None
) -> tuple[TableSpec, bool]:
    """The table that ``name`` means, the only configured one for None, and whether a configuration lists it.

    The server is asked only for a table that the configuration does not list under this very name; no locks
    but ACCESS SHARE on the state of its migration. Raises RefusedError when it cannot be told, or when
    ``described`` contradicts what is known.
    """
    described = described or Description()
    source = str(settings.listed_in or "the environment")
    if name is None:
        if len(settings.tables) > 1:
            names = ", ".join(table.typed for table in settings.tables)
            raise RefusedError(f"name a table: {source} lists {names}; nothing was changed")
        [table] = settings.tables
        described.require_agreement(table, source)
        return table, True
    try:
        typed = TableSpec.named(name)
    except ValueError as error:
        raise RefusedError(f"{error}; nothing was changed") from None
    for table in settings.tables:
        if (table.schema, table.name) == (typed.schema, typed.name):
            described.require_agreement(table, source)
            return table, True
    with opened(engine) as conn:
        located = require_located(conn, typed)
        listed = _listed(conn, settings, located, source)
        if listed is not None:
            described.require_agreement(listed, source)
            return listed, True
        with transaction(conn):
            found = states.read(conn, located)
    if found is not None:
        table = found.table.located(located.home)
        described.require_agreement(table, f"the migration begun on {found.plan.started_at:%Y-%m-%d}")
        return table, False
    if described.column is None:
        raise RefusedError(
            f"{located.typed} is in no {CONFIGURATION}, and no migration of it is under way; nothing was"
            f" changed. List it there; or to migrate it now: {commands.migrate(located)} --column COLUMN"
            " --every day"
        )
    return described.applied(located), False


def _listed(conn: Connection, settings: Settings, located: TableSpec, source: str) -> TableSpec | None:
    """The configured table that is ``located``, by whatever name. Raises RefusedError when a schema lacks."""
    for table in settings.tables:
        if table.name != located.name:
            continue
        home = table if table.schema else locate(conn, table)
        if home is not None and home.schema == located.schema:
            return table.located(located.home)
        if table.schema is None:
            raise RefusedError(
                f"{source} lists {table} without a schema, which is not {located.typed} here; nothing was"
                f" changed. List {located.typed} in {CONFIGURATION} with its schema, and {table} with its own"
            )
    return None
