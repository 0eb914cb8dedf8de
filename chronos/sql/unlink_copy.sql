-- While the table not in use has foreign keys (@#linked@), the copy of a row that is deleted, or that gets another
-- key or reference, must not stay there until its note is replayed: it would keep the application from deleting
-- what the row referred to. So the copy is deleted first, before the row itself, as the application's own triggers
-- and WITH queries may rely on that. A note is taken too, whatever happens to the row.
--
-- Nothing happens while there is no such table, or once somebody has dropped it.
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
