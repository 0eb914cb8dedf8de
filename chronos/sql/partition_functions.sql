-- The functions that maintain partitions: a pair that does the work, shared by all tables of a schema, and for
-- each table a pair of one-line wrappers, callable by the owner of the table. For webhook_log:
--
--     SELECT create_future_webhook_log_partitions(30);   -- from now through 30 days ahead
--     SELECT drop_old_webhook_log_partitions(15);        -- everything older than 15 days
--
-- With grace_days the second detaches what is older, and drops it that many days later if it has still expired
-- then. The number is in the body of the wrapper, so no caller can forget it; a setting of the function would
-- need a superuser. The comment of a detached table says when it will be dropped. Only that comment makes it
-- ours, and only as long as nobody changes the comment or the table.
--
-- What both have in common. A day is a UTC day, whatever the time zone of the server and however much time a
-- partition holds. What exists is read from the catalog's bounds, never from names. Neither waits more than 200 ms
-- for a lock, so nobody queues behind it for longer; then it raises lock_not_available with nothing changed, and
-- you call it again. If two callers come at once, the second is refused the same way. Every name is written with
-- its schema, and only pg_catalog is on the search path: no operator or function elsewhere can be taken for the
-- server's own.
--
-- Whose code runs. All of it runs with the privileges of the owner of the table, so the owner of the shared pair
-- could make the owner of every table in the schema run anything. shared_functions_check.sql, which comes first,
-- says who that may be. The wrappers refer to the shared pair by OID, not by name (BEGIN ATOMIC): no other
-- function can take its place, and it cannot be dropped while a wrapper calls it.

-- An older version with another result or other argument names cannot be replaced in place. A function owned by a
-- role that cannot act as the owner is also dropped, and with it the grants that this role gave on it.
DO $chronos$
DECLARE
    older pg_catalog.oid;
BEGIN
    PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
    FOR older IN
        SELECT p.oid
        FROM pg_proc p
        WHERE p.pronamespace = (SELECT n.oid FROM pg_namespace n WHERE n.nspname = @'schema'@)
          AND p.proargtypes::text = 'integer'::regtype::oid::text
          AND ((p.proname = @'create_function'@ AND p.proargnames IS DISTINCT FROM ARRAY['days_ahead'])
            OR (p.proname = @'drop_function'@ AND p.proargnames IS DISTINCT FROM ARRAY['retention_days'])
            OR (p.proname IN (@'create_function'@, @'drop_function'@)
                AND (p.prokind <> 'f' OR pg_get_function_result(p.oid) <> 'SETOF text'
                     OR NOT pg_has_role(p.proowner, @'owner'@::name, 'MEMBER'))))
    LOOP
        EXECUTE format('DROP ROUTINE %s', older::regprocedure);
    END LOOP;
END
$chronos$;

-- The shared pair is created, or updated to this version, by a superuser or its owner. It is given to the owner of
-- the schema, who can replace anything in it anyway; else to the owner of the table. If the table belongs to a
-- superuser, so does the pair, and it stays with that superuser.
DO $install$
DECLARE
    home     CONSTANT oid := (SELECT n.nspowner FROM pg_namespace n WHERE n.nspname = @'schema'@);
    standing record;
    shared   text;
    state    regclass;
