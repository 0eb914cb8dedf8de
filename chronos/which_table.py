"""Which table a command means: from the configuration, the state of its migration, or its description."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from shlex import quote

from sqlalchemy.engine import Connection, Engine

from chronos.catalog.locate import locate, require_located
from chronos.catalog.partitions import scheme
from chronos.commands import PROGRAM
from chronos.db import execute, opened, statement, transaction
from chronos.errors import RefusedError, UndescribedError
from chronos.functions import grace_days
from chronos.migration import state as states
from chronos.settings import CONFIGURATION, VARIABLES, Settings
from chronos.table import WEBHOOK_LOG, Interval, TableSpec


class Verb(StrEnum):
    """What to do with the table."""

    MIGRATE = "migrate"
    RESUME = "migrate --resume"
    ROLLBACK = "rollback"
    FINALIZE = "finalize"
    STATUS = "status"
    UPGRADE_FUNCTIONS = "upgrade-functions"


@dataclass(frozen=True)
class Description:
    """What the command line says about a table; None where it says nothing."""

    column: str | None = None
    every: Interval | None = None
    retention_days: int | None = None
    ahead_days: int | None = None

    @property
    def given(self) -> dict[str, object]:
        """What it says."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}

    def require_agreement(
        self, table: TableSpec, source: str, remedy: Callable[[str, object], str] | None = None
    ) -> None:
        """Raise RefusedError when it contradicts what ``source`` says of ``table``.

        ``remedy`` says how to make ``source`` agree, given a key and the value that was typed for it.
        """
        for what, value in self.given.items():
            known = getattr(table, what)
            if value != known:
                instead = f", or {remedy(what, value)}" if remedy else ""
                raise RefusedError(
                    f"--{what.replace('_', '-')} {value} contradicts {source}, which says"
                    f" {'nothing' if known is None else known} for {table.typed}; nothing was changed."
                    f" Leave the option out{instead}"
                )

    def applied(self, table: TableSpec) -> TableSpec:
        """``table`` with this description."""
        return replace(table, **self.given)  # type: ignore[arg-type]


def _write_it_there(what: str, value: object) -> str:
    return f"""write {what} = {value if isinstance(value, int) else f'"{value}"'} there"""


def _set_the_variable(what: str, value: object) -> str:
    return f"set {VARIABLES[what]}={value}" if what in VARIABLES else f"list it in {CONFIGURATION}"


def which_table(
    engine: Engine,
    settings: Settings,
    verb: Verb,
    name: str | None,
    described: Description | None = None,
) -> tuple[TableSpec, bool]:
    """The table that ``name`` means (None: the only configured one), and whether a configuration lists it.

    A table in no file is taken from the state of its migration, from ``described`` or from its partitions.
    Takes only ACCESS SHARE on the state. Raises RefusedError when there is no such table, when several are
    listed and none is named, or when ``described`` contradicts what is known.
    """
    described = described or Description()
    source = str(settings.listed_in or "the environment")
    remedy = _write_it_there if settings.listed_in else _set_the_variable
    if name is None:
        if len(settings.tables) > 1:
            names = ", ".join(table.typed for table in settings.tables)
            raise RefusedError(
                f"name a table: {source} lists {names}; nothing was changed."
                f" For example: {PROGRAM} {verb} {quote(settings.tables[0].typed)}"
            )
        typed = settings.tables[0]
    else:
        try:
            typed = TableSpec.named(name)
        except ValueError as error:
            raise RefusedError(f"{error}; nothing was changed") from None
    with opened(engine) as conn:
        for table in settings.tables:
            if (table.schema, table.name) == (typed.schema, typed.name):
                require_located(conn, table, settings.listed_in)
                described.require_agreement(table, source, remedy)
                return table, True
        located = require_located(conn, typed)
        listed = _listed(conn, settings, located, source)
        if listed is not None:
            described.require_agreement(listed, source, remedy)
            return listed, True
        with transaction(conn):
            found = states.read(conn, located)
            if found is None:
                return _in_no_file(conn, settings, verb, located, described), False
    table = found.table.located(located.home)
    described.require_agreement(table, f"the migration begun on {found.plan.started_at:%Y-%m-%d}")
    return table, False


