"""chronos never runs a function or operator that another role has created in schema public."""

from __future__ import annotations

import pytest
from psycopg2 import errors
from pydantic import SecretStr
from sqlalchemy.engine import make_url

from chronos.health import collect
from chronos.jobs import JOBS, Message, attempt
from chronos.settings import Settings
from tests.command import chronos
from tests.live import load
from tests.tables import query

# Exact copies of the built-ins are found if public comes first on the search path; the others are found
# wherever public is on it, as they match better than the built-ins. Functions that take or return a
# pseudo-type cannot be copied in plpgsql, or not by every role.
_LOOK_ALIKES = """
CREATE FUNCTION public.spring(what text) RETURNS void LANGUAGE plpgsql AS
    $$ BEGIN RAISE EXCEPTION 'a stranger''s % was called', what; END $$;

DO $do$
DECLARE
    f record;
    body text;
    kept CONSTANT oid[] := ARRAY['int2', 'int4', 'int8', 'oid', 'xid', 'xid8', 'tid', 'numeric', 'float8',
        'text', 'varchar', 'name', 'timestamptz', 'timestamp', 'date', 'interval', 'bool', 'uuid', 'regclass',
        'regproc', 'text[]', 'name[]', 'int4[]', 'int8[]', 'oid[]', 'anyarray', 'anyelement', 'jsonb',
        'int2vector', '"char"', 'pg_lsn', 'tstzrange', 'bytea']::regtype[]::oid[];
    simple CONSTANT oid[] := ARRAY['int4', 'int8', 'text', 'varchar', 'timestamptz', 'timestamp', 'date',
        'interval', 'uuid', 'numeric', 'name', 'tid', 'oid', 'jsonb', 'bool', 'regclass']::regtype[]::oid[];
BEGIN
    SET LOCAL search_path = pg_catalog;
    SET LOCAL client_min_messages = error;
    SET LOCAL check_function_bodies = off;
    FOR f IN
        SELECT p.proname, pg_get_function_result(p.oid) AS result,
               pg_get_function_identity_arguments(p.oid) AS arguments
        FROM pg_proc p
        WHERE p.pronamespace = 'pg_catalog'::regnamespace AND p.prokind = 'f' AND p.provariadic = 0
          AND p.proargtypes::oid[] <@ kept AND (p.prorettype = ANY (kept) OR p.prorettype = 'void'::regtype)
          AND p.proargmodes IS NULL AND pg_get_function_result(p.oid) NOT LIKE 'any%'
    LOOP
        body := format('BEGIN PERFORM public.spring(%L); RETURN NULL; END', f.proname);
        IF f.result = 'void' THEN body := format('BEGIN PERFORM public.spring(%L); END', f.proname); END IF;
        EXECUTE format('CREATE FUNCTION public.%I(%s) RETURNS %s LANGUAGE plpgsql AS %L',
                       f.proname, f.arguments, f.result, body);
    END LOOP;
    -- Aggregates are called like functions, and so are these, with any number of arguments.
    FOR f IN
        SELECT n, format_type(t, NULL) AS type
        FROM unnest(ARRAY['max', 'min', 'sum', 'count', 'bool_and', 'bool_or', 'array_agg', 'string_agg',
                          'concat', 'format', 'bit_xor', 'hash_record_extended', 'hashtext', 'lower',
                          'to_regclass', 'quote_ident', 'length', 'abs', 'now_is']) n,
             unnest(simple) t
        WHERE to_regprocedure(format('public.%I(%s)', n, format_type(t, NULL))) IS NULL
    LOOP
        EXECUTE format('CREATE FUNCTION public.%I(%s) RETURNS %s LANGUAGE plpgsql AS %L', f.n, f.type, f.type,
                       format('BEGIN PERFORM public.spring(%L); RETURN NULL; END', f.n));
    END LOOP;
    FOR f IN
        SELECT n, a FROM unnest(ARRAY['format', 'concat', 'concat_ws']) n,
                         unnest(ARRAY['text, text', 'text, text, text', 'text, text, text, text']) a
    LOOP
        EXECUTE format('CREATE FUNCTION public.%I(%s) RETURNS text LANGUAGE plpgsql AS %L', f.n, f.a,
                       format('BEGIN PERFORM public.spring(%L); RETURN NULL; END', f.n));
    END LOOP;
    FOR f IN
        SELECT DISTINCT o.oprname, l AS left_type, r AS right_type,
               coalesce((SELECT x.oprresult FROM pg_operator x
                         WHERE x.oprname = o.oprname AND x.oprleft = l AND x.oprright = r
                           AND x.oprnamespace = 'pg_catalog'::regnamespace),
                        CASE WHEN o.oprname IN ('+', '-', '*', '/', '||', '%', '->', '->>', '#>>') THEN l
                             ELSE 'bool'::regtype::oid END) AS result
        FROM pg_operator o, unnest(simple) l, unnest(simple) r
        WHERE o.oprnamespace = 'pg_catalog'::regnamespace AND o.oprkind = 'b' AND o.oprname <> '=>'
          AND o.oprname IN ('+', '-', '*', '/', '||', '%', '->', '->>', '=', '<>', '<', '>', '<=', '>=',
                            '~', '~*', '!~', '!~*', '~~', '!~~', '@>', '<@', '&&', '&', '|')
    LOOP
        body := format('BEGIN PERFORM public.spring(%L); RETURN NULL; END', 'operator ' || f.oprname);
        EXECUTE format('CREATE FUNCTION public.op_%s(%s, %s) RETURNS %s LANGUAGE plpgsql AS %L',
                       md5(f.oprname), f.left_type::regtype, f.right_type::regtype, f.result::regtype, body);
        EXECUTE format('CREATE OPERATOR public.%s (leftarg = %s, rightarg = %s, function = public.op_%s)',
                       f.oprname, f.left_type::regtype, f.right_type::regtype, md5(f.oprname));
    END LOOP;
END
$do$;

-- Nor may a view be taken for the jobs of pg_cron because of its name.
CREATE SCHEMA cron;
CREATE FUNCTION cron.spring() RETURNS text LANGUAGE plpgsql AS
    $$ BEGIN RAISE EXCEPTION 'a stranger''s view was read'; END $$;
CREATE VIEW cron.job AS SELECT 1::bigint AS jobid, cron.spring() AS command;
"""


