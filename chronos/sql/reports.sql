-- What the nightly jobs did, for status and for people: a row for each run of a job with a table of this schema.
--
--     SELECT night, job, table_name, result, report FROM chronos_reports ORDER BY reported DESC;
--
-- It is made by the first run that may, beside the functions, and belongs to whom these belong: to the owner of
-- the schema where the current user can act as that role, else to the owner of the table. origin is the database
-- that the row was written in: one that a dump brought along does not count where it is restored.

-- Before the first expression: a function in the schema of the table may fit better than the server's own.
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
            'chronos: what the jobs did that create and drop partitions, for 35 days';
        REVOKE ALL ON @schema@.chronos_reports FROM PUBLIC;
        EXECUTE format('ALTER TABLE %s OWNER TO %I', reports,
                       CASE WHEN pg_has_role(home, 'USAGE')
                                 AND NOT (SELECT o.rolsuper FROM pg_roles o WHERE o.rolname = @'owner'@)
                            THEN pg_get_userbyid(home) ELSE @'owner'@ END);
    END IF;
    -- Whoever owns another table of the schema keeps its reports here as well.
    IF pg_has_role((SELECT c.relowner FROM pg_class c WHERE c.oid = to_regclass(reports)), 'USAGE')
       AND NOT has_table_privilege(@'owner'@, reports, 'SELECT')
    THEN
        EXECUTE format('GRANT SELECT, INSERT, UPDATE, DELETE ON %s TO %I', reports, @'owner'@);
    END IF;
END
$chronos$;
