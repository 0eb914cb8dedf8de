-- While webhook_log_old may still be needed again, this remembers which of its rows the application
-- has touched in the new table: the key of every row at or below the fence (the highest id of the old
-- table) that was inserted, updated or deleted there since the swap. Rows above the fence are known by
-- their id and cost nothing but a comparison. rollback reads it; finalize and rollback remove it.
--
-- Run with the table's schema first in search_path.

CREATE TABLE webhook_log_migration_changes AS
    SELECT id, "timestamp" FROM webhook_log_new WITH NO DATA;

COMMENT ON TABLE webhook_log_migration_changes IS
    'chronos: keys of migrated rows that were written again since; finalize and rollback remove it';

-- A publication of all tables has this one in it; without a key it could not be emptied then.
ALTER TABLE webhook_log_migration_changes REPLICA IDENTITY FULL;

-- How far the copy of today, and of days ahead, has come: the last instant copied. The application writes
-- these partitions too, so it cannot be read off them; and what it has deleted there must not come back.
CREATE TABLE webhook_log_migration_live AS
    SELECT NULL::date AS day, "timestamp" FROM webhook_log_new WITH NO DATA;
ALTER TABLE webhook_log_migration_live ADD PRIMARY KEY (day);

COMMENT ON TABLE webhook_log_migration_live IS
    'chronos: how far the copy of the days has come that take new rows; finalize and rollback remove it';

-- SECURITY DEFINER: whoever may write webhook_log need not be allowed to write this table.
CREATE OR REPLACE FUNCTION webhook_log_note_change()
RETURNS trigger
LANGUAGE plpgsql
SECURITY DEFINER
SET search_path FROM CURRENT
AS $$
BEGIN
    IF TG_OP <> 'INSERT' THEN
        INSERT INTO webhook_log_migration_changes VALUES (OLD.id, OLD."timestamp");
    END IF;
    IF TG_OP <> 'DELETE' THEN
        INSERT INTO webhook_log_migration_changes VALUES (NEW.id, NEW."timestamp");
    END IF;
    RETURN NULL;
END
$$;

-- Calling a trigger function takes no privilege, being able to attach it to a table of one's own does.
REVOKE ALL ON FUNCTION webhook_log_note_change() FROM PUBLIC;

-- Which ids are noted: none while the table is built; up to the fence after the swap; all of them while
-- a rollback is under way. Replacing this function takes a millisecond under the lock of the swap, making
-- the triggers of all partitions would take ten. The server writes its body into the triggers' conditions.
CREATE OR REPLACE FUNCTION webhook_log_is_noted(id bigint)
RETURNS boolean
LANGUAGE sql
IMMUTABLE
PARALLEL SAFE
RETURN false;

CREATE TRIGGER webhook_log_note_insert AFTER INSERT ON webhook_log_new FOR EACH ROW
    WHEN (webhook_log_is_noted(NEW.id) AND current_setting('chronos.copying', true) IS DISTINCT FROM 'on')
    EXECUTE FUNCTION webhook_log_note_change();

CREATE TRIGGER webhook_log_note_update AFTER UPDATE ON webhook_log_new FOR EACH ROW
    WHEN ((webhook_log_is_noted(OLD.id) OR webhook_log_is_noted(NEW.id))
          AND current_setting('chronos.copying', true) IS DISTINCT FROM 'on')
    EXECUTE FUNCTION webhook_log_note_change();

CREATE TRIGGER webhook_log_note_delete AFTER DELETE ON webhook_log_new FOR EACH ROW
    WHEN (webhook_log_is_noted(OLD.id) AND current_setting('chronos.copying', true) IS DISTINCT FROM 'on')
    EXECUTE FUNCTION webhook_log_note_change();
