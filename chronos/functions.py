"""The two SQL functions of a table: how they are installed, in the hands of the table's owner."""

from __future__ import annotations

from sqlalchemy.engine import Engine

from chronos.catalog.ddl import nobody_calls, script
from chronos.catalog.locate import locate
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


def upgrade(engine: Engine, table: TableSpec) -> TableSpec:
    """Install the functions of this version for ``table``; safe to call again. No lock on the table.

    Raises RefusedError when there is no such table.
    """
    with opened(engine) as conn:
        located = locate(conn, table)
        if located is None:
            raise RefusedError(f"there is no table {table} in this database; nothing was changed")
        with transaction(conn):
            execute(conn, joined(function_statements(read(conn, located, located.name)), ";\n"))
    return located