# The application's own statements do not count; those that chronos triggers after them do.
_WRITES = """
SET search_path = pg_catalog, public;
WITH parent AS (INSERT INTO webhook_endpoint (url) VALUES ('https://example.com/new') RETURNING id)
INSERT INTO webhook_log ("timestamp", status, webhook_endpoint_id) SELECT now(), 'made', id FROM parent;
UPDATE webhook_log SET status = 'seen' WHERE status = 'made';
INSERT INTO webhook_log ("timestamp", status, webhook_endpoint_id) VALUES (now(), 'kept', 1);
DELETE FROM webhook_log WHERE webhook_endpoint_id = (SELECT max(id) FROM webhook_endpoint);
DELETE FROM webhook_endpoint WHERE id = (SELECT max(id) FROM webhook_endpoint);
"""


@pytest.fixture(params=["public, pg_catalog", '"$user", public'], ids=["public-first", "public-last"])
def guarded(request: pytest.FixtureRequest, database: str) -> str:
    """A database with a table, rows in it, and look-alikes of the built-in functions and operators."""
    load(database, 500)
    # A key type for which no built-in = matches as well as the look-alike.
    query(
        database,
        "ALTER TABLE webhook_log ALTER id TYPE varchar, ALTER id SET DEFAULT gen_random_uuid()::varchar;"
        "DROP SEQUENCE webhook_log_id_seq",
    )
    query(database, _LOOK_ALIKES)
    name = make_url(database).database
    query(database, f"ALTER DATABASE {name} SET search_path = {request.param}")
    with pytest.raises(errors.RaiseException, match="a stranger's operator / was called"):
        query(database, "SELECT interval '1 day' / 2")
    return database


def run(url: str, *arguments: str) -> None:
    result = chronos(url, *arguments)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("strategy", ["copy", "attach"])
def test_no_command_calls_another_roles_function_or_operator(
    guarded: str, redis_url: str, strategy: str
) -> None:
    for verb in ("--dry-run", "--hold"):
        run(guarded, "migrate", "--yes", "--strategy", strategy, verb)
        query(guarded, _WRITES)
    run(guarded, "migrate", "--yes", "--resume")
    query(guarded, _WRITES)
    run(guarded, "rollback", "--yes")
    [[kind]] = query(
        guarded, "SET search_path = pg_catalog; SELECT relkind FROM pg_class WHERE relname = 'webhook_log'"
    )
    assert kind == "r"
    run(guarded, "migrate", "--yes", "--strategy", strategy)
    query(guarded, _WRITES)
    for function, days in (("create_future", 40), ("drop_old", 15)):
        query(guarded, f"SELECT public.{function}_webhook_log_partitions({days})")
    settings = Settings(
        database_url=SecretStr(guarded), redis_url=SecretStr(redis_url), webhook_log_days_ahead=45
    )
    for job in JOBS:
        assert attempt(job, settings, Message("by hand"), None)["status"] == "done"
    run(guarded, "upgrade-functions")
    run(guarded, "finalize", "--yes")
    assert collect(settings).state == "finalized"
