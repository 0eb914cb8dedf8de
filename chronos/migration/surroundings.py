"""What else goes on on the server that a migration had better know of: sessions, replicas, limits, jobs."""

from __future__ import annotations

from sqlalchemy.engine import Connection

from chronos.db import execute, name, statement
from chronos.migration.table_shape import TableShape
from chronos.partitions import DAYS_AHEAD, DAYS_BACK, TABLE

# Each row is a sentence to print. Whoever may not see the queries of others sees fewer of them.
_WARNINGS = r"""
SELECT format('pid %s (%s) has had a transaction open for %s s; while it uses webhook_log the swap has'
              ' to wait for it', pid, coalesce(nullif(application_name, ''), usename, 'unknown'),
              extract(epoch FROM now() - xact_start)::int)
FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'
  AND xact_start < now() - interval '30 seconds'
UNION ALL
SELECT format('a prepared transaction (%s) is open since %s; the swap may have to wait for it', gid,
              to_char(prepared, 'YYYY-MM-DD HH24:MI'))
FROM pg_prepared_xacts WHERE database = current_database()
UNION ALL
SELECT format('replica %s is %s behind; the copy adds to that',
              coalesce(nullif(application_name, ''), 'unknown'),
              pg_size_pretty(pg_wal_lsn_diff(pg_current_wal_lsn(), replay_lsn)))
FROM pg_stat_replication
UNION ALL
SELECT format('replication slot %s is %s and keeps %s of WAL; it would keep what the copy writes, too',
              slot_name, CASE WHEN active THEN 'active' ELSE 'inactive' END,
              pg_size_pretty(pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn)))
FROM pg_replication_slots WHERE restart_lsn IS NOT NULL
UNION ALL
SELECT 'archive_mode is on: all WAL of the copy goes to the archive'
WHERE current_setting('archive_mode') <> 'off'
UNION ALL
SELECT format('pid %s is vacuuming webhook_log; the swap has to wait for it', pid)
FROM pg_stat_progress_vacuum WHERE relid = {oid}
UNION ALL
SELECT format('%s rows were deleted from webhook_log since its statistics were last reset: stop the job that'
              ' deletes before the migration, retention drops whole partitions afterwards', n_tup_del)
FROM pg_stat_user_tables WHERE relid = {oid} AND n_tup_del > 0
UNION ALL
SELECT format('pid %s (%s) is deleting from webhook_log now', pid,
              coalesce(nullif(application_name, ''), usename, 'unknown'))
FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid() AND state <> 'idle'
  AND query ~* 'delete\s+from\s+(only\s+)?("?\w+"?\.)?"?webhook_log\M'
UNION ALL
SELECT format('publication %s publishes all tables%s: also webhook_log_old, the partitions and the tables'
              ' that chronos keeps', pubname,
              CASE WHEN puballtables THEN '' ELSE ' of this schema' END)
FROM pg_publication p
WHERE puballtables OR EXISTS (SELECT FROM pg_publication_namespace n
                              WHERE n.pnpubid = p.oid AND n.pnnspid = quote_ident({schema})::regnamespace)
UNION ALL
SELECT format('publication %s does not publish through the root: subscribers will need each partition by its'
              ' name; ALTER PUBLICATION %I SET (publish_via_partition_root = true) spares them that',
              p.pubname, p.pubname)
FROM pg_publication p
WHERE NOT pubviaroot AND (puballtables OR EXISTS (SELECT FROM pg_publication_rel r
                                                  WHERE r.prpubid = p.oid AND r.prrelid = {oid}))
"""

_LOCKS = """
SELECT current_setting('max_locks_per_transaction')::bigint
       * (current_setting('max_connections')::bigint + current_setting('max_prepared_transactions')::bigint),
       (SELECT count(*) FROM pg_index WHERE indrelid = {oid})
"""


def warnings(conn: Connection, shape: TableShape) -> list[str]:
    """What is to be known before a migration of the table, none of which forbids it."""
    query = statement(_WARNINGS, oid=shape.oid, schema=shape.schema)
    found = [row[0] for row in execute(conn, query).all()]
    available, indexes = execute(conn, statement(_LOCKS, oid=shape.oid)).one()
    needed = (DAYS_BACK + DAYS_AHEAD + 3) * (indexes + 3)
    if needed > available // 2:
        found.append(
            f"a query over all partitions locks about {needed:,} objects, there is room for {available:,};"
            " raise max_locks_per_transaction"
        )
    return found + _scheduled(conn)


def _scheduled(conn: Connection) -> list[str]:
    """Jobs of pg_cron that delete from the table, where pg_cron is there and shows them."""
    readable = execute(
        conn,
        statement(
            "SELECT CASE WHEN to_regclass('cron.job') IS NULL THEN false"
            " ELSE has_table_privilege('cron.job', 'SELECT') END"
        ),
    ).scalar_one()
    if not readable:
        return []
    rows = execute(
        conn,
        statement(
            r"SELECT jobid, command FROM {job} WHERE command ~* {pattern}",
            job=name("cron", "job"),
            pattern=rf"delete\s+from\s+\S*{TABLE}",
        ),
    ).all()
    return [f"pg_cron's job {job} deletes from {TABLE} ({command}); unschedule it" for job, command in rows]
