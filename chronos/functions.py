"""The two SQL functions of a table: how they are installed, in the hands of the table's owner."""

from __future__ import annotations

from sqlalchemy.engine import Engine

from chronos.catalog.ddl import nobody_calls, script
from chronos.catalog.locate import require_located
from chronos.catalog.shape import TableShape, read
from chronos.db import Statement, execute, joined, name, opened, statement, transaction
from chronos.errors import RefusedError
from chronos.table import TableSpec


def function_statements(shape: TableShape) -> list[Statement]:
    """Create both functions, or replace their text."""
    table = shape.spec
    return [
        script("partition_functions.sql", table),
        *(
            statement(
                "ALTER FUNCTION {function}(integer) OWNER TO {owner}",
                function=name(table.home, function),
                owner=name(shape.owner),
            )
            for function in table.functions
        ),
        *(
            query
            for function in table.functions
            for query in nobody_calls(shape, name(table.home, function), "integer")
        ),
    ]


def upgrade(engine: Engine, *tables: TableSpec) -> list[TableSpec]:
    """Install the functions of this version for each of ``tables``, or for none; safe to call again.

    Returns the tables with their schemas. No lock on them. Raises RefusedError when there is no such table,
    or it lacks its time column.
    """
    with opened(engine) as conn:
        located = [require_located(conn, table) for table in tables]
        with transaction(conn):
            for table in located:
                shape = read(conn, table, table.name)
                if table.column not in shape.columns_by_name:
                    raise RefusedError(f"{table.typed} has no column {table.column}; nothing was changed")
                execute(conn, joined(function_statements(shape), ";\n"))
    return located
