-- What the note triggers call: it writes down the key of each row that is written, and, while the table that
-- is not in use has foreign keys (@#linked@), takes the copy of a row that loses its counterpart out of that
-- table. Left there, the copy would keep the application from deleting what the row has referred to.
--
-- SECURITY DEFINER: a role that may write the table need not be allowed to write its notes.
CREATE OR REPLACE FUNCTION @note_function@()
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
    -- What a foreign key does to the table that has gone out of use, or this function itself, nobody has written.
    IF TG_TABLE_NAME = @'old'@ AND pg_trigger_depth() > 1 THEN
        RETURN NULL;
    END IF;
    IF TG_OP = 'DELETE' OR (TG_OP = 'UPDATE' AND record_image_ne(ROW(@#old_values@), ROW(@#new_values@))) THEN
        INSERT INTO @schema@.@changes@ (@#columns@, chronos_origin) VALUES (@#old_values@, TG_ARGV[0]::"char");
    END IF;
    IF TG_OP <> 'DELETE' THEN
        INSERT INTO @schema@.@changes@ (@#columns@, chronos_origin) VALUES (@#new_values@, TG_ARGV[0]::"char");
    END IF;
    @#unlink@
    RETURN NULL;
END
$$;
