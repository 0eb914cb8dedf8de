"""What stands in the way of a rollback: checked before it begins, so that it can also finish.

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
from chronos.table import Period, TableSpec, quoted

_SHOWN = 3
# Rows beyond the bound of an attached table that may be moved back while everybody waits: half a second.
FEW_BEYOND = 5_000


@dataclass(frozen=True)
class Obstacle(Finding):
    """One thing in the way; ``forcible``: an operator may accept what it costs."""

    forcible: bool = False


def obstacles(conn: Connection, found: State) -> list[Obstacle]:
    """Everything in the way of rolling back a migration after its swap. Only reads; ACCESS SHARE."""
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
    if waiting and (written := _written_in_both(conn, found)):
        yield Obstacle(
            "written-in-both",
            f"{written:,} rows were written to {table.old} after the swap with keys that {table} also has;"
            " delete them there, or give them other keys",
        )
    if repeated := _repeated_keys(conn, found, shape):
        yield _repeated(found.plan, table.old, repeated)
    if waiting and (changed := _changed_since(conn, found, shape)):
        yield Obstacle(
            "changed-since-the-swap",
            f"{table} was changed after the swap, and a rollback would undo that: {'; '.join(changed)};"
            f" make the same changes to {table.old} first, or undo them",
            forcible=True,
        )
    if waiting:
        yield from _sent_again(conn, table, "rows written since the swap", table.old)
    if gone := dropped_since(conn, found):
        still = [d.name for d in detached(conn, table) if d.name in set(map(table.partition, gone))]
        where = f" than those still waiting detached; attach them first: {', '.join(still)}" if still else ""
        yield Obstacle(
            "dropped-since-the-swap",
            f"retention has dropped {gone[0]} to {gone[-1]}, which were written after the swap and are in"
            f" no other table{where}",
            forcible=True,
        )
    if emptied := list(_emptied_partitions(conn, found, shape)):
        yield Obstacle(
            "partition-emptied",
            f"{', '.join(emptied)} of {table} were emptied by TRUNCATE, which is not noted for single"
            f" partitions, and {table.old} still has their rows; delete them there",
            forcible=True,
        )
    if not notes_are_taken(conn, table):
        yield Obstacle(
            "notes-disabled",
            f"the note triggers on {table} were dropped or disabled after the swap, and changes to migrated"
            " rows since then are unknown",
            forcible=True,
        )


def _sent_again(conn: Connection, table: TableSpec, what: str, as_rows_of: str) -> Iterator[Obstacle]:
    for sender in senders(conn, table.home):
        yield Obstacle(
            "slot-sends-again",
            f"replication slot {sender.slot} ({sender.plugin}) sends everything written in this database,"
            f" and {what} would be sent a second time, as rows of {as_rows_of}; drop it"
            f" if nobody needs it: SELECT pg_drop_replication_slot('{sender.slot}')",
            forcible=True,
        )


def _repeated(plan: Plan, plain: str, keys: list[str]) -> Obstacle:
    return Obstacle(
        "repeated-key",
        f"{plan.table} has rows with the same ({', '.join(plan.old_key)}) at different times, and"
        f" {plain} allows only one: {', '.join(keys)}; delete one, or give it another key",
    )


def _of_an_attached_table(conn: Connection, found: State, shape: TableShape) -> Iterator[Obstacle]:
    table, plan = found.table, found.plan
    bound = shape.instant(plan.first)
    if not any(p.name == table.history for p in attached(conn, table)):
        why = (
            f"is no longer a partition of {table}: retention dropped it, or somebody detached it; there"
            f" is no way back; finish with: {finalize_command(table)}"
        )
        if any(one.name == table.history for one in detached(conn, table)):
            why = (
                f"is detached and waits for its drop; attach it first: ALTER TABLE {table} ATTACH PARTITION"
                f" {quoted(table.history)} FOR VALUES FROM (MINVALUE) TO ('{plan.first}');"
            )
        yield Obstacle("history-gone", f"{table.history}, the former table, {why}")
    beyond = rows_beyond(conn, table, bound)
    if beyond and table.column not in plan.old_key and (repeated := _repeated_beyond(conn, plan, bound)):
        yield _repeated(plan, "the plain table", repeated)
    if beyond:
        what = f"rows at or beyond {plan.first:%Y-%m-%d}, where {table.history} ends,"
        yield from _sent_again(conn, table, what, table.name)
    if beyond > FEW_BEYOND:
        yield Obstacle(
            "rows-beyond-the-bound",
            f"{beyond:,} rows lie at or beyond {plan.first:%Y-%m-%d}, where {table.history} ends; they are"
            f" moved back while readers and writers wait, about {beyond / FEW_BEYOND / 2:.0f} s",
            forcible=True,
        )


def _repeated_beyond(conn: Connection, plan: Plan, bound: Statement) -> list[str]:
    """Some of the keys of rows beyond the bound that another row also has.

    The other rows may be many; rebuilding the old key shows whether their keys repeat.
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
        f"{table.old} was emptied by TRUNCATE after the swap, so only {table} has the rows. Stay with"
        f" {table}: {finalize_command(table)}; or refill {table.old} from it, and then:"
        f" DELETE FROM {table.changes} WHERE chronos_origin = 'o'"
    )


