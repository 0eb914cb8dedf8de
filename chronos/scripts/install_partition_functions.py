"""Install the SQL functions of a migrated table again, as its owner; ``status`` says when that is needed."""

from __future__ import annotations

import sys

import click
from sqlalchemy.exc import DBAPIError

from chronos.catalog.ddl import script
from chronos.catalog.locate import locate
from chronos.db import connect_engine, execute, one_line, opened, transaction
from chronos.errors import ChronosError, RefusedError
from chronos.settings import Settings, get_settings
from chronos.table import TableSpec


def install(settings: Settings, table: TableSpec) -> None:
    """Install both functions; where they are there already, nothing but their text changes."""
    with opened(connect_engine(settings.database)) as conn:
        located = locate(conn, table)
        if located is None:
            raise RefusedError(f"there is no table {table} in this database; nothing was changed")
        with transaction(conn):
            execute(conn, script("partition_functions.sql", located))


@click.command()
@click.argument("table", required=False)
def main(table: str | None) -> None:
    """Install the two SQL functions that keep TABLE in partitions."""
    try:
        settings = get_settings()
        chosen = [spec for spec in settings.tables if table in (None, spec.name)]
        if not chosen:
            raise RefusedError(f"{table} is not among the configured tables; nothing was changed")
        for spec in chosen:
            install(settings, spec)
            click.echo(f"Installed {' and '.join(spec.functions)}")
    except ChronosError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(error.exit_code)
    except DBAPIError as error:
        click.echo(f"Error: {one_line(error)}; nothing was changed", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
