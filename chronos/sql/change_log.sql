-- The notes of a migration: keys of rows that were written in the table in use, so that the other table
-- can be brought to the same. Before the swap that is the plain table, whose every write is noted; after
-- it the partitioned one, where @noted_function@ says which times are.
--
-- chronos_origin is 'o' for what was written in the plain table and 'n' for the partitioned one;
-- chronos_truncated marks a TRUNCATE, which has no key.

CREATE TABLE @changes@ AS
    SELECT @#columns@ FROM @table@ WITH NO DATA;
ALTER TABLE @changes@
    ADD COLUMN chronos_origin "char" NOT NULL,
    ADD COLUMN chronos_truncated boolean NOT NULL DEFAULT false;

COMMENT ON TABLE @changes@ IS
    'chronos: keys of rows written while the migration can still go either way; finalize and rollback remove it';

-- Finds a TRUNCATE, and a row without a time, among any number of notes; it costs the others nothing.
CREATE INDEX ON @changes@ (chronos_truncated) WHERE @column@ IS NULL;

-- A publication of all tables has this one in it; without a key it could not be emptied then.
ALTER TABLE @changes@ REPLICA IDENTITY FULL;

-- The keys whose notes were replayed before the swap: they are compared once more.
CREATE TABLE @replayed@ AS
    SELECT @#columns@ FROM @table@ WITH NO DATA;

COMMENT ON TABLE @replayed@ IS
    'chronos: keys whose notes were replayed, to be compared once more; finalize and rollback remove it';

ALTER TABLE @replayed@ REPLICA IDENTITY FULL;

-- SECURITY DEFINER: a role that may write the table need not be allowed to write its notes.
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
    IF TG_OP = 'DELETE' OR (TG_OP = 'UPDATE' AND record_image_ne(ROW(@#old_values@), ROW(@#new_values@))) THEN
        INSERT INTO @schema@.@changes@ (@#columns@, chronos_origin) VALUES (@#old_values@, TG_ARGV[0]::"char");
    END IF;
    IF TG_OP <> 'DELETE' THEN
        INSERT INTO @schema@.@changes@ (@#columns@, chronos_origin) VALUES (@#new_values@, TG_ARGV[0]::"char");
    END IF;
    RETURN NULL;
END
$$;

-- While the table that is being filled has foreign keys, a row that the application changes or deletes must
-- not be left there until its note is replayed: it would keep the application from deleting what the row
-- refers to, in the very same transaction.
CREATE FUNCTION @unlink_function@()
RETURNS trigger
LANGUAGE plpgsql
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    DELETE FROM @schema@.@new@ AS n WHERE @#match_old@;
    RETURN NULL;
END
$$;

-- Calling a trigger function takes no privilege, being able to attach it to a table of one's own does.
REVOKE ALL ON FUNCTION @note_function@() FROM PUBLIC;
REVOKE ALL ON FUNCTION @unlink_function@() FROM PUBLIC;

-- Which times are noted in the partitioned table: none before the swap; all of them after it, until the notes
-- from before were compared; then those up to the swap; and all of them again on the way back. Replacing this function takes a millisecond under the lock of the swap, making the
-- triggers of all partitions would take ten. The server writes its body into the triggers' conditions.
CREATE FUNCTION @noted_function@(written @#time_type@)
RETURNS boolean
LANGUAGE sql
IMMUTABLE
PARALLEL SAFE
RETURN false;