def foreign_partitions(conn: Connection, found: State, parent: str) -> list[str]:
    """Partitions of the table ``parent`` that chronos did not create: their rows may exist nowhere else.

    Ours have the name and bounds of a period, and none lies before those that the migration created.
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
    """What to do about partitions that somebody else created."""
    return (
        f"{', '.join(partitions)}: partitions of {table} that chronos did not create, and that a rollback"
        f" would drop. Detach them first (ALTER TABLE {table} DETACH PARTITION ...), and move any rows that"
        f" belong into {table}"
    )


def require_nothing_kept(conn: Connection, table: TableSpec) -> None:
    """After an undo by hand: raise RefusedError if the partitioned table was kept under our name for it."""
    if states.relkind(conn, table.home, table.new) == "p":
        raise RefusedError(
            f"{table} was put back by hand, and the partitioned table was kept as {table.new}: it may hold"
            " the only copy of what was written since the swap; nothing was changed. Copy what you need,"
            " then rename it or drop it"
        )


def dropped_since(conn: Connection, found: State) -> list[Period]:
    """The periods that took rows after the swap and no longer have a partition."""
    if not found.phase.swapped or found.fence is None:
        return []
    now = execute(conn, statement("SELECT now()")).scalar_one()
    written = found.table.periods(found.fence, min(now, found.plan.end))
    return missing(attached(conn, found.table), written)


def _changed_since(conn: Connection, found: State, now: TableShape) -> list[str]:
    """How the partitioned table now differs from the plain one as of the swap, a line each."""
    table, plan = found.table, found.plan
    was = read_shape(conn, table, table.old)
    given_up = replace(was, rules=now.rules, foreign_keys=tuple(plan.foreign_keys))
    names_now = [(original, aside) for _, original, aside, _ in plan.renames]
    # An index that was since created on both has a different name on each.
    known = {name for pair in names_now for name in pair}
    since = {(i.body, i.unique): i.name for i in was.indexes if i.name not in known}
    names_now += [
        (i.name, since[i.body, i.unique])
        for i in now.indexes
        if i.name not in known and (i.body, i.unique) in since
    ]
    return differences(given_up, now, names_now, announced=True)


def _written_in_both(conn: Connection, found: State) -> int:
    """How many rows written by hand into the frozen table have keys that the partitioned one also has."""
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


# Rows of the plain table cannot repeat a key: one of the two is beyond the fence, or was written since.
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
    """Some of the keys that the partitioned table has twice, which the plain one does not allow."""
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
    """The empty partitions for which the plain table has rows that were not deleted."""
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
