"""A webhook_log with everything that a table can have and the migration carries over."""

from __future__ import annotations

from tests.tables import query

SCHEMA = "Hooks"
OWNER = "Chronos Owner"
ROLES = (OWNER, "Chronos Reader", "Chronos Passer-On", "chronos_auditor", "chronos_leak")

LONG_INDEX = "webhook_log_" + "é" * 25 + "z"  # 63 bytes

_ROLES = """
DO $$
DECLARE
    role text;
BEGIN
    FOREACH role IN ARRAY ARRAY[{roles}] LOOP
        IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = role) THEN
            EXECUTE format('CREATE ROLE %I', role);
        END IF;
    END LOOP;
END
$$;
"""

_TABLE = r"""
CREATE SCHEMA "Hooks" AUTHORIZATION "Chronos Owner";
GRANT USAGE ON SCHEMA "Hooks" TO PUBLIC;
SET search_path = "Hooks";
CREATE TYPE outcome AS ENUM ('ok', 'failed');
CREATE TABLE webhook_endpoint (id bigint PRIMARY KEY, url text);
CREATE TABLE audit (n bigserial PRIMARY KEY, what text);
INSERT INTO webhook_endpoint SELECT n, 'https://example/' || n FROM generate_series(1, 5) n;

CREATE TABLE webhook_log (
    gone text,
    id {identity},
    request_headers jsonb,
    request_body jsonb,
    response_headers jsonb,
    response_body jsonb,
    status text COLLATE "C" NOT NULL DEFAULT 'new',
    status_code integer DEFAULT 100 + 100,
    "timestamp" timestamptz DEFAULT now(),
    webhook_endpoint_id bigint,
    "Odd ""Name%" text,
    twice integer GENERATED ALWAYS AS (status_code * 2) STORED,
    result outcome NOT NULL DEFAULT 'ok',
    tags text[] NOT NULL DEFAULT '{{}}',
    CONSTRAINT "Sane Code" CHECK (status_code BETWEEN 0 AND 999),
    CONSTRAINT webhook_log_pkey PRIMARY KEY (id) WITH (fillfactor = 90)
) WITH (autovacuum_enabled = no, fillfactor = 80, autovacuum_vacuum_scale_factor = 0.05,
        toast.autovacuum_enabled = false);
ALTER TABLE webhook_log DROP COLUMN gone;
ALTER TABLE webhook_log
    ALTER COLUMN request_body SET STORAGE EXTERNAL,
    ALTER COLUMN response_body SET COMPRESSION pglz,
    ALTER COLUMN status SET STATISTICS 500,
    ALTER COLUMN webhook_endpoint_id SET (n_distinct = -0.05),
    ADD CONSTRAINT "late check" CHECK (status <> '') NOT VALID,
    ADD CONSTRAINT endpoint_fk FOREIGN KEY (webhook_endpoint_id) REFERENCES webhook_endpoint (id)
        ON UPDATE CASCADE ON DELETE SET NULL DEFERRABLE INITIALLY DEFERRED;

CREATE INDEX webhook_log_timestamp_idx ON webhook_log ("timestamp");
CREATE INDEX "Endpoint, by day" ON webhook_log (webhook_endpoint_id, "timestamp" DESC NULLS LAST)
    INCLUDE (status_code) WITH (fillfactor = 70);
CREATE INDEX failed_only ON webhook_log (status_code) WHERE status = 'failed';
CREATE INDEX by_host ON webhook_log (lower(request_headers ->> 'host') text_pattern_ops);
CREATE INDEX body_gin ON webhook_log USING gin (request_body jsonb_path_ops);
CREATE INDEX time_brin ON webhook_log USING brin ("timestamp") WITH (pages_per_range = 8);
CREATE INDEX "{long_index}" ON webhook_log (status, id);
CREATE UNIQUE INDEX "user" ON webhook_log ("timestamp", id, status);
ALTER TABLE webhook_log ADD CONSTRAINT uniquely UNIQUE (id, "timestamp", status_code) DEFERRABLE;

CREATE STATISTICS "Status Pair" (ndistinct, mcv) ON status, status_code FROM webhook_log;
CREATE STATISTICS by_length ON (length(status)) FROM webhook_log;
ALTER STATISTICS "Status Pair" SET STATISTICS 50;

CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $f$
BEGIN
    INSERT INTO "Hooks".audit (what) VALUES (TG_NAME || ' ' || TG_OP);
    RETURN coalesce(NEW, OLD);
END $f$;
CREATE TRIGGER on_write BEFORE INSERT OR UPDATE OF status, "Odd ""Name%" OR DELETE ON webhook_log
    FOR EACH ROW EXECUTE FUNCTION note('a', 'it''s');
CREATE TRIGGER "Always There" AFTER INSERT ON webhook_log
    FOR EACH ROW WHEN (NEW.status = 'failed' AND NEW.id <> 0) EXECUTE FUNCTION note();
CREATE TRIGGER "in Replica" AFTER INSERT ON webhook_log FOR EACH ROW EXECUTE FUNCTION note();
CREATE TRIGGER switched_off AFTER DELETE ON webhook_log FOR EACH ROW EXECUTE FUNCTION note();
CREATE CONSTRAINT TRIGGER at_commit AFTER INSERT ON webhook_log DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION note();
CREATE TRIGGER by_statement AFTER INSERT ON webhook_log REFERENCING NEW TABLE AS added
    FOR EACH STATEMENT EXECUTE FUNCTION note();
ALTER TABLE webhook_log ENABLE ALWAYS TRIGGER "Always There", ENABLE REPLICA TRIGGER "in Replica",
    DISABLE TRIGGER switched_off;

ALTER TABLE webhook_log ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
CREATE POLICY "see own" ON webhook_log FOR SELECT TO "Chronos Reader", chronos_auditor
    USING (webhook_endpoint_id IN (SELECT id FROM webhook_endpoint) AND status <> 'secret');
CREATE POLICY only_sane ON webhook_log AS RESTRICTIVE FOR INSERT WITH CHECK (status_code < 900);
CREATE RULE no_truncated AS ON UPDATE TO webhook_log WHERE NEW.status = 'never' DO INSTEAD NOTHING;
ALTER TABLE webhook_log REPLICA IDENTITY FULL;

CREATE TABLE inbox (status text, "timestamp" timestamptz);
CREATE RULE pass_on AS ON INSERT TO inbox DO ALSO
    INSERT INTO webhook_log (id, status, "timestamp") {overriding} VALUES (-1, NEW.status, NEW."timestamp");
ALTER TABLE inbox ENABLE ALWAYS RULE pass_on;
CREATE POLICY known ON audit USING (EXISTS (SELECT FROM webhook_log w WHERE w.status = what));

CREATE VIEW "Failed Log" WITH (security_barrier, security_invoker) AS
    SELECT id, status, "timestamp" FROM webhook_log WHERE status = 'failed' WITH LOCAL CHECK OPTION;
ALTER VIEW "Failed Log" ALTER COLUMN status SET DEFAULT 'failed';
CREATE VIEW above AS SELECT count(*) FROM "Failed Log";
CREATE VIEW joined AS SELECT w.id, e.url FROM webhook_log w LEFT JOIN webhook_endpoint e
    ON e.id = w.webhook_endpoint_id;
CREATE TRIGGER instead INSTEAD OF INSERT ON joined FOR EACH ROW EXECUTE FUNCTION note();
CREATE FUNCTION how_many() RETURNS bigint LANGUAGE sql STABLE
    BEGIN ATOMIC SELECT count(*) FROM webhook_log; END;

COMMENT ON TABLE webhook_log IS 'every delivery; it''s 100% there';
COMMENT ON COLUMN webhook_log.status IS 'how it went';
COMMENT ON CONSTRAINT webhook_log_pkey ON webhook_log IS 'the key';
COMMENT ON CONSTRAINT endpoint_fk ON webhook_log IS 'where it went';
COMMENT ON CONSTRAINT "Sane Code" ON webhook_log IS 'three digits';
COMMENT ON CONSTRAINT "late check" ON webhook_log IS 'an afterthought';
COMMENT ON CONSTRAINT uniquely ON webhook_log IS 'unique';
COMMENT ON INDEX webhook_log_pkey IS 'key index';
COMMENT ON INDEX body_gin IS 'for searching';
COMMENT ON TRIGGER on_write ON webhook_log IS 'notes';
COMMENT ON POLICY "see own" ON webhook_log IS 'their own';
COMMENT ON STATISTICS "Status Pair" IS 'they go together';
COMMENT ON RULE no_truncated ON webhook_log IS 'a rule';
COMMENT ON VIEW "Failed Log" IS 'what failed';
COMMENT ON COLUMN "Failed Log".status IS 'failed';

GRANT ALL ON webhook_endpoint, audit TO "Chronos Owner";
GRANT SELECT, INSERT ON webhook_log TO "Chronos Reader";
GRANT UPDATE (status, "Odd ""Name%"), SELECT (status) ON webhook_log TO chronos_auditor WITH GRANT OPTION;
GRANT SELECT ON webhook_log TO "Chronos Passer-On" WITH GRANT OPTION;
GRANT SELECT ON "Failed Log" TO PUBLIC;
ALTER TABLE webhook_log OWNER TO "Chronos Owner";
ALTER VIEW joined OWNER TO "Chronos Owner";
ALTER STATISTICS by_length OWNER TO "Chronos Owner";
REVOKE TRUNCATE ON webhook_log FROM "Chronos Owner";
SET ROLE "Chronos Passer-On";
GRANT SELECT ON webhook_log TO chronos_auditor;
RESET ROLE;
GRANT SELECT ON SEQUENCE webhook_log_id_seq TO "Chronos Reader";
COMMENT ON SEQUENCE webhook_log_id_seq IS 'counts';

CREATE PUBLICATION some_of_it FOR TABLE webhook_log (id, "timestamp", status, status_code)
    WHERE (status_code > 0) WITH (publish = 'insert', publish_via_partition_root);
CREATE PUBLICATION all_of_it FOR TABLE webhook_log WITH (publish = 'insert, truncate');
COMMENT ON PUBLICATION all_of_it IS 'all';

-- Default privileges must not end up on our tables.
ALTER DEFAULT PRIVILEGES GRANT ALL ON TABLES TO chronos_leak;
ALTER DEFAULT PRIVILEGES IN SCHEMA "Hooks" GRANT SELECT ON TABLES TO PUBLIC;
ALTER DEFAULT PRIVILEGES GRANT ALL ON SEQUENCES TO chronos_leak;
ALTER DEFAULT PRIVILEGES GRANT EXECUTE ON FUNCTIONS TO chronos_leak;
"""

