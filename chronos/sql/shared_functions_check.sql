-- Whose functions the wrappers of @#table@ may call: those of a role that the owner of the table must trust
-- anyway. That is a superuser, the owner of the schema (who can replace any function in it), the owner of the
-- table, or a role that can act as one of them. Any other role could make the owner of the table run anything. A
-- superuser trusts only superusers: otherwise a superuser's table would make the owner of its schema or database
-- a superuser. Raises insufficient_privilege when the pair belongs to another role, or is older and cannot be
-- replaced. Installations in one schema wait for each other until the transaction ends.
DO $chronos$
DECLARE
    standing record;
BEGIN
    PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
    PERFORM pg_advisory_xact_lock(hashtextextended('chronos functions of ' || @'schema'@, 0));
    SELECT string_agg(DISTINCT pg_get_userbyid(p.proowner), ' and ') AS owner,
           bool_and(pg_has_role(p.proowner, 'USAGE')) AS ours,
           bool_and(pg_has_role(n.nspowner, 'USAGE')) AS schema_is_ours,
           bool_and(pg_has_role(p.proowner, n.nspowner, 'MEMBER') AND NOT o.rolsuper
                    OR pg_has_role(p.proowner, @'owner'@::name, 'MEMBER')) AS trusted,
           min(coalesce(substring(obj_description(p.oid, 'pg_proc') FROM '^chronos (\d+):'), '0')::integer) AS version
    INTO standing
    FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace JOIN pg_roles o ON o.rolname = @'owner'@
    WHERE p.oid IN (to_regprocedure(@'create_shared'@), to_regprocedure(@'drop_shared'@));
    IF NOT standing.trusted AND NOT (standing.ours AND standing.schema_is_ours) THEN
        RAISE EXCEPTION 'the functions chronos_create_partitions and chronos_drop_partitions of schema % belong to %, '
            'who could make % run anything; let a superuser install them: python -m chronos upgrade-functions',
            @'schema'@, standing.owner, @'owner'@
            USING ERRCODE = 'insufficient_privilege';
    END IF;
    IF standing.version < @#version@ AND NOT standing.ours THEN
        RAISE EXCEPTION 'the functions chronos_create_partitions and chronos_drop_partitions of schema % are '
            'version % and belong to %; let that role or a superuser install version @#version@: '
            'python -m chronos upgrade-functions',
            @'schema'@, standing.version, standing.owner
            USING ERRCODE = 'insufficient_privilege';
    END IF;
END
$chronos$;
