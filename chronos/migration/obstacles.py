"""What stands in the way of a rollback: looked for before it begins, so that it can also end.

Each obstacle has an id, like a check before a migration.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from sqlalchemy.engine import Connection

from chronos.catalog.partitions import attached, detached, missing
from chronos.catalog.shape import TableShape, differences
from chronos.catalog.shape import read as read_shape
from chronos.catalog.slots import senders
from chronos.commands import finalize as finalize_command
from chronos.db import Statement, execute, name, statement
from chronos.errors import RefusedError
from chronos.migration import state as states
from chronos.migration.attach import rows_beyond
from chronos.migration.changes import emptied_by_hand, notes_are_taken, truncated
from chronos.migration.checks import Finding, citus_table
from chronos.migration.context import match, names
from chronos.migration.state import Phase, Plan, State
from chronos.table import Period, TableSpec

_SHOWN = 3
# Rows beyond the bound of an attached table that may be carried back while everybody waits: half a second.
FEW_BEYOND = 5_000


@dataclass(frozen=True)
class Obstacle(Finding):
    """One thing in the way; ``forcible``: it costs something that a person may decide to give up."""

    forcible: bool = False


def obstacles(conn: Connection, found: State) -> list[Obstacle]:
    """All that stands in the way of a rollback of a migration that was swapped. Reads only; ACCESS SHARE."""
    shape = read_shape(conn, found.table, found.table.name)
    others = _of_an_attached_table if found.plan.attaches else _of_a_copied_table
    return [*_of_either(conn, found), *others(conn, found, shape)]


def require_no_citus(conn: Connection, table: TableSpec) -> None:
    """Raise RefusedError when Citus manages the table, the old one, the new one, or a sequence of theirs."""
    if found := citus_table(conn, table):
        raise RefusedError(f"{'; '.join(map(str, found))}; nothing was changed")


def _of_either(conn: Connection, found: State) -> Iterator[Obstacle]:
    if foreign := foreign_partitions(conn, found, found.table.name):
        yield Obstacle("foreign-partition", not_ours(found.table, foreign))


def _of_a_copied_table(conn: Connection, found: State, shape: TableShape) -> Iterator[Obstacle]:
    table, waiting = found.table, found.phase is Phase.MIGRATED
    if waiting and emptied_by_hand(conn, table):
        yield Obstacle("old-table-emptied", old_table_emptied(table))
    if waiting and (rivals := _rivals(conn, found)):
        yield Obstacle(
            "written-in-both",
            f"{rivals:,} rows were written to {table.old} after the swap under keys that {table} has as"
            " well; delete them there, or give them other keys",
        )
    if repeated := _repeated_keys(conn, found, shape):
        yield _repeated(found.plan, table.old, repeated)
    if waiting and (changed := _changed_since(conn, found, shape)):
        yield Obstacle(
            "changed-since-the-swap",
            f"{table} was changed since the swap, and a rollback would undo that: {'; '.join(changed)};"
            f" make the same changes to {table.old} first, or take them back",
            forcible=True,
        )
    if waiting:
        yield from _sent_again(conn, table, "what was written since then", table.old)
    if gone := dropped_since(conn, found):
        still = [d.name for d in detached(conn, table) if d.name in set(map(table.partition, gone))]
        where = f" than those that wait detached; attach them first: {', '.join(still)}" if still else ""
        yield Obstacle(
            "dropped-since-the-swap",
            f"retention has dropped {gone[0]} to {gone[-1]}, which were written after the swap and are in"
            f" no other table{where}",
            forcible=True,
        )
    if emptied := list(_emptied_partitions(conn, found, shape)):
        yield Obstacle(
            "partition-emptied",
            f"{', '.join(emptied)} of {table} were emptied by TRUNCATE, which is not noted for a single"
            f" partition, and {table.old} has their rows; delete those there",
            forcible=True,
        )
    if not notes_are_taken(conn, table):
        yield Obstacle(
            "notes-disabled",
            f"the note triggers on {table} were dropped or disabled since the swap, and what was written"
            " to migrated rows meanwhile is not known",
            forcible=True,
        )


def _sent_again(conn: Connection, table: TableSpec, what: str, as_rows_of: str) -> Iterator[Obstacle]:
    for sender in senders(conn, table.home):
        yield Obstacle(
            "slot-sends-again",
            f"replication slot {sender.slot} ({sender.plugin}) sends whatever is written in this database,"
            f" and {what} would go out a second time, as rows of {as_rows_of}; drop it"
            f" if nobody needs it: SELECT pg_drop_replication_slot('{sender.slot}')",
            forcible=True,
        )


def _repeated(plan: Plan, plain: str, keys: list[str]) -> Obstacle:
    return Obstacle(
        "repeated-key",
        f"{plan.table} has rows with the same ({', '.join(plan.old_key)}) at different times, and"
        f" {plain} takes only one of each: {', '.join(keys)}; delete one, or give it another key",
    )


def _of_an_attached_table(conn: Connection, found: State, shape: TableShape) -> Iterator[Obstacle]:
    table, plan = found.table, found.plan
    bound = shape.instant(plan.first)
    if not any(p.name == table.history for p in attached(conn, table)):
        yield Obstacle(
            "history-gone",
            f"{table.history}, the table that was, is no partition of {table} any more: retention has dropped"
            f" it, or somebody has detached it, and there is no way back; {finalize_command(table)}",
        )
    beyond = rows_beyond(conn, table, bound)
    if beyond and table.column not in plan.old_key and (repeated := _repeated_beyond(conn, plan, bound)):
        yield _repeated(plan, "the plain table", repeated)
    if beyond:
        what = f"what lies at or beyond {plan.first:%Y-%m-%d}, where {table.history} ends,"
        yield from _sent_again(conn, table, what, table.name)
    if beyond > FEW_BEYOND:
        yield Obstacle(
            "rows-beyond-the-bound",
            f"{beyond:,} rows lie at or beyond {plan.first:%Y-%m-%d}, where {table.history} ends; they are"
            f" carried back while readers and writers wait, about {beyond / FEW_BEYOND / 2:.0f} s",
            forcible=True,
        )


def _repeated_beyond(conn: Connection, plan: Plan, bound: Statement) -> list[str]:
    """Some of the keys of rows beyond the bound that another row has as well.

    The other rows may be many; whether their keys repeat is found out when the old key is built again.
    """
    rows = execute(
        conn,
        statement(
            "SELECT DISTINCT concat_ws(', ', {key}) FROM {t} AS b JOIN {t} AS o ON {same}"
            " WHERE b.{c} >= {bound} AND o.{c} <> b.{c} LIMIT {shown}",
            key=names(plan.old_key, "b"),
            t=name(plan.table.home, plan.table.name),
            same=match(plan.old_key, "o", "b"),
            c=name(plan.table.column),
            bound=bound,
            shown=_SHOWN,
        ),
    ).all()
    return [row[0] for row in rows]


def old_table_emptied(table: TableSpec) -> str:
    """What to do when the only rows left are those of the partitioned table."""
    return (
        f"{table.old} was emptied by TRUNCATE after the swap, and the rows are in {table} alone. Stay with"
        f" {table}: {finalize_command(table)}; or fill {table.old} again from it, and then:"
        f" DELETE FROM {table.changes} WHERE chronos_origin = 'o'"
    )


def foreign_partitions(conn: Connection, found: State, parent: str) -> list[str]:
    """Partitions of the table ``parent`` that chronos has not made: their rows may be nowhere else.

    Ours have the name and the bounds of a period, and none lies before those that the migration made.
    """
    table = found.table
    return [
        p.name
        for p in attached(conn, table, parent)
        if not (found.plan.attaches and p.name == table.history)
        if p.lower is None
        or p.upper is None
        or p.lower < found.plan.first
        or table.period(p.lower) != Period(p.lower, p.upper)
        or p.name != table.partition(Period(p.lower, p.upper))
    ]


def not_ours(table: TableSpec, partitions: list[str]) -> str:
    """What to do about partitions that somebody else has made."""
    return (
        f"{', '.join(partitions)}: partitions of {table} that chronos has not made, and that a rollback would"
        f" drop. Detach them first (ALTER TABLE {table} DETACH PARTITION ...), and move what belongs into"
        f" {table}"
    )


def require_nothing_kept(conn: Connection, table: TableSpec) -> None:
    """After an undo by hand: raise RefusedError when the partitioned table was kept under our name for it."""
    if states.relkind(conn, table.home, table.new) == "p":
        raise RefusedError(
            f"{table} was put back by hand, and the partitioned table was kept as {table.new}: it may hold"
            " the only copy of what was written since the swap; nothing was changed. Carry over what is"
            " needed, then rename it or drop it"
        )


def dropped_since(conn: Connection, found: State) -> list[Period]:
    """The periods that took rows after the swap and have no partition any more."""
    if not found.phase.swapped or found.fence is None:
        return []
    now = execute(conn, statement("SELECT now()")).scalar_one()
    written = found.table.periods(found.fence, min(now, found.plan.end))
    return missing(attached(conn, found.table), written)


def _changed_since(conn: Connection, found: State, now: TableShape) -> list[str]:
    """How the partitioned table differs by now from what the plain one was at the swap, a line each."""
    table, plan = found.table, found.plan
    was = read_shape(conn, table, table.old)
    given_up = replace(was, rules=now.rules, foreign_keys=tuple(plan.foreign_keys))
    names_now = [(original, aside) for _, original, aside, _ in plan.renames]
    # An index that was made on both since has another name on each.
    known = {name for pair in names_now for name in pair}
    since = {(i.body, i.unique): i.name for i in was.indexes if i.name not in known}
    names_now += [
        (i.name, since[i.body, i.unique])
        for i in now.indexes
        if i.name not in known and (i.body, i.unique) in since
    ]
    return differences(given_up, now, names_now, announced=True)


def _rivals(conn: Connection, found: State) -> int:
    """How many rows were written by hand into the frozen table that the partitioned one has otherwise."""
    table, key = found.table, found.plan.old_key
    rows: int = execute(
        conn,
        statement(
            "SELECT count(*) FROM (SELECT DISTINCT {key} FROM {changes} WHERE chronos_origin = 'o') AS k"
            " WHERE EXISTS (SELECT FROM {old} AS o WHERE {old_same})"
            " AND EXISTS (SELECT FROM {new} AS n WHERE {new_same})",
            key=names(key),
            changes=name(table.home, table.changes),
            old=name(table.home, table.old),
            old_same=match(key, "o", "k"),
            new=name(table.home, table.name),
            new_same=match(key, "n", "k"),
        ),
    ).scalar_one()
    return rows


# The plain table's own rows cannot repeat a key: one of the two is newer than the swap, or was written since.
_REPEATED = """
WITH written AS MATERIALIZED (
    SELECT {key}, {c} FROM {new} WHERE {c} > {fence}
    UNION
    SELECT {n_key}, n.{c} FROM (SELECT DISTINCT {new_key} FROM {changes} WHERE chronos_origin = 'n') AS k
    JOIN {new} AS n ON {noted}
), repeated AS (
    SELECT {key} FROM written GROUP BY {key} HAVING count(*) > 1
    UNION
    SELECT {o_key} FROM written AS w JOIN {old} AS o ON {same}
    WHERE o.{c} <> w.{c} AND EXISTS (SELECT FROM {new} AS n WHERE {there})
)
SELECT concat_ws(', ', {key}) FROM repeated LIMIT {shown}
"""


def _repeated_keys(conn: Connection, found: State, shape: TableShape) -> list[str]:
    """Some of the keys that the partitioned table has twice, and the plain one cannot take."""
    table, plan = found.table, found.plan
    if table.column in plan.old_key or found.fence is None:
        return []
    rows = execute(
        conn,
        statement(
            _REPEATED,
            key=names(plan.old_key),
            n_key=names(plan.old_key, "n"),
            o_key=names(plan.old_key, "o"),
            new_key=names(plan.new_key),
            c=name(table.column),
            fence=shape.instant(found.fence),
            new=name(table.home, table.name),
            old=name(table.home, table.old),
            changes=name(table.home, table.changes),
            noted=match(plan.new_key, "n", "k"),
            same=match(plan.old_key, "o", "w"),
            there=match(plan.new_key, "n", "o"),
            shown=_SHOWN,
        ),
    ).all()
    return [row[0] for row in rows]


def _emptied_partitions(conn: Connection, found: State, shape: TableShape) -> Iterator[str]:
    """The partitions without a row of which the plain table has rows that nobody has deleted."""
    table, plan = found.table, found.plan
    until: datetime = found.fence or plan.started_at
    for partition in [] if truncated(conn, table) else attached(conn, table):
        if partition.lower is None or partition.upper is None or partition.lower > until.astimezone(UTC):
            continue
        emptied = execute(
            conn,
            statement(
                "SELECT NOT EXISTS (SELECT FROM {leaf}) AND EXISTS (SELECT FROM {old} AS o"
                " WHERE o.{c} >= {lower} AND o.{c} < {upper}"
                " AND NOT EXISTS (SELECT FROM {changes} AS k WHERE {noted}))",
                leaf=name(partition.schema, partition.name),
                old=name(table.home, table.old),
                changes=name(table.home, table.changes),
                c=name(table.column),
                lower=shape.instant(max(plan.cutoff, partition.lower)),
                upper=shape.instant(partition.upper),
                noted=match(plan.new_key, "k", "o"),
            ),
        ).scalar_one()
        if emptied:
            yield partition.name
