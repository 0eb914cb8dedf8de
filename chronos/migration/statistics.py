"""Statistics at the end of a migration: of the table as a whole, which autovacuum never gathers."""

from __future__ import annotations

from chronos.catalog.ddl import can_analyze_only, final_statistics, own_autovacuum
from chronos.catalog.partitions import attached
from chronos.db import execute, name, opened, statement, transaction
from chronos.migration.context import Migration
from chronos.table import Period

# NOWAIT, so that no session and no vacuum is disturbed: a partition in use is simply analyzed as well.
_LOCK = """
DO $do$
DECLARE
    leaf text;
BEGIN
    FOREACH leaf IN ARRAY {leaves}::text[] LOOP
        BEGIN
            EXECUTE format('LOCK TABLE ONLY %I.%I IN SHARE UPDATE EXCLUSIVE MODE NOWAIT', {schema}, leaf);
        EXCEPTION WHEN lock_not_available THEN
            NULL;
        END;
    END LOOP;
END
$do$
"""


def gather_statistics(migration: Migration, live: list[Period]) -> None:
    """Gather those of the whole table and of its partitions in ``live``; autovacuum does the others.

    SHARE UPDATE EXCLUSIVE on the table; before PostgreSQL 18, for a second or so, also on the other
    partitions: readers and writers do not notice.
    """
    shape, table = migration.shape, migration.table
    with opened(migration.engine) as analyzing, opened(migration.engine) as holding:
        query = final_statistics(analyzing, shape, live)
        analyzing = analyzing.execution_options(isolation_level="AUTOCOMMIT")
        if can_analyze_only(analyzing) or own_autovacuum(shape):
            execute(analyzing, query)
            return
        # No ANALYZE ONLY before PostgreSQL 18. Partitions that another session of ours has locked are skipped
        # but still sampled for the whole table.
        with transaction(holding):
            mine = {table.partition(period) for period in live}
            leaves = [p.name for p in attached(holding, table) if p.name not in mine]
            execute(holding, statement(_LOCK, leaves=leaves, schema=table.home))
            execute(analyzing, statement("ANALYZE (SKIP_LOCKED) {table}", table=name(table.home, table.name)))
