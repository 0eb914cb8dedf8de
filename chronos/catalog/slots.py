"""Logical replication slots, and what they would send a second time."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy.engine import Connection

from chronos.db import execute, statement

# Only its subscriber knows which publications a pgoutput slot sends. A publication that lists its tables does
# not include those that chronos builds. An inactive slot sends everything once it is read again.
_SENDERS = """
SELECT s.slot_name::text, s.plugin::text, p.pubname::text, p.puballtables
FROM pg_replication_slots s
LEFT JOIN pg_publication p
    ON s.plugin = 'pgoutput'
   AND (p.puballtables OR EXISTS (
       SELECT FROM pg_publication_namespace m JOIN pg_namespace n ON n.oid = m.pnnspid
       WHERE m.pnpubid = p.oid AND n.nspname = {schema}))
WHERE s.slot_type = 'logical' AND s.database = current_database() AND s.wal_status IS DISTINCT FROM 'lost'
  AND (s.plugin <> 'pgoutput' OR p.oid IS NOT NULL)
ORDER BY 1, 3
"""


@dataclass(frozen=True)
class Sender:
    """A slot that sends writes to any table of the schema, through ``publication`` or, if None, its plugin;
    ``all_tables``: the publication is FOR ALL TABLES.
    """

    slot: str
    plugin: str
    publication: str | None
    all_tables: bool | None


def senders(conn: Connection, schema: str) -> list[Sender]:
    """The slots of this database whose readers get a row again if it is copied within ``schema``."""
    return [Sender(*row) for row in execute(conn, statement(_SENDERS, schema=schema)).all()]


def slots(conn: Connection) -> set[str]:
    """The names of all logical slots of this database."""
    query = "SELECT slot_name::text FROM pg_replication_slots WHERE database = current_database()"
    return {row[0] for row in execute(conn, statement(query)).all()}
