"""The vocabulary of partitions: a day, its name, its bounds; which exist, should exist, have expired."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta

from sqlalchemy.engine import Connection

from chronos.db import execute, statement

TABLE = "webhook_log"
OLD_TABLE = "webhook_log_old"
DAYS_BACK = 15
DAYS_AHEAD = 30
FUNCTIONS = ("create_future_webhook_log_partitions", "drop_old_webhook_log_partitions")


def partition_name(day: date) -> str:
    """``webhook_log_y2025m10d22`` for 22 October 2025."""
    return f"{TABLE}_y{day:%Y}m{day:%m}d{day:%d}"


def midnight(day: date) -> datetime:
    """The instant, UTC, at which ``day`` begins."""
    return datetime.combine(day, time(), tzinfo=UTC)


def days(first: date, last: date) -> list[date]:
    """Every day from ``first`` through ``last``."""
    return [first + timedelta(days=n) for n in range((last - first).days + 1)]


def desired(today: date, *, back: int = DAYS_BACK, ahead: int = DAYS_AHEAD) -> list[date]:
    """The days that should have a partition: ``back`` before today, today, ``ahead`` after it."""
    return days(today - timedelta(days=back), today + timedelta(days=ahead))


@dataclass(frozen=True)
class Partition:
    """One attached partition, as the catalog has it.

    ``lower`` and ``upper`` (UTC; ``upper`` is exclusive) are None for a bound that is no day's:
    MINVALUE, MAXVALUE, or the default partition, which has neither.
    """

    name: str
    lower: datetime | None
    upper: datetime | None
    detach_pending: bool
    rows_estimate: int
    bytes: int
    schema: str

    def covers(self, day: date) -> bool:
        """Whether every instant of ``day`` has its place here."""
        return (
            not self.detach_pending
            and not self.lower is self.upper is None  # the default partition is no day's place
            and (self.lower is None or self.lower <= midnight(day))
            and (self.upper is None or midnight(day + timedelta(days=1)) <= self.upper)
        )


# pg_get_expr prints timestamptz bounds in the session's zone; db.transaction() pins UTC and ISO.
_ATTACHED = r"""
SELECT c.relname,
       to_timestamp(extract(epoch FROM (m.bound)[1]::timestamp)) AS lower,
       to_timestamp(extract(epoch FROM (m.bound)[2]::timestamp)) AS upper,
       i.inhdetachpending,
       greatest(c.reltuples, 0)::bigint,
       coalesce(pg_total_relation_size(c.oid), 0),
       n.nspname
FROM pg_inherits i
JOIN pg_class c ON c.oid = i.inhrelid
JOIN pg_namespace n ON n.oid = c.relnamespace
LEFT JOIN LATERAL (
    SELECT regexp_match(
        pg_get_expr(c.relpartbound, c.oid),
        '^FOR VALUES FROM \((?:''(\d[^'']*)''|MINVALUE)\) TO \((?:''(\d[^'']*)''|MAXVALUE)\)$') AS bound
) m ON true
WHERE i.inhparent = to_regclass({table})
ORDER BY lower NULLS LAST, c.relname
"""


def attached(conn: Connection, schema: str, table: str = TABLE) -> list[Partition]:
    """The partitions of ``schema.table``, oldest first; to be called inside ``db.transaction``.

    ACCESS SHARE on each partition, for its size.
    """
    qualified = execute(conn, statement("SELECT format('%I.%I', {s}, {t})", s=schema, t=table))
    rows = execute(conn, statement(_ATTACHED, table=qualified.scalar_one())).all()
    return [Partition(*row) for row in rows]


def missing(existing: Iterable[Partition], wanted: Iterable[date]) -> list[date]:
    """The wanted days that no existing partition covers."""
    existing = list(existing)
    return [day for day in wanted if not any(p.covers(day) for p in existing)]


def expired(existing: Iterable[Partition], today: date, retention_days: int) -> list[Partition]:
    """The partitions whose last instant lies before the day that is ``retention_days`` old."""
    cutoff = midnight(today - timedelta(days=retention_days))
    return [p for p in existing if p.upper is not None and p.upper <= cutoff]


def droppable(existing: Iterable[Partition], today: date, retention_days: int) -> list[Partition]:
    """The expired partitions that the drop function takes: not the newest, not one detached half-way."""
    bounded = [p for p in existing if not p.detach_pending and (p.lower or p.upper)]
    newest = max(bounded, key=lambda p: p.upper or datetime.max.replace(tzinfo=UTC), default=None)
    return [p for p in expired(bounded, today, retention_days) if p is not newest]


def runway(existing: Iterable[Partition], today: date) -> int:
    """How many days after ``today``, one after another, have a partition; 0 when today has none.

    At most ten years, which is as far as the function goes that creates them.
    """
    existing = list(existing)
    for ahead in range(3651):
        if missing(existing, [today + timedelta(days=ahead)]):
            return max(ahead - 1, 0)
    return 3650
