"""Statistics at the end of a migration: of the table as a whole, which autovacuum never gathers."""

from __future__ import annotations

from chronos.catalog.ddl import can_analyze_only, final_statistics, own_autovacuum
from chronos.catalog.partitions import attached
from chronos.db import execute, name, opened, statement, transaction
from chronos.migration.context import Migration
from chronos.table import Period

# Nobody is waited for, nobody's vacuum is called off: a partition that somebody is at is analyzed after all.
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
    """Gather those of the whole table and of its partitions of ``live``; autovacuum does the others.

    SHARE UPDATE EXCLUSIVE on the table; before PostgreSQL 18 also, for the second or so that it takes, on the
    other partitions: readers and writers do not notice.
    """
    shape, table = migration.shape, migration.table
    with opened(migration.engine) as analyzing, opened(migration.engine) as holding:
        query = final_statistics(analyzing, shape, live)
        analyzing = analyzing.execution_options(isolation_level="AUTOCOMMIT")
        if can_analyze_only(analyzing) or own_autovacuum(shape):
            execute(analyzing, query)
            return
        # ANALYZE ONLY is not there yet. What another session of ours has locked is skipped, and the sample
        # of the whole is taken from it all the same.
        with transaction(holding):
            mine = {table.partition(period) for period in live}
            leaves = [p.name for p in attached(holding, table) if p.name not in mine]
            execute(holding, statement(_LOCK, leaves=leaves, schema=table.home))
            execute(analyzing, statement("ANALYZE (SKIP_LOCKED) {table}", table=name(table.home, table.name)))
