"""A table and its partitions as pure values: interval, bounds, and every name derived from the table's."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, time, timedelta
from enum import StrEnum
from typing import Any

NAME_BYTES = 63


def derived_name(base: str, suffix: str) -> str:
    """``base`` + ``suffix`` within PostgreSQL's 63 bytes; a shortened base keeps a hash, to stay unique."""
    whole = base + suffix
    if len(whole.encode()) <= NAME_BYTES:
        return whole
    tag = "_" + hashlib.sha256(base.encode()).hexdigest()[:8] + suffix
    kept = base.encode()[: NAME_BYTES - len(tag.encode())].decode(errors="ignore")
    return kept + tag


def quoted(identifier: str) -> str:
    """An identifier as you type it in SQL after a schema name: in quotes only if it needs them."""
    return identifier if re.fullmatch(r"[a-z_][a-z0-9_]*", identifier) else in_quotes(identifier)


def in_quotes(identifier: str) -> str:
    """An identifier in quotes, safe anywhere."""
    return '"' + identifier.replace('"', '""') + '"'


_PART = r'("(?:[^"]|"")+"|[^\W\d][\w$]*)'


def midnight(day: date) -> datetime:
    """The instant, UTC, at which ``day`` begins."""
    return datetime.combine(day, time(), tzinfo=UTC)


class Interval(StrEnum):
    """How much time one partition holds; weeks begin on Monday, and every bound is UTC."""

    HOUR = "hour"
    DAY = "day"
    WEEK = "week"
    MONTH = "month"

    def floor(self, instant: datetime) -> datetime:
        """The start of the period that holds ``instant``."""
        instant = instant.astimezone(UTC)
        if self is Interval.HOUR:
            return instant.replace(minute=0, second=0, microsecond=0)
        day = instant.date()
        if self is Interval.WEEK:
            day -= timedelta(days=day.weekday())
        elif self is Interval.MONTH:
            day = day.replace(day=1)
        return midnight(day)

    def next(self, start: datetime) -> datetime:
        """The start of the period after the one that begins at ``start``."""
        if self is Interval.HOUR:
            return start + timedelta(hours=1)
        if self is Interval.DAY:
            return start + timedelta(days=1)
        if self is Interval.WEEK:
            return start + timedelta(days=7)
        return (start + timedelta(days=32)).replace(day=1)

    def suffix(self, start: datetime) -> str:
        """The end of a partition's name: ``y2025m10d22``, ``y2025m10d22h07``, ``y2025w43``, ``y2025m10``."""
        if self is Interval.WEEK:
            year, week, _ = start.isocalendar()
            return f"y{year:04}w{week:02}"
        day = f"y{start:%Y}m{start:%m}"
        if self is Interval.MONTH:
            return day
        day += f"d{start:%d}"
        return day if self is Interval.DAY else f"{day}h{start:%H}"


@dataclass(frozen=True, order=True)
class Period:
    """The time that one partition holds, UTC: from ``start`` up to, but not including, ``end``."""

    start: datetime
    end: datetime

    def __str__(self) -> str:
        """``2025-10-22``, with the time of day unless the period begins at midnight UTC."""
        return f"{self.start:%Y-%m-%d}" if self.start.time() == time() else f"{self.start:%Y-%m-%d %H:%M}"


