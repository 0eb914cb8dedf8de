-- What the nightly jobs did, for status and for people: a row for each run of a job on a table of this schema.
--
--     SELECT night, job, table_name, result, report FROM chronos_reports ORDER BY reported DESC;
--
-- The first run that may create it does so, beside the functions, and it has the same owner as these: the owner
-- of the schema if the current user can act as that role, else the owner of the table. origin is the database in
-- which the row was written: rows from a dump do not count where it is restored.

-- Before the first expression: a function in the table's schema may be a better match than the server's own.
SET LOCAL search_path = pg_catalog, pg_temp;

DO $chronos$
DECLARE
    home    CONSTANT oid := (SELECT n.nspowner FROM pg_namespace n WHERE n.nspname = @'schema'@);
    reports CONSTANT text := format('%I.chronos_reports', @'schema'@);
BEGIN
    PERFORM pg_advisory_xact_lock(hashtextextended('chronos functions of ' || @'schema'@, 0));
    IF to_regclass(reports) IS NULL THEN
        CREATE TABLE @schema@.chronos_reports (
            job        text NOT NULL,
            table_name text NOT NULL,
            run        text NOT NULL,
            night      date NOT NULL,
            origin     text NOT NULL,
            writer     text NOT NULL,
            started    timestamptz NOT NULL,
            reported   timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
            result     text NOT NULL,
            report     jsonb NOT NULL,
            PRIMARY KEY (job, table_name, run)
        );
        COMMENT ON TABLE @schema@.chronos_reports IS
            'chronos: what the jobs that create and drop partitions did, kept for 35 days';
        REVOKE ALL ON @schema@.chronos_reports FROM PUBLIC;
        EXECUTE format('ALTER TABLE %s OWNER TO %I', reports,
                       CASE WHEN pg_has_role(home, 'USAGE')
                                 AND NOT (SELECT o.rolsuper FROM pg_roles o WHERE o.rolname = @'owner'@)
                            THEN pg_get_userbyid(home) ELSE @'owner'@ END);
    END IF;
    -- The owners of other tables in the schema keep their reports here too.
    IF pg_has_role((SELECT c.relowner FROM pg_class c WHERE c.oid = to_regclass(reports)), 'USAGE')
       AND NOT has_table_privilege(@'owner'@, reports, 'SELECT')
    THEN
        EXECUTE format('GRANT SELECT, INSERT, UPDATE, DELETE ON %s TO %I', reports, @'owner'@);
    END IF;
END
$chronos$;