BEGIN
    SELECT coalesce(bool_and(pg_has_role(p.proowner, 'USAGE')), true) AS ours,
           coalesce(bool_and(pg_has_role(p.proowner, home, 'MEMBER') AND NOT o.rolsuper
                             OR pg_has_role(p.proowner, @'owner'@::name, 'MEMBER')), true) AS trusted,
           max(coalesce(substring(obj_description(p.oid, 'pg_proc') FROM '^chronos (\d+):'), '0')::integer) AS version,
           CASE WHEN max(o.rolsuper::integer) = 1 THEN @'owner'@
                WHEN min(s.rolsuper::integer) = 1 THEN min(s.rolname)::text
                WHEN pg_has_role(home, 'USAGE') THEN pg_get_userbyid(home)
                ELSE coalesce(min(s.rolname), @'owner'@)::text END AS owner
    INTO standing
    FROM pg_roles o
    LEFT JOIN pg_proc p ON p.oid IN (to_regprocedure(@'create_shared'@), to_regprocedure(@'drop_shared'@))
    LEFT JOIN pg_roles s ON s.oid = p.proowner
    WHERE o.rolname = @'owner'@;
    -- A pair of an untrusted owner is replaced, whatever version it claims to be.
    IF standing.ours AND (coalesce(standing.version, 0) <= @#version@ OR NOT standing.trusted) THEN
        EXECUTE $shared$

-- Creates the partitions that are missing from as_of through days_ahead days later, and returns their names.
CREATE OR REPLACE FUNCTION @schema@.chronos_create_partitions(
    schema_name text, table_name text, every text, days_ahead integer, as_of timestamptz
)
RETURNS SETOF text
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
SET lock_timeout = '200ms'
SET timezone = 'UTC'
SET datestyle = 'ISO'
SET standard_conforming_strings = on
AS $chronos$
DECLARE
    parent    CONSTANT regclass := to_regclass(format('%I.%I', schema_name, table_name));
    step      CONSTANT interval := CASE WHEN every IN ('hour', 'day', 'week', 'month')
                                        THEN format('1 %s', every)::interval END;
    lower     timestamp;      -- of a new partition, UTC; the upper one is exclusive
    upper     timestamp;
    first     timestamp;      -- where the current period begins
    last      timestamp;      -- where the days ahead end
    sibling   oid;            -- the newest partition: the new ones are built like it
    covered   tsmultirange;   -- the time that existing partitions cover
    leaf      text;
    shown     text;           -- the period of a new partition, for people
    qualified text;
    setting   text;
    privilege record;
    attach    text[] := '{}'; -- the statements that attach the new partitions
BEGIN
    -- With Citus one transaction can change several tables only if it visits their shards one after another.
    PERFORM set_config('citus.multi_shard_modify_mode', 'sequential', true)
    WHERE current_setting('citus.multi_shard_modify_mode', true) IS NOT NULL;
    IF days_ahead IS NULL OR days_ahead < 0 THEN
        RAISE EXCEPTION 'days_ahead must be 0 or more, not %', coalesce(days_ahead::text, 'NULL')
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
    IF days_ahead > 3650 THEN
        RAISE EXCEPTION 'days_ahead must be 3650 or less, not %', days_ahead
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
    IF step IS NULL THEN
        RAISE EXCEPTION 'a partition holds an hour, a day, a week or a month, not %', coalesce(every, 'NULL')
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
    IF parent IS NULL OR NOT EXISTS (SELECT FROM pg_partitioned_table WHERE partrelid = parent) THEN
        RAISE EXCEPTION '% is not a partitioned table; migrate it first', table_name
            USING ERRCODE = 'object_not_in_prerequisite_state';
    END IF;
    IF NOT pg_try_advisory_xact_lock(hashtextextended(table_name || ' partitions', parent::oid::bigint)) THEN
        RAISE EXCEPTION 'another session is creating or dropping partitions of %; call again later', table_name
            USING ERRCODE = 'lock_not_available';
    END IF;

    SELECT range_agg(tsrange(p.lower_bound, p.upper_bound)),
           (array_agg(p.relid ORDER BY p.lower_bound DESC NULLS LAST) FILTER (WHERE p.relkind = 'r'))[1]
    INTO covered, sibling
    FROM (SELECT c.oid AS relid,
                 c.relkind,
                 CASE WHEN bound[1] <> 'MINVALUE' THEN trim('''' FROM bound[1])::timestamp END AS lower_bound,
                 CASE WHEN bound[2] <> 'MAXVALUE' THEN trim('''' FROM bound[2])::timestamp END AS upper_bound
          FROM pg_inherits i
          JOIN pg_class c ON c.oid = i.inhrelid
          CROSS JOIN LATERAL regexp_match(
              pg_get_expr(c.relpartbound, '0'::oid), '^FOR VALUES FROM \((.+)\) TO \((.+)\)$') AS bound
          WHERE i.inhparent = parent AND NOT i.inhdetachpending
            AND bound IS NOT NULL) p;  -- the default partition has no bounds

    first := date_trunc(every, as_of AT TIME ZONE 'UTC');
    last := date_trunc('day', as_of AT TIME ZONE 'UTC') + (days_ahead + 1) * interval '1 day';
    FOR lower, upper IN
        SELECT l, l + step
        FROM generate_series(first, last - interval '1 microsecond', step) l
        WHERE NOT coalesce(covered @> tsrange(l, l + step), false)
        ORDER BY l
    LOOP
        leaf := table_name || to_char(lower, CASE every WHEN 'hour' THEN '"_y"YYYY"m"MM"d"DD"h"HH24'
                                                     WHEN 'week' THEN '"_y"IYYY"w"IW'
                                                     WHEN 'month' THEN '"_y"YYYY"m"MM'
                                                     ELSE '"_y"YYYY"m"MM"d"DD' END);
        shown := to_char(lower, CASE every WHEN 'hour' THEN 'YYYY-MM-DD HH24:MI' ELSE 'YYYY-MM-DD' END);
        qualified := format('%I.%I', schema_name, leaf);
        IF to_regclass(qualified) IS NOT NULL THEN
            IF EXISTS (SELECT FROM pg_inherits
                       WHERE inhrelid = to_regclass(qualified) AND inhparent = parent AND inhdetachpending) THEN
                RAISE EXCEPTION 'cannot create the partition of %: % was detached half-way; finish that first', shown, leaf
                    USING ERRCODE = 'duplicate_table',
                          HINT = format('ALTER TABLE %s DETACH PARTITION %s FINALIZE;', parent, qualified);
            END IF;
            RAISE EXCEPTION 'cannot create the partition of %: the name % is taken by something that is not that partition', shown, leaf
                USING ERRCODE = 'duplicate_table',
                      HINT = format('Rename or drop %s, then call again. No partition was created.', qualified);
        END IF;

        -- Created on its own and attached afterwards: SHARE UPDATE EXCLUSIVE on the parent lets reads and
        -- writes go on, where PARTITION OF would block them.
        EXECUTE format('CREATE TABLE %s (LIKE %s INCLUDING ALL EXCLUDING IDENTITY) TABLESPACE %I', qualified, parent,
                       (SELECT s.spcname
                        FROM pg_tablespace s
                        LEFT JOIN pg_class c ON c.oid = sibling
                        LEFT JOIN pg_database d ON d.datname = current_database()
                        WHERE s.oid = coalesce(nullif(c.reltablespace, 0), d.dattablespace)));
        EXECUTE format('ALTER TABLE %s OWNER TO %I', qualified,
                       (SELECT pg_get_userbyid(relowner) FROM pg_class WHERE oid = parent));

        FOR setting IN
            SELECT format('%I = %L', o.option_name, o.option_value)
            FROM pg_class c, pg_options_to_table(c.reloptions) o WHERE c.oid = sibling
            UNION ALL
            SELECT format('toast.%I = %L', o.option_name, o.option_value)
            FROM pg_class c JOIN pg_class t ON t.oid = c.reltoastrelid,
                 pg_options_to_table(t.reloptions) o WHERE c.oid = sibling
        LOOP
            EXECUTE format('ALTER TABLE %s SET (%s)', qualified, setting);
        END LOOP;
        IF (SELECT relreplident FROM pg_class WHERE oid = sibling) IN ('f', 'n') THEN
            EXECUTE format('ALTER TABLE %s REPLICA IDENTITY %s', qualified,
                           (SELECT CASE relreplident WHEN 'f' THEN 'FULL' ELSE 'NOTHING' END
                            FROM pg_class WHERE oid = sibling));
        END IF;
        -- LIKE copies neither of these. (Servers keep other things among the options, too.)
        FOR setting IN
            SELECT format('ALTER COLUMN %I SET STATISTICS %s', a.attname, a.attstattarget)
            FROM pg_attribute a
            WHERE a.attrelid = sibling AND a.attnum > 0 AND NOT a.attisdropped AND a.attstattarget >= 0
            UNION ALL
            SELECT format('ALTER COLUMN %I SET (%I = %L)', a.attname, o.option_name, o.option_value)
            FROM pg_attribute a, pg_options_to_table(a.attoptions) o
            WHERE a.attrelid = sibling AND a.attnum > 0 AND NOT a.attisdropped
              AND o.option_name IN ('n_distinct', 'n_distinct_inherited')
        LOOP
            EXECUTE format('ALTER TABLE %s %s', qualified, setting);
        END LOOP;
        -- Not the caller's default privileges, but those of the other partitions.
        FOR setting IN
            SELECT DISTINCT CASE x.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(x.grantee)) END
            FROM pg_class c, aclexplode(c.relacl) x
            WHERE c.oid = to_regclass(qualified) AND x.grantee <> c.relowner
        LOOP
            EXECUTE format('REVOKE ALL ON %s FROM %s', qualified, setting);
        END LOOP;
        FOR privilege IN
            SELECT x.privilege_type, x.is_grantable,
                   CASE x.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(x.grantee)) END AS grantee
            FROM pg_class c, aclexplode(c.relacl) x
            WHERE c.oid = sibling AND x.grantee <> c.relowner
        LOOP
            EXECUTE format('GRANT %s ON %s TO %s%s', privilege.privilege_type, qualified, privilege.grantee,
                           CASE WHEN privilege.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END);
        END LOOP;

        attach := attach || format('ALTER TABLE %s ATTACH PARTITION %s FOR VALUES FROM (%L) TO (%L)',
                                   parent, qualified, lower || '+00', upper || '+00');
        RETURN NEXT leaf;
    END LOOP;

    -- Last, because each blocks writes to the tables that foreign keys refer to until the end.
    FOREACH setting IN ARRAY attach LOOP
        EXECUTE setting;
    END LOOP;