@dataclass(frozen=True)
class TableSpec:
    """A table that chronos partitions. ``schema`` is None until the table has been located.

    ``column`` is the time column; ``retention_days`` None means that every row is kept and copied;
    ``ahead_days`` is how far ahead partitions are created; ``grace_days`` how long an expired partition stays
    detached before it is dropped, 0: it is dropped at once.
    """

    name: str
    column: str = "timestamp"
    every: Interval = Interval.DAY
    retention_days: int | None = None
    ahead_days: int = 30
    schema: str | None = None
    grace_days: int = 0

    def __str__(self) -> str:
        return self.name

    @classmethod
    def named(cls, text: str) -> TableSpec:
        """The table that ``text`` names in SQL syntax: ``t``, ``schema.t``, ``"Sales"."Order Events"``.

        Unquoted parts are folded to lower case. Raises ValueError when it is not such a name.
        """
        parts = re.fullmatch(rf"{_PART}(?:\.{_PART})?", text.strip())
        if parts is None:
            raise ValueError(f'{text} is not a table name in SQL syntax: t, schema.t or "Any Name"')
        first, second = (
            p and (p[1:-1].replace('""', '"') if p.startswith('"') else p.lower()) for p in parts.groups()
        )
        return cls(second, schema=first) if second else cls(first)

    @property
    def typed(self) -> str:
        """The name as you type it in SQL, with the schema if that is known."""
        return ".".join(quoted(part) for part in (self.schema, self.name) if part is not None)

    @property
    def home(self) -> str:
        """The schema of a table that has been located."""
        assert self.schema is not None
        return self.schema

    def located(self, schema: str) -> TableSpec:
        """The same table, in ``schema``."""
        return replace(self, schema=schema)

    @property
    def old(self) -> str:
        """The name of the plain table once the partitioned one has taken its place."""
        return f"{self.name}_old"

    @property
    def history(self) -> str:
        """The name of the plain table once it has become the partition for all rows before a bound."""
        return f"{self.name}_history"

    @property
    def new(self) -> str:
        """The name of the partitioned table while it is not in use."""
        return f"{self.name}_new"

    @property
    def state(self) -> str:
        """The table that says how far the migration has come."""
        return f"{self.name}_migration"

    @property
    def changes(self) -> str:
        """The table of the notes: keys of rows that were written in the table in use."""
        return f"{self.name}_migration_changes"

    @property
    def replayed(self) -> str:
        """The table of the keys whose notes were replayed before the swap."""
        return f"{self.name}_migration_replayed"

    @property
    def note_function(self) -> str:
        """The trigger function that takes the notes."""
        return f"{self.name}_note_change"

    @property
    def noted_function(self) -> str:
        """The function that says which times of the partitioned table are noted."""
        return f"{self.name}_is_noted"

    @property
    def unlink_function(self) -> str:
        """The trigger function that deletes the copy of a deleted row from the table not in use."""
        return f"{self.name}_unlink_copy"

    @property
    def snapshot_function(self) -> str:
        """The trigger function that rejects UPDATE and DELETE under a snapshot from before the swap."""
        return f"{self.name}_note_snapshot"

    @property
    def note_triggers(self) -> tuple[str, ...]:
        """The triggers that belong to chronos, and are not part of the table's shape."""
        noting = (f"{self.name}_note_{w}" for w in ("insert", "update", "delete", "truncate", "snapshot"))
        # Triggers fire in name order: this one after all other BEFORE triggers.
        return *noting, f"~{self.name}_unlink"

    @property
    def create_function(self) -> str:
        """The SQL function that creates partitions ahead."""
        return f"create_future_{self.name}_partitions"

    @property
    def drop_function(self) -> str:
        """The SQL function that drops expired partitions."""
        return f"drop_old_{self.name}_partitions"

    @property
    def functions(self) -> tuple[str, str]:
        """Both SQL functions."""
        return self.create_function, self.drop_function

    def period(self, instant: datetime) -> Period:
        """The period that holds ``instant``."""
        start = self.every.floor(instant)
        return Period(start, self.every.next(start))

    def periods(self, first: datetime, end: datetime) -> list[Period]:
        """Every period from the one that holds ``first`` up to, but not including, ``end``."""
        return list(self._periods(first, end))

    def _periods(self, first: datetime, end: datetime) -> Iterator[Period]:
        period = self.period(first)
        while period.start < end:
            yield period
            period = Period(period.end, self.every.next(period.end))

    def wanted(self, now: datetime, *, back: bool = True) -> list[Period]:
        """The periods that should have a partition: those within retention, today's, and those ahead."""
        today = midnight(now.astimezone(UTC).date())
        first = now
        if back and self.retention_days is not None:
            first = today - timedelta(days=self.retention_days)
        return self.periods(first, today + timedelta(days=self.ahead_days + 1))

    def partition(self, period: Period) -> str:
        """``webhook_log_y2025m10d22`` for 22 October 2025."""
        return f"{self.name}_{self.every.suffix(period.start)}"

    def as_toml(self) -> str:
        """The block of ``chronos.toml`` that lists the table."""
        lines = ["[[tables]]", f"name = {_toml(self.typed)}", f"column = {_toml(self.column)}"]
        lines.append(f"every = {_toml(self.every.value)}")
        if self.retention_days is not None:
            lines.append(f"retention_days = {self.retention_days}")
        lines.append(f"ahead_days = {self.ahead_days}")
        return "\n".join([*lines, *([f"grace_days = {self.grace_days}"] if self.grace_days else [])])

    def as_json(self) -> dict[str, Any]:
        """For the state of a migration."""
        return {
            "name": self.name,
            "column": self.column,
            "every": self.every.value,
            "retention_days": self.retention_days,
            "ahead_days": self.ahead_days,
            "schema": self.schema,
            "grace_days": self.grace_days,
        }

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> TableSpec:
        """The reverse of ``as_json``."""
        return cls(**{**found, "every": Interval(found["every"])})


def _toml(text: str) -> str:
    """A TOML string, which is written like a JSON string."""
    return json.dumps(text, ensure_ascii=False)


WEBHOOK_LOG = TableSpec("webhook_log", retention_days=15)