def _listed(conn: Connection, settings: Settings, located: TableSpec, source: str) -> TableSpec | None:
    """The configured table that is ``located``, listed with or without its schema.

    Raises RefusedError when the configuration has to name the schema and does not.
    """
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


def _in_no_file(
    conn: Connection,
    settings: Settings,
    verb: Verb,
    table: TableSpec,
    described: Description,
) -> TableSpec:
    """The table that ``verb`` works with when neither a file nor a migration describes ``table``."""
    if verb in (Verb.ROLLBACK, Verb.FINALIZE):
        return table  # they find no migration of it, and say so
    if states.relkind(conn, table.home, table.name) == "p":
        column, widths = scheme(conn, table)
        if column is None or not widths:
            raise RefusedError(
                f"{table.typed} is partitioned, but not by a time column into hours, days, weeks or months,"
                " and no file lists it; nothing was changed. Chronos cannot maintain it"
            )
        real = replace(table, column=column, every=widths[0], grace_days=grace_days(conn, table))
        if verb in (Verb.STATUS, Verb.UPGRADE_FUNCTIONS):
            return real
        raise RefusedError(
            f"{table.typed} is partitioned already, and no migration of it is under way; nothing was changed."
            f" For the nightly jobs to maintain it, {to_be_listed(settings, real)}"
        )
    if verb is Verb.MIGRATE and described.column is not None:
        return described.applied(table)
    if verb is Verb.MIGRATE and table.name == WEBHOOK_LOG.name and settings.listed_in:
        missing = replace(settings.webhook_log, schema=table.schema)
        raise RefusedError(
            f"{settings.listed_in} does not list {table.name}; nothing was changed. Add to it:"
            f"\n\n{missing.as_toml()}"
        )
    command = _migrate_command(conn, table, described)
    if verb is Verb.MIGRATE:
        raise UndescribedError(
            f"--column is missing, the time column of {table.typed}, which no {CONFIGURATION} lists;"
            f" nothing was changed. Type: {command}"
        )
    if verb is Verb.RESUME:
        raise UndescribedError(
            f"there is no migration of {table.typed} to resume; nothing was changed."
            f" Start one with: {command}"
        )
    raise RefusedError(
        f"{table.typed} is a plain table that no {CONFIGURATION} lists, and no migration of it is under way;"
        f" nothing was changed. Migrate it with: {command}"
    )


def to_be_listed(settings: Settings, table: TableSpec) -> str:
    """`add to chronos.toml:`, and the block to paste."""
    return f"add to {settings.listed_in or CONFIGURATION}:\n\n{table.as_toml()}"


def no_job_maintains(settings: Settings, table: TableSpec) -> str:
    """What to do about a table that the nightly jobs skip."""
    return f"No {CONFIGURATION} lists {table.typed}, so no job maintains it: {to_be_listed(settings, table)}"


_TIME_COLUMNS = """
SELECT attname FROM pg_attribute
WHERE attrelid = to_regclass(format('%I.%I', {schema}, {table})) AND attnum > 0 AND NOT attisdropped
  AND atttypid IN ('timestamptz'::regtype, 'timestamp'::regtype, 'date'::regtype)
"""


def _migrate_command(conn: Connection, table: TableSpec, described: Description) -> str:
    """The command that migrates a table whose time column was not given; names it if there is only one."""
    columns = execute(conn, statement(_TIME_COLUMNS, schema=table.home, table=table.name)).scalars().all()
    given: dict[str, object] = {
        "column": columns[0] if len(columns) == 1 else "COLUMN",
        "every": Interval.DAY,
        **described.given,
    }
    words = (f"--{what.replace('_', '-')} {quote(str(value))}" for what, value in given.items())
    return " ".join((f"{PROGRAM} migrate {quote(table.typed)}", *words))