END
$chronos$;

-- Drops the partitions that end before the day that is retention_days before as_of, and returns their names.
-- With grace_days, which the wrapper passes, it detaches these, and drops the ones that it detached that many
-- days ago. A plain DETACH, as the partition is already locked, and it commits together with the comment that says
-- when the table will be dropped. CONCURRENTLY would wait for every older transaction, cannot run in a function,
-- refuses a default partition, and leaves a half-detached one when interrupted.
CREATE OR REPLACE FUNCTION @schema@.chronos_drop_partitions(
    schema_name text, table_name text, retention_days integer, as_of timestamptz, grace_days integer DEFAULT 0
)
RETURNS SETOF text
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
SET lock_timeout = '200ms'
SET timezone = 'UTC'
SET datestyle = 'ISO'
SET standard_conforming_strings = on
AS $chronos$
DECLARE
    -- Every lock is held to the end of the call: a month at a time keeps waits short and the server's lock
    -- table far from full. The rest is dropped by the next call.
    most      CONSTANT integer := 31;
    parent    CONSTANT regclass := to_regclass(format('%I.%I', schema_name, table_name));
    today     CONSTANT date := (as_of AT TIME ZONE 'UTC')::date;
    mark      CONSTANT text := format('chronos: detached from %I.%I, to be dropped on ', schema_name, table_name);
    citus     CONSTANT boolean := to_regclass('pg_catalog.pg_dist_partition') IS NOT NULL;
    snapshot  CONSTANT boolean := current_setting('transaction_isolation') IN ('repeatable read', 'serializable');
    state     regclass;         -- the table that says how far a migration has come, if there is one
    migration record;
    leaf      record;
    key       name;             -- a foreign key of a detached table
    wait      text := '';       -- NOWAIT once a partition has used up the whole lock_timeout
    doomed    text[] := '{}';   -- locked, qualified and quoted
    contended text[] := '{}';   -- these are in use
    needed    text[] := '{}';   -- other objects depend on these
    done      boolean := false; -- something was dropped or detached
    detail    text;
