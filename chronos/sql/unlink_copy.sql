-- While the table that is not in use has foreign keys (@#linked@), a row that is deleted, or gets another key or
-- another reference, must not be left in it until its note is replayed: it would keep the application from
-- deleting what the row has referred to. So its copy goes first, before the row itself, for what the application
-- has in its own triggers and WITH queries may count on it. A note is taken as well: whatever becomes of the row.
--
-- Nothing happens while there is no such table, or somebody has dropped it.
CREATE OR REPLACE FUNCTION @unlink_function@()
RETURNS trigger
LANGUAGE plpgsql
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    @#unlink@
    RETURN CASE TG_OP WHEN 'DELETE' THEN OLD ELSE NEW END;
END
$$;