_VIRTUAL = (
    'ALTER TABLE "Hooks".webhook_log ADD COLUMN tripled integer GENERATED ALWAYS AS (status_code * 3) VIRTUAL'
)

_ROWS = """
INSERT INTO "Hooks".webhook_log (request_headers, status, status_code, "timestamp", webhook_endpoint_id)
SELECT '{"host": "a"}', (ARRAY['ok', 'failed'])[1 + n % 2], n % 500, now() - n * interval '10 minutes',
       1 + n % 5
FROM generate_series(1, 2600) n;
"""


def forget(*urls: str) -> None:
    """Drop what the roles own, then the roles, which are shared by the whole server."""
    names = ", ".join(f'"{role}"' for role in ROLES)
    for url in urls:
        query(url, f"DROP OWNED BY {names} CASCADE")
    query(urls[0], f"DROP ROLE {names}")


def kitchen_sink(
    url: str, *, identity: str = "bigint GENERATED ALWAYS AS IDENTITY (START WITH 7 CACHE 2)"
) -> None:
    """Create the table, with rows of 18 days, in a schema that is on no search path."""
    query(url, _ROLES.format(roles=", ".join(f"'{role}'" for role in ROLES)))
    overriding = "OVERRIDING SYSTEM VALUE" if "IDENTITY" in identity else ""
    query(url, _TABLE.format(identity=identity, overriding=overriding, long_index=LONG_INDEX))
    [[version]] = query(url, "SELECT current_setting('server_version_num')::int")
    if version >= 180000:
        query(url, _VIRTUAL)
    query(url, _ROWS)