BEGIN
    PERFORM set_config('citus.multi_shard_modify_mode', 'sequential', true)  -- as above
    WHERE current_setting('citus.multi_shard_modify_mode', true) IS NOT NULL;
    IF retention_days IS NULL OR retention_days < 0 THEN
        RAISE EXCEPTION 'retention_days must be 0 or more, not %', coalesce(retention_days::text, 'NULL')
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
    IF parent IS NULL OR NOT EXISTS (SELECT FROM pg_partitioned_table WHERE partrelid = parent) THEN
        RAISE EXCEPTION '% is not a partitioned table; migrate it first', table_name
            USING ERRCODE = 'object_not_in_prerequisite_state';
    END IF;
    IF NOT pg_try_advisory_xact_lock(hashtextextended(table_name || ' partitions', parent::oid::bigint)) THEN
        RAISE EXCEPTION 'another session is creating or dropping partitions of %; call again later', table_name
            USING ERRCODE = 'lock_not_available';
    END IF;

    -- While this is held nobody attaches or detaches a partition; reads and writes go on.
    EXECUTE format('LOCK TABLE ONLY %I.%I IN SHARE UPDATE EXCLUSIVE MODE', schema_name, table_name);
    IF to_regclass(format('%I.%I', schema_name, table_name)) IS DISTINCT FROM parent THEN
        RAISE EXCEPTION '% was swapped while this call waited for its lock; call again later', table_name
            USING ERRCODE = 'lock_not_available';
    END IF;

    -- A way back begins under a lock that conflicts with the one above, so the phase read here holds to the end
    -- of the call. Somebody else's object of this name is neither ours nor safe to read: a view or a policy could
    -- call anything, with the privileges of the caller of this function.
    SELECT s.oid INTO state
    FROM pg_class s JOIN pg_class t ON t.oid = parent
    WHERE s.oid = to_regclass(format('%I.%I', schema_name, table_name || '_migration'))
      AND s.relkind = 'r' AND pg_has_role(s.relowner, t.relowner, 'MEMBER')
      AND (SELECT count(*) FROM pg_attribute a
           WHERE a.attrelid = s.oid AND a.attname IN ('phase', 'verified')) = 2;
    IF state IS NOT NULL THEN
        IF snapshot THEN
            RAISE EXCEPTION 'the migration of % is not finished: until then partitions are dropped only in READ '
                'COMMITTED transactions', table_name
                USING ERRCODE = 'invalid_transaction_state';
        END IF;
        BEGIN
            EXECUTE format('SELECT phase, verified FROM %I.%I', schema_name, table_name || '_migration')
            INTO migration;
            IF migration.phase = 'returning' THEN
                RAISE NOTICE '% is on its way back to the plain table; no partition was dropped', table_name;
                RETURN;
            ELSIF migration.phase = 'migrated' AND NOT migration.verified THEN
                RAISE NOTICE 'rows written to % shortly before the swap are not compared yet; no partition was '
                    'dropped', table_name;
                RETURN;
            END IF;
        EXCEPTION WHEN undefined_table THEN
            NULL;  -- the migration was finalized just now
        END;
    END IF;

    -- Citus locks the parent on every node when one of its partitions is locked. So the parent comes first there,
    -- and we wait for no partition while everybody waits for us, nor does a node wait longer for a shard.
    IF citus THEN
        wait := 'NOWAIT';
        PERFORM set_config('citus.propagate_set_commands', 'local', true);
        SET LOCAL lock_timeout = '200ms';
        EXECUTE format('LOCK TABLE ONLY %I.%I IN ACCESS EXCLUSIVE MODE', schema_name, table_name);
    END IF;

    -- Expired: the upper bound, which is exclusive, is not after the start of the oldest day to keep.
    -- The partition that reaches furthest into the future always stays: a table without any rejects every insert.
    -- A detached table is due on the day in its comment, if it has expired by then. It is still ours as long as
    -- the table and its comment were last changed by the same (sub)transaction, the one that detached it: attach it
    -- again, or change either, and it stays. An old snapshot cannot show that. A dump restored in one transaction
    -- also changes both together, but creates another table than the one that the comment names; ALTER TABLE ...
    -- INHERIT changes neither.
    -- Partitions that a view needs come last: they must not use up the places of others in every call.
    FOR leaf IN
        SELECT p.relid, p.name, p.qualified, NULL::xid AS detached_by, p.upper_bound, p.viewed
        FROM (SELECT c.oid AS relid,
                     c.relname::text AS name,
                     c.oid::regclass::text AS qualified,
                     c.relkind,
                     b.upper_bound,
                     EXISTS (SELECT FROM pg_depend v
                             WHERE v.refclassid = 'pg_class'::regclass AND v.refobjid = c.oid
                               AND v.classid = 'pg_rewrite'::regclass) AS viewed,
                     row_number() OVER (ORDER BY b.upper_bound DESC) AS from_newest
              FROM pg_inherits i
              JOIN pg_class c ON c.oid = i.inhrelid
              CROSS JOIN LATERAL regexp_match(pg_get_expr(c.relpartbound, '0'::oid), ' TO \((.+)\)$') AS bound
              CROSS JOIN LATERAL (
                  SELECT CASE bound[1] WHEN 'MAXVALUE' THEN 'infinity'
                                       ELSE trim('''' FROM bound[1])::timestamp END AS upper_bound) b
              WHERE i.inhparent = parent AND NOT i.inhdetachpending
                AND bound IS NOT NULL) p  -- the default partition has no bounds
        WHERE p.upper_bound <= today - retention_days AND p.from_newest > 1 AND p.relkind IN ('r', 'p')
        UNION ALL
        SELECT c.oid, c.relname::text, c.oid::regclass::text, c.xmin, '-infinity',
               EXISTS (SELECT FROM pg_depend v
                       WHERE v.refclassid = 'pg_class'::regclass AND v.refobjid = c.oid
                         AND v.classid = 'pg_rewrite'::regclass)
        FROM pg_description d
        JOIN pg_class c ON c.oid = d.objoid AND c.xmin = d.xmin
        JOIN pg_class t ON t.oid = parent
        CROSS JOIN LATERAL regexp_match(
            substr(d.description, length(mark) + 1),
            '^(\d{4}-\d\d-\d\d) with all before (\d{4}-\d\d-\d\d [\d:.]+) UTC \(table (\d+)\);') AS told
        WHERE d.classoid = 'pg_class'::regclass AND d.objsubid = 0 AND starts_with(d.description, mark)
          AND told[1] COLLATE "C" <= today::text
          AND told[2] COLLATE "C" <= to_char(today - retention_days, 'YYYY-MM-DD 00:00:00')
          AND told[3] = c.oid::text
          AND NOT EXISTS (SELECT FROM pg_inherits i WHERE i.inhrelid = c.oid)
          AND c.relkind IN ('r', 'p') AND NOT c.relispartition
          AND pg_has_role(c.relowner, t.relowner, 'MEMBER') AND NOT snapshot
        ORDER BY viewed, upper_bound, name
    LOOP
        IF cardinality(doomed) = most THEN
            RAISE NOTICE 'more partitions have expired than one call drops (%); call again', most;
            EXIT;
        END IF;
        -- The partition before its parent: we wait for its readers while everybody else goes on, and the lock
        -- that blocks everybody is taken last and for the shortest time.
        BEGIN
            EXECUTE format('LOCK TABLE %s IN ACCESS EXCLUSIVE MODE %s', leaf.qualified, wait);
        EXCEPTION WHEN lock_not_available OR deadlock_detected THEN
            wait := 'NOWAIT';
            contended := contended || leaf.name;
            CONTINUE;
        WHEN insufficient_privilege THEN
            needed := needed || (
                SELECT format('%s belongs to %I: ALTER TABLE %s OWNER TO %I', leaf.name,
                              pg_get_userbyid(c.relowner), leaf.qualified, pg_get_userbyid(t.relowner))
                FROM pg_class c, pg_class t WHERE c.oid = leaf.relid AND t.oid = parent);
            CONTINUE;
        END;
        -- The session that we waited for may have renamed it and given its name to another table.
        CONTINUE WHEN to_regclass(leaf.qualified) IS DISTINCT FROM leaf.relid;
        IF leaf.detached_by IS NULL OR EXISTS (
            SELECT FROM pg_description d JOIN pg_class c ON c.oid = d.objoid AND c.xmin = d.xmin
            WHERE c.oid = leaf.relid AND d.classoid = 'pg_class'::regclass AND d.objsubid = 0
              AND c.xmin = leaf.detached_by
              AND NOT EXISTS (SELECT FROM pg_inherits i WHERE i.inhrelid = c.oid)) THEN
            doomed := doomed || leaf.qualified;
        END IF;
    END LOOP;

    IF EXISTS (SELECT FROM pg_class WHERE oid = ANY (doomed::regclass[]) AND relispartition) THEN
        EXECUTE format('LOCK TABLE ONLY %I.%I IN ACCESS EXCLUSIVE MODE', schema_name, table_name);
    END IF;
    FOR leaf IN
        SELECT d.qualified, c.oid AS relid, c.relname::text AS name, c.relispartition AND grace_days > 0 AS waits,
               trim('''' FROM substring(pg_get_expr(c.relpartbound, '0'::oid) FROM ' TO \((.+)\)$'))::timestamp
                   AS upper_bound
        FROM unnest(doomed) WITH ORDINALITY d(qualified, nr) JOIN pg_class c ON c.oid = d.qualified::regclass
        ORDER BY d.nr
    LOOP
        BEGIN
            IF leaf.waits THEN
                EXECUTE format('ALTER TABLE %I.%I DETACH PARTITION %s', schema_name, table_name, leaf.qualified);
                -- They would keep the rows that they refer to from being deleted. ATTACH restores them.
                -- Citus cannot drop them, as it looks for other names on the shards.
                FOR key IN SELECT conname FROM pg_constraint
                           WHERE conrelid = leaf.relid AND contype = 'f' AND NOT citus LOOP
                    EXECUTE format('ALTER TABLE %s DROP CONSTRAINT %I', leaf.qualified, key);
                END LOOP;
                EXECUTE format('COMMENT ON TABLE %s IS %L', leaf.qualified,
                               format('%s%s with all before %s UTC (table %s); to keep it, change this comment',
                                      mark, today + grace_days, leaf.upper_bound, leaf.relid));
                RAISE NOTICE '% is detached, and will be dropped on %', leaf.name, today + grace_days;
            ELSE
                EXECUTE 'DROP TABLE ' || leaf.qualified;
                RETURN NEXT leaf.name;
            END IF;
            done := true;
        EXCEPTION WHEN dependent_objects_still_exist OR foreign_key_violation OR insufficient_privilege THEN
            GET STACKED DIAGNOSTICS detail = PG_EXCEPTION_DETAIL;
            needed := needed || replace(coalesce(nullif(detail, ''), SQLERRM), E'\n', '; ');
        END;
    END LOOP;

    -- An error would undo the drops, so raise one only if there were none.
    IF contended <> '{}' AND NOT done THEN
        RAISE EXCEPTION 'cannot drop expired partitions, they are in use: %', array_to_string(contended, ', ')
            USING ERRCODE = 'lock_not_available', HINT = 'Nothing was dropped; call again later.';
    ELSIF contended <> '{}' THEN
        RAISE WARNING 'these expired partitions are in use and stay until the next call: %',
            array_to_string(contended, ', ');
    END IF;
    IF needed <> '{}' AND NOT done THEN
        RAISE EXCEPTION 'cannot drop expired partitions: %', array_to_string(needed, '; ')
            USING ERRCODE = 'dependent_objects_still_exist',
                  HINT = 'Nothing was dropped; drop what depends on them, then call again.';
    ELSIF needed <> '{}' THEN
        RAISE WARNING 'cannot drop these expired partitions: %', array_to_string(needed, '; ');
    END IF;
END
$chronos$;

-- The owner of each table calls these through its wrappers. They give nobody additional privileges.
GRANT EXECUTE ON FUNCTION @#create_shared@, @#drop_shared@ TO PUBLIC;

COMMENT ON FUNCTION @#create_shared@ IS
    'chronos @#version@: creates the partitions of a table that are missing from as_of (UTC) through days_ahead '
    'days later, one per hour, day, week or month; create_future_..._partitions of the table calls it';
COMMENT ON FUNCTION @#drop_shared@ IS
    'chronos @#version@: drops the partitions of a table that end before the day that is retention_days before '
    'as_of (UTC), or detaches them now and drops them grace_days days later; drop_old_..._partitions of '
    'the table calls it';

        $shared$;
        FOREACH shared IN ARRAY ARRAY[@'create_shared'@, @'drop_shared'@] LOOP
            EXECUTE format('ALTER FUNCTION %s OWNER TO %I', shared, standing.owner);
        END LOOP;
    END IF;

    -- The drop function reads the state of the migration, which may belong to the operator.
    SELECT c.oid INTO state
    FROM pg_class c
    WHERE c.oid = to_regclass(format('%I.%I', @'schema'@, @'state'@)) AND c.relkind = 'r'
      AND pg_has_role(c.relowner, 'USAGE') AND pg_get_userbyid(c.relowner) <> @'owner'@;
    IF state IS NOT NULL THEN
        EXECUTE format('GRANT SELECT ON %s TO %I', state, @'owner'@);
    END IF;
END
$install$;

-- The wrappers of this table. They run with the privileges of its owner, whoever calls: a role for the nightly
-- upkeep alone needs EXECUTE on both and USAGE on the schema. All that it can choose is a number of days.
CREATE OR REPLACE FUNCTION @schema@.@create_function@(days_ahead integer)
RETURNS SETOF text
LANGUAGE sql
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT @schema@.chronos_create_partitions(
        @'schema'@::text, @'table'@::text, '@#every@'::text, days_ahead, pg_catalog.now());
END;

CREATE OR REPLACE FUNCTION @schema@.@drop_function@(retention_days integer)
RETURNS SETOF text
LANGUAGE sql
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT @schema@.chronos_drop_partitions(
        @'schema'@::text, @'table'@::text, retention_days, pg_catalog.now(), grace_days => @#grace_days@);
END;

REVOKE ALL ON FUNCTION @schema@.@create_function@(integer) FROM PUBLIC;
REVOKE ALL ON FUNCTION @schema@.@drop_function@(integer) FROM PUBLIC;

COMMENT ON FUNCTION @schema@.@create_function@(integer) IS
    'chronos @#version@: creates the partitions (one per @#every@) that are missing from now (UTC) through days_ahead '
    'days from now, gaps included; returns their names. SHARE UPDATE EXCLUSIVE on the table: reads and writes go '
    'on. Raises lock_not_available after 200 ms without a lock, having changed nothing.';
COMMENT ON FUNCTION @schema@.@drop_function@(integer) IS
    'chronos @#version@: drops the partitions that end before the day that is retention_days old (UTC), at most 31 '
    'per call, never the newest, and none while a migration is being rolled back or not fully compared; '
    'returns their names. With grace_days (here @#grace_days@; 0: none) it detaches them now, and drops them that many '
    'days later. ACCESS EXCLUSIVE on the table for milliseconds. Raises lock_not_available after 200 ms'
    ' without a lock, having changed nothing.';
