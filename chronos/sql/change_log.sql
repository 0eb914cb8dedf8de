-- The notes of a migration: keys of rows written in the table in use, so that the other table can be brought
-- up to date. Before the swap that is the plain table, where every write is noted; after it the partitioned
-- one, where @noted_function@ says which times are noted.
--
-- chronos_origin is 'o' for writes to the plain table and 'n' for the partitioned one; chronos_truncated marks
-- a TRUNCATE, which has no key.

CREATE TABLE @changes@ AS
    SELECT @#columns@ FROM @table@ WITH NO DATA;
ALTER TABLE @changes@
    ADD COLUMN chronos_origin "char" NOT NULL,
    ADD COLUMN chronos_truncated boolean NOT NULL DEFAULT false;

COMMENT ON TABLE @changes@ IS
    'chronos: keys of rows written while the migration can still go either way; finalize and rollback remove it';

-- Finds a TRUNCATE, or a row without a time, among any number of notes; other notes are not in it.
CREATE INDEX ON @changes@ (chronos_truncated) WHERE @column@ IS NULL;

-- A publication of all tables includes this one, and without a replica identity DELETE would fail.
ALTER TABLE @changes@ REPLICA IDENTITY FULL;

-- The keys whose notes were replayed before the swap, to be compared again.
CREATE TABLE @replayed@ AS
    SELECT @#columns@ FROM @table@ WITH NO DATA;

COMMENT ON TABLE @replayed@ IS
    'chronos: keys whose notes were replayed, to be compared again; finalize and rollback remove it';

ALTER TABLE @replayed@ REPLICA IDENTITY FULL;

-- Notes the key of each row that is written. SECURITY DEFINER: a role that may write the table needs no
-- privilege on its notes.
CREATE FUNCTION @note_function@()
RETURNS trigger
LANGUAGE plpgsql
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF TG_OP = 'TRUNCATE' THEN
        INSERT INTO @schema@.@changes@ (chronos_origin, chronos_truncated) VALUES (TG_ARGV[0]::"char", true);
        RETURN NULL;
    END IF;
    -- What @unlink_function@ deletes from the table no longer in use was not written by hand.
    IF TG_TABLE_NAME = @'old'@ AND pg_trigger_depth() > 1 THEN
        RETURN NULL;
    END IF;
    IF TG_OP = 'DELETE' OR (TG_OP = 'UPDATE' AND record_image_ne(ROW(@#old_values@), ROW(@#new_values@))) THEN
        INSERT INTO @schema@.@changes@ (@#columns@, chronos_origin) VALUES (@#old_values@, TG_ARGV[0]::"char");
    END IF;
    IF TG_OP <> 'DELETE' THEN
        INSERT INTO @schema@.@changes@ (@#columns@, chronos_origin) VALUES (@#new_values@, TG_ARGV[0]::"char");
    END IF;
    RETURN NULL;
END
$$;

REVOKE ALL ON FUNCTION @note_function@() FROM PUBLIC;

-- A REPEATABLE READ transaction that is older than the swap and has waited for it does not see the rows that
-- were replayed last: its UPDATE or DELETE would silently miss them. So it must be retried, which such
-- transactions must be prepared for. The arguments are the phases that a later transaction sees.
CREATE FUNCTION @snapshot_function@()
RETURNS trigger
LANGUAGE plpgsql
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF current_setting('transaction_isolation') IN ('repeatable read', 'serializable')
       AND NOT EXISTS (SELECT FROM @schema@.@state@ AS s WHERE s.phase = ANY (TG_ARGV)) THEN
        RAISE EXCEPTION 'could not serialize access: % was swapped after this transaction began', TG_TABLE_NAME
            USING ERRCODE = 'serialization_failure', HINT = 'Retry the transaction.';
    END IF;
    RETURN NULL;
END
$$;

REVOKE ALL ON FUNCTION @snapshot_function@() FROM PUBLIC;

-- Which times are noted in the partitioned table: none before the swap; all of them after it, until the earlier
-- notes are compared; then those up to the swap; and all of them again on the way back. Replacing this function
-- takes a millisecond under the lock of the swap; creating the triggers on all partitions would take ten. The
-- server inlines its body into the triggers' conditions.
CREATE FUNCTION @noted_function@(written @#time_type@)
RETURNS boolean
LANGUAGE sql
IMMUTABLE
PARALLEL SAFE
RETURN false;
