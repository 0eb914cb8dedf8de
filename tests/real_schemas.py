"""Tables of open-source projects that grow without limit, each with a live application.

They follow the projects' own definitions: the columns, types, constraints and indexes are theirs.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

from chronos.table import Interval, TableSpec
from tests.live import Days, Make, Marks, Parent, Schema, any_bigint, any_uuid

_CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

# Readers and application stay within the retention of such a table.
HOURS = Days(loaded=3, counted=1.5, owned=1, ahead=0.5)
WEEKS = Days(loaded=80, counted=50, owned=40, ahead=2)
MONTHS = Days(loaded=200, counted=190, owned=150, ahead=2)


@dataclass(frozen=True)
class Real:
    """A table of ``project`` for chronos to partition: ``live`` is how its application knows it.

    ``refused`` are the ids of the checks that refuse it as it is, ``way_out`` the statements after which they
    pass. Without ``live`` the only way out is to change the application.
    """

    project: str
    spec: TableSpec
    ddl: str
    live: Schema | None = None
    refused: tuple[str, ...] = ()
    way_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.project} {self.spec.name}"


def one_of(*choices: Any) -> Make:
    return lambda chance: chance.choice(choices)


def number(least: int, most: int) -> Make:
    return lambda chance: chance.randint(least, most)


def real(chance: random.Random) -> float:
    return chance.uniform(-40, 40)


def word(chance: random.Random) -> str:
    return chance.randbytes(6).hex()


def long_text(chance: random.Random) -> str:
    return chance.randbytes(chance.choice((10, 10, 10, 3_000))).hex()


def blob(chance: random.Random) -> bytes:
    return chance.randbytes(chance.choice((8, 8, 2_500)))


def document(chance: random.Random) -> dict[str, Any]:
    return {"name": word(chance), "nested": {"n": chance.randint(0, 99), "list": [1, None, "é"]}}


def words(chance: random.Random) -> list[str]:
    return [chance.choice(("a", "b, c", 'd"e', "")) for _ in range(chance.randint(0, 3))]


def maybe(make: Make) -> Make:
    return lambda chance: make(chance) if chance.random() < 0.7 else None


def an_hour(chance: random.Random) -> datetime:
    return datetime(2026, 1, 1, chance.randint(0, 23), tzinfo=UTC)


def any_integer(chance: random.Random) -> int:
    """As `any_bigint`, for four bytes."""
    return chance.randrange(10**9, 2**31)


def ulid(chance: random.Random) -> str:
    return "01" + "".join(chance.choices(_CROCKFORD, k=24))


def ksuid(prefix: str) -> Make:
    return lambda chance: prefix + "".join(chance.choices(_BASE62, k=27))


# River, a job queue in Go: an enum, arrays, checks, GIN indexes, and a unique key for some states.
RIVER = Real(
    "River",
    TableSpec("river_job", "created_at", retention_days=15),
    """
    CREATE TYPE river_job_state AS ENUM ('available', 'cancelled', 'completed', 'discarded', 'pending',
                                         'retryable', 'running', 'scheduled');
    CREATE FUNCTION river_job_state_in_bitmask(bitmask bit(8), state river_job_state) RETURNS boolean
    LANGUAGE sql IMMUTABLE AS $$
        SELECT get_bit(bitmask, CASE state WHEN 'available' THEN 7 WHEN 'cancelled' THEN 6
            WHEN 'completed' THEN 5 WHEN 'discarded' THEN 4 WHEN 'pending' THEN 3 WHEN 'retryable' THEN 2
            WHEN 'running' THEN 1 ELSE 0 END) = 1 $$;
    CREATE TABLE river_job (
        id bigserial PRIMARY KEY,
        state river_job_state NOT NULL DEFAULT 'available',
        attempt smallint NOT NULL DEFAULT 0,
        max_attempts smallint NOT NULL,
        attempted_at timestamptz,
        created_at timestamptz NOT NULL DEFAULT now(),
        finalized_at timestamptz,
        scheduled_at timestamptz NOT NULL DEFAULT now(),
        priority smallint NOT NULL DEFAULT 1,
        args jsonb NOT NULL,
        attempted_by text[],
        errors jsonb[],
        kind text NOT NULL,
        metadata jsonb NOT NULL DEFAULT '{}',
        queue text NOT NULL DEFAULT 'default',
        tags varchar(255)[] NOT NULL DEFAULT '{}',
        unique_key bytea,
        unique_states bit(8),
        CONSTRAINT finalized_or_finalized_at_null CHECK (
            (finalized_at IS NULL) = (state NOT IN ('cancelled', 'completed', 'discarded'))),
        CONSTRAINT kind_length CHECK (char_length(kind) > 0 AND char_length(kind) < 128),
        CONSTRAINT max_attempts_is_positive CHECK (max_attempts > 0),
        CONSTRAINT priority_in_range CHECK (priority >= 1 AND priority <= 4),
        CONSTRAINT queue_length CHECK (char_length(queue) > 0 AND char_length(queue) < 128)
    );
    CREATE INDEX river_job_args_index ON river_job USING gin (args);
    CREATE INDEX river_job_kind ON river_job (kind);
    CREATE INDEX river_job_metadata_index ON river_job USING gin (metadata);
    CREATE INDEX river_job_prioritized_fetching_index
        ON river_job (state, queue, priority, scheduled_at, id);
    CREATE INDEX river_job_state_and_finalized_at_index ON river_job (state, finalized_at)
        WHERE finalized_at IS NOT NULL;
    CREATE UNIQUE INDEX river_job_unique_idx ON river_job (unique_key)
        WHERE unique_key IS NOT NULL AND unique_states IS NOT NULL
              AND river_job_state_in_bitmask(unique_states, state);
    """,
    Schema(
        "river_job",
        ("id",),
        "created_at",
        "kind",
        {
            "id": any_bigint,
            "kind": one_of("email", "report"),
            "state": one_of("available", "pending", "retryable", "running", "scheduled"),
            "max_attempts": number(1, 25),
            "priority": number(1, 4),
            "args": document,
            "attempted_by": maybe(words),
            "tags": words,
            "unique_key": maybe(blob),
            "scheduled_at": an_hour,
        },
        given=True,
    ),
    refused=("no-time-index", "unique-without-time"),
    way_out=(
        "DROP INDEX river_job_unique_idx",
        'CREATE INDEX CONCURRENTLY ON public.river_job ("created_at")',
    ),
)

# procrastinate, a job queue in Python: its events are deleted with their jobs, and their time may be NULL.
_PROCRASTINATE = """
    CREATE TYPE procrastinate_job_status AS ENUM ('todo', 'doing', 'succeeded', 'failed', 'cancelled',
                                                  'aborting', 'aborted');
    CREATE TYPE procrastinate_job_event_type AS ENUM ('deferred', 'started', 'deferred_for_retry', 'failed',
        'succeeded', 'cancelled', 'abort_requested', 'aborted', 'scheduled');
    CREATE TABLE procrastinate_jobs (
        id bigserial PRIMARY KEY,
        queue_name varchar(128) NOT NULL,
        task_name varchar(128) NOT NULL,
        priority integer NOT NULL DEFAULT 0,
        lock text,
        queueing_lock text,
        args jsonb NOT NULL DEFAULT '{}',
        status procrastinate_job_status NOT NULL DEFAULT 'todo',
        scheduled_at timestamptz,
        attempts integer NOT NULL DEFAULT 0,
        abort_requested boolean NOT NULL DEFAULT false,
        CONSTRAINT check_not_todo_abort_requested CHECK (NOT (status = 'todo' AND abort_requested))
    );
    CREATE TABLE procrastinate_periodic_defers (
        id bigserial PRIMARY KEY,
        task_name varchar(128) NOT NULL,
        defer_timestamp bigint,
        job_id bigint REFERENCES procrastinate_jobs (id),
        periodic_id varchar(128) NOT NULL DEFAULT '',
        CONSTRAINT procrastinate_periodic_defers_unique UNIQUE (task_name, periodic_id, defer_timestamp)
    );
    CREATE TABLE procrastinate_events (
        id bigserial PRIMARY KEY,
        job_id bigint NOT NULL REFERENCES procrastinate_jobs ON DELETE CASCADE,
        type procrastinate_job_event_type,
        at timestamptz DEFAULT now()
    );
    CREATE UNIQUE INDEX procrastinate_jobs_queueing_lock_idx_v1 ON procrastinate_jobs (queueing_lock)
        WHERE status = 'todo';
    CREATE UNIQUE INDEX procrastinate_jobs_lock_idx_v1 ON procrastinate_jobs (lock) WHERE status = 'doing';
    CREATE INDEX procrastinate_jobs_queue_name_idx_v1 ON procrastinate_jobs (queue_name);
    CREATE INDEX procrastinate_events_job_id_fkey_v1 ON procrastinate_events (job_id);
    INSERT INTO procrastinate_jobs (queue_name, task_name) SELECT 'default', 'sum'
    FROM generate_series(1, 10);
"""
PROCRASTINATE = Real(
    "procrastinate",
    TableSpec("procrastinate_events", "at", retention_days=15),
    _PROCRASTINATE,
    Schema(
        "procrastinate_events",
        ("id",),
        "at",
        "type",
        {"id": any_bigint, "type": one_of("started", "failed", "scheduled", "aborted")},
        given=True,
        marks=Marks("succeeded", "deferred", "cancelled"),
        parent=Parent(
            "job_id",
            "procrastinate_jobs",
            "INSERT INTO procrastinate_jobs (queue_name, task_name) VALUES ('default', 'sum') RETURNING id",
        ),
    ),
    refused=("no-time-index",),
    way_out=('CREATE INDEX CONCURRENTLY ON public.procrastinate_events ("at")',),
)
PROCRASTINATE_JOBS = Real(
    "procrastinate",
    TableSpec("procrastinate_jobs", "scheduled_at", retention_days=15),
    _PROCRASTINATE,
    refused=("inbound-fk", "no-time-index", "unique-without-time"),
)

# pgmq, queues in SQL: the archive of a queue, in a schema that is on no search path.
PGMQ = Real(
    "pgmq",
    TableSpec("a_orders", "archived_at", retention_days=15, schema="pgmq"),
    """
    CREATE SCHEMA pgmq;
    CREATE TABLE pgmq.a_orders (
        msg_id bigint PRIMARY KEY,
        read_ct int DEFAULT 0 NOT NULL,
        enqueued_at timestamptz DEFAULT now() NOT NULL,
        last_read_at timestamptz,
        archived_at timestamptz DEFAULT now() NOT NULL,
        vt timestamptz NOT NULL,
        message jsonb,
        headers jsonb
    );
    CREATE INDEX archived_at_idx_orders ON pgmq.a_orders (archived_at);
    """,
    Schema(
        "pgmq.a_orders",
        ("msg_id",),
        "archived_at",
        "read_ct",
        {
            "msg_id": any_bigint,
            "read_ct": number(4, 99),
            "vt": an_hour,
            "message": maybe(document),
            "headers": maybe(document),
        },
        marks=Marks(1, 2, 3),
    ),
)

# LiteLLM, a gateway to language models: the cost of each request, in a table with a mixed-case name.
LITELLM = Real(
    "LiteLLM",
    TableSpec("LiteLLM_SpendLogs", "startTime", retention_days=15),
    """
    CREATE TABLE "LiteLLM_SpendLogs" (
        request_id text NOT NULL,
        call_type text NOT NULL,
        api_key text NOT NULL DEFAULT '',
        spend double precision NOT NULL DEFAULT 0.0,
        total_tokens integer NOT NULL DEFAULT 0,
        prompt_tokens integer NOT NULL DEFAULT 0,
        completion_tokens integer NOT NULL DEFAULT 0,
        "startTime" timestamp(3) NOT NULL,
        "endTime" timestamp(3) NOT NULL,
        "completionStartTime" timestamp(3),
        model text NOT NULL DEFAULT '',
        api_base text DEFAULT '',
        "user" text DEFAULT '',
        metadata jsonb DEFAULT '{}',
        cache_hit text DEFAULT '',
        request_tags jsonb DEFAULT '[]',
        team_id text,
        end_user text,
        messages jsonb DEFAULT '{}',
        CONSTRAINT "LiteLLM_SpendLogs_pkey" PRIMARY KEY (request_id)
    );
    CREATE INDEX "LiteLLM_SpendLogs_startTime_idx" ON "LiteLLM_SpendLogs" ("startTime");
    CREATE INDEX "LiteLLM_SpendLogs_startTime_request_id_idx"
        ON "LiteLLM_SpendLogs" ("startTime", request_id);
    CREATE INDEX "LiteLLM_SpendLogs_end_user_idx" ON "LiteLLM_SpendLogs" (end_user);
    """,
    Schema(
        '"LiteLLM_SpendLogs"',
        ("request_id",),
        "startTime",
        "call_type",
        {
            "request_id": ksuid("chatcmpl-"),
            "call_type": one_of("acompletion", "aembedding"),
            "spend": real,
            "endTime": an_hour,
            "user": word,
            "metadata": maybe(document),
            "messages": maybe(document),
        },
        kind="timestamp",
        precision=3,
    ),
)

# audited, an audit trail for Ruby on Rails, whose time may be NULL.
AUDITED = Real(
    "audited",
    TableSpec("audits", "created_at", Interval.WEEK, retention_days=60, ahead_days=10),
    """
    CREATE TABLE audits (
        id bigserial PRIMARY KEY,
        auditable_id integer,
        auditable_type varchar,
        associated_id integer,
        associated_type varchar,
        user_id integer,
        user_type varchar,
        username varchar,
        action varchar,
        audited_changes jsonb,
        version integer DEFAULT 0,
        comment varchar,
        remote_address varchar,
        request_uuid varchar,
        created_at timestamp(6)
    );
    CREATE INDEX associated_index ON audits (associated_type, associated_id);
    CREATE INDEX auditable_index ON audits (auditable_type, auditable_id, version);
    CREATE INDEX index_audits_on_created_at ON audits (created_at);
    CREATE INDEX index_audits_on_request_uuid ON audits (request_uuid);
    CREATE INDEX user_index ON audits (user_id, user_type);
    """,
    Schema(
        "audits",
        ("id",),
        "created_at",
        "action",
        {
            "id": any_bigint,
            "action": one_of("create", "update", "destroy"),
            "version": number(1, 9),
            "auditable_id": number(1, 99),
            "audited_changes": document,
            "request_uuid": any_uuid,
        },
        given=True,
        kind="timestamp",
        days=WEEKS,
    ),
)

# GitLab: its log of webhook deliveries as it was before GitLab itself partitioned it by month.
GITLAB = Real(
    "GitLab",
    TableSpec("web_hook_logs", "created_at", retention_days=15),
    """
    CREATE TABLE web_hooks (id serial PRIMARY KEY, url text);
    INSERT INTO web_hooks (url) SELECT 'https://example.com' FROM generate_series(1, 10);
    CREATE TABLE web_hook_logs (
        id serial PRIMARY KEY,
        web_hook_id integer NOT NULL,
        trigger varchar,
        url varchar,
        request_headers text,
        request_data text,
        response_headers text,
        response_body text,
        response_status varchar,
        execution_duration double precision,
        internal_error_message varchar,
        created_at timestamp NOT NULL,
        updated_at timestamp NOT NULL,
        CONSTRAINT fk_rails_666826e111 FOREIGN KEY (web_hook_id) REFERENCES web_hooks (id) ON DELETE CASCADE
    );
    CREATE INDEX index_web_hook_logs_on_created_at_and_web_hook_id
        ON web_hook_logs (created_at, web_hook_id);
    CREATE INDEX index_web_hook_logs_on_web_hook_id ON web_hook_logs (web_hook_id);
    """,
    Schema(
        "web_hook_logs",
        ("id",),
        "created_at",
        "response_status",
        {
            "id": any_integer,
            "response_status": one_of("200", "404", "internal error"),
            "execution_duration": real,
            "request_data": long_text,
            "response_body": maybe(long_text),
            "updated_at": an_hour,
        },
        given=True,
        kind="timestamp",
        parent=Parent("web_hook_id", "web_hooks", "INSERT INTO web_hooks DEFAULT VALUES RETURNING id"),
    ),
)

# The same log as GitLab has it today.
GITLAB_TODAY = Real(
    "GitLab today",
    TableSpec("web_hook_logs_daily", "created_at", retention_days=15),
    """
    CREATE TABLE web_hook_logs_daily (
        id bigint NOT NULL,
        web_hook_id bigint NOT NULL,
        response_status varchar,
        created_at timestamp NOT NULL,
        PRIMARY KEY (id, created_at)
    ) PARTITION BY RANGE (created_at);
    """,
    refused=("already-partitioned",),
)

# Oban, a job queue in Elixir: a trigger notifies the queues of each new job, a check is NOT VALID.
OBAN = Real(
    "Oban",
    TableSpec("oban_jobs", "inserted_at", retention_days=15),
    """
    CREATE TYPE oban_job_state AS ENUM ('available', 'scheduled', 'executing', 'retryable', 'completed',
                                        'discarded', 'cancelled');
    CREATE TABLE oban_jobs (
        id bigserial PRIMARY KEY,
        state oban_job_state NOT NULL DEFAULT 'available',
        queue text NOT NULL DEFAULT 'default',
        worker text NOT NULL,
        args jsonb NOT NULL DEFAULT '{}',
        errors jsonb[] NOT NULL DEFAULT ARRAY[]::jsonb[],
        attempt integer NOT NULL DEFAULT 0,
        max_attempts integer NOT NULL DEFAULT 20,
        inserted_at timestamp NOT NULL DEFAULT timezone('UTC', now()),
        scheduled_at timestamp NOT NULL DEFAULT timezone('UTC', now()),
        attempted_at timestamp,
        completed_at timestamp,
        attempted_by text[],
        discarded_at timestamp,
        priority integer NOT NULL DEFAULT 0,
        tags text[] DEFAULT ARRAY[]::text[],
        meta jsonb DEFAULT '{}',
        cancelled_at timestamp,
        CONSTRAINT attempt_range CHECK (attempt >= 0 AND attempt <= max_attempts),
        CONSTRAINT positive_max_attempts CHECK (max_attempts > 0),
        CONSTRAINT queue_length CHECK (char_length(queue) > 0 AND char_length(queue) < 128),
        CONSTRAINT worker_length CHECK (char_length(worker) > 0 AND char_length(worker) < 128)
    );
    ALTER TABLE oban_jobs ADD CONSTRAINT non_negative_priority CHECK (priority >= 0) NOT VALID;
    COMMENT ON TABLE oban_jobs IS '12';
    CREATE INDEX oban_jobs_args_index ON oban_jobs USING gin (args);
    CREATE INDEX oban_jobs_meta_index ON oban_jobs USING gin (meta);
    CREATE INDEX oban_jobs_state_cancelled_at_index ON oban_jobs (state, cancelled_at);
    CREATE INDEX oban_jobs_state_queue_priority_scheduled_at_id_index
        ON oban_jobs (state, queue, priority, scheduled_at, id);
    CREATE FUNCTION oban_jobs_notify() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF NEW.state = 'available' THEN
            PERFORM pg_notify('public.oban_insert', json_build_object('queue', NEW.queue)::text);
        END IF;
        RETURN NULL;
    END $$;
    CREATE TRIGGER oban_notify AFTER INSERT ON oban_jobs FOR EACH ROW EXECUTE FUNCTION oban_jobs_notify();
    """,
    Schema(
        "oban_jobs",
        ("id",),
        "inserted_at",
        "worker",
        {
            "id": any_bigint,
            "worker": one_of("App.Mailer", "App.Sweeper"),
            "state": one_of("available", "scheduled", "executing", "completed"),
            "args": document,
            "attempt": number(0, 20),
            "attempted_by": maybe(words),
            "tags": maybe(words),
            "meta": maybe(document),
        },
        given=True,
        kind="timestamp",
    ),
    refused=("no-time-index",),
    way_out=('CREATE INDEX CONCURRENTLY ON public.oban_jobs ("inserted_at")',),
)

# django-auditlog: an identity as Django creates it, deferred foreign keys, indexes for LIKE.
AUDITLOG = Real(
    "django-auditlog",
    TableSpec("auditlog_logentry", "timestamp", retention_days=15),
    """
    CREATE TABLE auth_user (
        id integer GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY, username varchar(150) NOT NULL);
    INSERT INTO auth_user (username) SELECT 'user' || n FROM generate_series(1, 10) n;
    CREATE TABLE django_content_type (
        id integer GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY, model varchar(100) NOT NULL);
    INSERT INTO django_content_type (model) SELECT 'model' || n FROM generate_series(1, 3) n;
    CREATE TABLE auditlog_logentry (
        id bigint GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY,
        object_pk varchar(255) NOT NULL,
        object_id bigint,
        object_repr text NOT NULL,
        action smallint NOT NULL CHECK (action >= 0),
        changes_text text NOT NULL,
        changes jsonb,
        "timestamp" timestamptz NOT NULL,
        actor_id integer,
        content_type_id integer NOT NULL,
        remote_addr inet,
        additional_data jsonb,
        cid varchar(255),
        CONSTRAINT auditlog_logentry_actor_id_959271d2_fk_auth_user_id
            FOREIGN KEY (actor_id) REFERENCES auth_user (id) DEFERRABLE INITIALLY DEFERRED,
        CONSTRAINT auditlog_logentry_content_type_id_75830218_fk_django_co
            FOREIGN KEY (content_type_id) REFERENCES django_content_type (id) DEFERRABLE INITIALLY DEFERRED
    );
    CREATE INDEX auditlog_logentry_object_pk_6e3219c0 ON auditlog_logentry (object_pk);
    CREATE INDEX auditlog_logentry_object_pk_6e3219c0_like
        ON auditlog_logentry (object_pk varchar_pattern_ops);
    CREATE INDEX auditlog_logentry_timestamp_37867bb0 ON auditlog_logentry ("timestamp");
    CREATE INDEX auditlog_logentry_actor_id_959271d2 ON auditlog_logentry (actor_id);
    CREATE INDEX auditlog_logentry_content_type_id_75830218 ON auditlog_logentry (content_type_id);
    CREATE INDEX auditlog_logentry_cid_9f467263_like ON auditlog_logentry (cid varchar_pattern_ops);
    """,
    Schema(
        "auditlog_logentry",
        ("id",),
        "timestamp",
        "object_repr",
        {
            "id": any_bigint,
            "object_repr": one_of("invoice", "order"),
            "action": number(0, 3),
            "object_pk": word,
            "changes_text": long_text,
            "changes": maybe(document),
            "content_type_id": number(1, 3),
            "remote_addr": maybe(one_of("10.0.0.1", "2001:db8::1")),
        },
        given=True,
        parent=Parent(
            "actor_id",
            "auth_user",
            "INSERT INTO auth_user (username) VALUES ('somebody') RETURNING id",
            required=False,
        ),
    ),
)

# Svix, which delivers webhooks: text keys that sort bytewise.
SVIX = Real(
    "Svix",
    TableSpec("messageattempt", "created_at", retention_days=15),
    """
    CREATE TABLE messageattempt (
        id varchar COLLATE "C" NOT NULL,
        created_at timestamptz NOT NULL,
        updated_at timestamptz NOT NULL,
        msg_id varchar COLLATE "C" NOT NULL,
        msg_dest_id varchar COLLATE "C" NOT NULL,
        endp_id varchar COLLATE "C" NOT NULL,
        url varchar NOT NULL,
        status smallint NOT NULL,
        response_status_code smallint NOT NULL,
        response text DEFAULT '' NOT NULL,
        ended_at timestamptz,
        trigger_type smallint NOT NULL,
        CONSTRAINT pk_messageattempt PRIMARY KEY (id)
    );
    CREATE INDEX ix_messageattempt_per_msg_no_status ON messageattempt (msg_id, id DESC);
    """,
    Schema(
        "messageattempt",
        ("id",),
        "created_at",
        "url",
        {
            "id": ksuid("atmpt_"),
            "url": one_of("https://example.com/a", "https://example.com/b"),
            "status": number(0, 3),
            "msg_id": ksuid("msg_"),
            "msg_dest_id": word,
            "endp_id": one_of("ep_1", "ep_2"),
            "response_status_code": number(200, 599),
            "response": long_text,
            "trigger_type": number(0, 1),
            "updated_at": an_hour,
        },
    ),
    refused=("no-time-index",),
    way_out=('CREATE INDEX CONCURRENTLY ON public.messageattempt ("created_at")',),
)

# TimescaleDB's tutorial: measurements by time and device; one index serves as the key and for the time.
TIMESCALE = Real(
    "TimescaleDB tutorial",
    TableSpec("conditions", "time", Interval.HOUR, retention_days=2, ahead_days=1),
    """
    CREATE TABLE conditions (
        time timestamptz NOT NULL,
        location text NOT NULL,
        device text NOT NULL,
        temperature double precision,
        humidity double precision
    );
    CREATE UNIQUE INDEX conditions_time_device_idx ON conditions (time, device);
    """,
    Schema(
        "conditions",
        ("time", "device"),
        "time",
        "location",
        {
            "device": word,
            "location": one_of("office", "garage"),
            "temperature": maybe(real),
            "humidity": real,
        },
        days=HOURS,
    ),
)

# Umami, which counts visits to web sites: uuid keys, and a column that a later version dropped.
UMAMI = Real(
    "Umami",
    TableSpec("website_event", "created_at", Interval.MONTH),
    """
    CREATE TABLE website_event (
        event_id uuid NOT NULL,
        website_id uuid NOT NULL,
        session_id uuid NOT NULL,
        created_at timestamptz(6) DEFAULT CURRENT_TIMESTAMP,
        url_path varchar(500) NOT NULL,
        url_query varchar(500),
        referrer_domain varchar(500),
        event_type integer NOT NULL DEFAULT 1,
        event_name varchar(50),
        event_data jsonb,
        CONSTRAINT website_event_pkey PRIMARY KEY (event_id)
    );
    ALTER TABLE website_event DROP COLUMN event_data;
    ALTER TABLE website_event ADD COLUMN visit_id uuid NOT NULL, ADD COLUMN tag varchar(50),
        ADD COLUMN lcp decimal(10, 1);
    CREATE INDEX website_event_created_at_idx ON website_event (created_at);
    CREATE INDEX website_event_session_id_idx ON website_event (session_id);
    CREATE INDEX website_event_website_id_created_at_idx ON website_event (website_id, created_at);
    CREATE INDEX website_event_website_id_created_at_url_path_idx
        ON website_event (website_id, created_at, url_path);
    """,
    Schema(
        "website_event",
        ("event_id",),
        "created_at",
        "url_path",
        {
            "event_id": any_uuid,
            "url_path": one_of("/", "/about"),
            "event_type": number(1, 2),
            "website_id": any_uuid,
            "session_id": any_uuid,
            "visit_id": any_uuid,
            "event_name": maybe(word),
        },
        days=MONTHS,
    ),
)

# Bitwarden, a password manager: what members of an organization have done; all names are in mixed case.
BITWARDEN = Real(
    "Bitwarden",
    TableSpec("Event", "Date", retention_days=15),
    """
    CREATE TABLE "Event" (
        "Id" uuid NOT NULL,
        "Date" timestamptz NOT NULL,
        "Type" integer NOT NULL,
        "UserId" uuid,
        "OrganizationId" uuid,
        "CipherId" uuid,
        "GroupId" uuid,
        "DeviceType" smallint,
        "IpAddress" varchar(50),
        "ActingUserId" uuid,
        CONSTRAINT "PK_Event" PRIMARY KEY ("Id")
    );
    CREATE INDEX "IX_Event_Date_OrganizationId_ActingUserId_CipherId"
        ON "Event" ("Date", "OrganizationId", "ActingUserId", "CipherId");
    """,
    Schema(
        '"Event"',
        ("Id",),
        "Date",
        "IpAddress",
        {
            "Id": any_uuid,
            "IpAddress": maybe(one_of("10.0.0.1", "2001:db8::1")),
            "Type": number(1_000, 1_700),
            "UserId": maybe(any_uuid),
            "OrganizationId": maybe(any_uuid),
            "DeviceType": maybe(number(0, 25)),
        },
    ),
)

# Supabase Auth: json, which has no equality, row security, a schema of its own.
SUPABASE = Real(
    "Supabase Auth",
    TableSpec("audit_log_entries", "created_at", schema="auth"),
    """
    CREATE SCHEMA auth;
    CREATE TABLE auth.audit_log_entries (
        instance_id uuid,
        id uuid NOT NULL,
        payload json,
        created_at timestamptz,
        ip_address varchar(64) DEFAULT '' NOT NULL,
        CONSTRAINT audit_log_entries_pkey PRIMARY KEY (id)
    );
    CREATE INDEX audit_logs_instance_id_idx ON auth.audit_log_entries (instance_id);
    ALTER TABLE auth.audit_log_entries ENABLE ROW LEVEL SECURITY;
    COMMENT ON TABLE auth.audit_log_entries IS 'Auth: what users have done';
    """,
    Schema(
        "auth.audit_log_entries",
        ("id",),
        "created_at",
        "ip_address",
        {
            "id": any_uuid,
            "ip_address": one_of("", "10.0.0.1"),
            "payload": maybe(document),
            "instance_id": maybe(any_uuid),
        },
    ),
    refused=("no-time-index",),
    way_out=('CREATE INDEX CONCURRENTLY ON auth.audit_log_entries ("created_at")',),
)

# pg-boss, a job queue in Node.js: the archive of finished jobs, whose key has two columns.
PG_BOSS = Real(
    "pg-boss",
    TableSpec("archive", "archived_on", Interval.WEEK, retention_days=60, ahead_days=10, schema="pgboss"),
    """
    CREATE SCHEMA pgboss;
    CREATE TYPE pgboss.job_state AS ENUM ('created', 'retry', 'active', 'completed', 'cancelled', 'failed');
    CREATE TABLE pgboss.archive (
        id uuid NOT NULL,
        name text NOT NULL,
        priority integer NOT NULL,
        data jsonb,
        state pgboss.job_state NOT NULL,
        retry_limit integer NOT NULL,
        retry_count integer NOT NULL,
        retry_backoff boolean NOT NULL,
        start_after timestamptz NOT NULL,
        started_on timestamptz,
        singleton_key text,
        singleton_on timestamp,
        expire_in interval NOT NULL,
        created_on timestamptz NOT NULL,
        keep_until timestamptz NOT NULL,
        output jsonb,
        policy text,
        archived_on timestamptz NOT NULL DEFAULT now(),
        CONSTRAINT archive_pkey PRIMARY KEY (name, id)
    );
    CREATE INDEX archive_i1 ON pgboss.archive (archived_on);
    """,
    Schema(
        "pgboss.archive",
        ("name", "id"),
        "archived_on",
        "state",
        {
            "name": one_of("email", "it's a report"),
            "id": any_uuid,
            "state": one_of("created", "retry", "active"),
            "priority": number(0, 9),
            "data": maybe(document),
            "retry_limit": number(0, 9),
            "retry_count": number(0, 9),
            "retry_backoff": one_of(True, False),
            "start_after": an_hour,
            "expire_in": one_of(timedelta(minutes=15), timedelta(days=1)),
            "created_on": an_hour,
            "keep_until": an_hour,
        },
        marks=Marks("completed", "failed", "cancelled"),
        days=WEEKS,
    ),
)

# OpenFGA, an authorization service: each change by its ULID, in a key of three columns.
OPENFGA = Real(
    "OpenFGA",
    TableSpec("changelog", "inserted_at"),
    """
    CREATE TABLE changelog (
        store text NOT NULL,
        object_type text NOT NULL,
        object_id text NOT NULL,
        relation text NOT NULL,
        _user text NOT NULL,
        operation integer NOT NULL,
        ulid text NOT NULL,
        inserted_at timestamptz NOT NULL,
        condition_name text,
        condition_context bytea,
        PRIMARY KEY (store, ulid, object_type)
    );
    """,
    Schema(
        "changelog",
        ("store", "ulid", "object_type"),
        "inserted_at",
        "relation",
        {
            "store": one_of("01ARZ3NDEKTSV4RRFFQ69G5FAV", "01BX5ZZKBKACTAV9WEVGEMMVRZ"),
            "ulid": ulid,
            "object_type": one_of("document", "folder"),
            "relation": one_of("viewer", "editor"),
            "operation": number(0, 1),
            "object_id": word,
            "_user": word,
            "condition_context": maybe(blob),
        },
    ),
    refused=("no-time-index",),
    way_out=('CREATE INDEX CONCURRENTLY ON public.changelog ("inserted_at")',),
)

# Blockscout, a blockchain explorer: a key of hashes, numbers of any length.
BLOCKSCOUT = Real(
    "Blockscout",
    TableSpec("token_transfers", "inserted_at", retention_days=15),
    """
    CREATE TABLE token_transfers (
        transaction_hash bytea NOT NULL,
        log_index integer NOT NULL,
        from_address_hash bytea NOT NULL,
        to_address_hash bytea NOT NULL,
        amount numeric,
        token_contract_address_hash bytea NOT NULL,
        inserted_at timestamp NOT NULL,
        updated_at timestamp NOT NULL,
        block_number integer,
        block_hash bytea NOT NULL,
        amounts numeric[],
        token_ids numeric(78, 0)[],
        token_type varchar(255),
        block_consensus boolean DEFAULT true,
        CONSTRAINT token_transfers_pkey PRIMARY KEY (transaction_hash, block_hash, log_index)
    );
    CREATE INDEX token_transfers_block_number_index ON token_transfers (block_number);
    CREATE INDEX token_transfers_token_ids_index ON token_transfers USING gin (token_ids);
    """,
    Schema(
        "token_transfers",
        ("transaction_hash", "block_hash", "log_index"),
        "inserted_at",
        "token_type",
        {
            "transaction_hash": lambda chance: chance.randbytes(32),
            "block_hash": lambda chance: chance.randbytes(32),
            "log_index": number(0, 99),
            "token_type": one_of("ERC-20", "ERC-721"),
            "amount": maybe(one_of(Decimal("1.50"), Decimal(2**200))),
            "token_ids": maybe(lambda chance: [Decimal(chance.getrandbits(250))]),
            "from_address_hash": blob,
            "to_address_hash": blob,
            "token_contract_address_hash": blob,
            "updated_at": an_hour,
        },
        kind="timestamp",
    ),
    refused=("no-time-index",),
    way_out=('CREATE INDEX CONCURRENTLY ON public.token_transfers ("inserted_at")',),
)

# Sqitch, which deploys changes to databases: a key that includes the time, arrays of text.
SQITCH = Real(
    "Sqitch",
    TableSpec("events", "committed_at", Interval.MONTH, schema="sqitch"),
    """
    CREATE SCHEMA sqitch;
    CREATE TABLE sqitch.projects (project text PRIMARY KEY);
    INSERT INTO sqitch.projects VALUES ('flipr');
    CREATE TABLE sqitch.events (
        event text NOT NULL CONSTRAINT events_event_check
            CHECK (event IN ('deploy', 'revert', 'fail', 'merge')),
        change_id text NOT NULL,
        change text NOT NULL,
        project text NOT NULL REFERENCES sqitch.projects (project) ON UPDATE CASCADE,
        note text NOT NULL DEFAULT '',
        requires text[] NOT NULL DEFAULT '{}',
        conflicts text[] NOT NULL DEFAULT '{}',
        tags text[] NOT NULL DEFAULT '{}',
        committed_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        committer_name text NOT NULL,
        PRIMARY KEY (change_id, committed_at)
    );
    COMMENT ON TABLE sqitch.events IS 'Every deployment there has been.';
    COMMENT ON COLUMN sqitch.events.change_id IS 'The change that was deployed or reverted.';
    """,
    Schema(
        "sqitch.events",
        ("change_id", "committed_at"),
        "committed_at",
        "note",
        {
            "change_id": word,
            "note": one_of("", "by hand"),
            "event": one_of("deploy", "revert", "fail", "merge"),
            "change": word,
            "project": one_of("flipr"),
            "requires": words,
            "tags": words,
            "committer_name": word,
        },
        days=MONTHS,
    ),
    refused=("no-time-index",),
    way_out=('CREATE INDEX CONCURRENTLY ON sqitch.events ("committed_at")',),
)

# Graphile Worker, a job queue in Node.js: a generated column, an identity GENERATED ALWAYS, json.
GRAPHILE = Real(
    "Graphile Worker",
    TableSpec("_private_jobs", "created_at", retention_days=15, schema="graphile_worker"),
    """
    CREATE SCHEMA graphile_worker;
    CREATE TABLE graphile_worker._private_jobs (
        id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        job_queue_id integer,
        task_id integer NOT NULL,
        payload json DEFAULT '{}' NOT NULL,
        priority smallint DEFAULT 0 NOT NULL,
        run_at timestamptz DEFAULT now() NOT NULL,
        attempts smallint DEFAULT 0 NOT NULL,
        max_attempts smallint DEFAULT 25 NOT NULL
            CONSTRAINT jobs_max_attempts_check CHECK (max_attempts >= 1),
        last_error text,
        created_at timestamptz DEFAULT now() NOT NULL,
        updated_at timestamptz DEFAULT now() NOT NULL,
        key text CONSTRAINT jobs_key_check CHECK (length(key) > 0 AND length(key) <= 512),
        locked_at timestamptz,
        locked_by text,
        revision integer DEFAULT 0 NOT NULL,
        flags jsonb,
        is_available boolean GENERATED ALWAYS AS (locked_at IS NULL AND attempts < max_attempts) STORED
            NOT NULL,
        CONSTRAINT jobs_key_key1 UNIQUE (key)
    );
    CREATE INDEX jobs_main_index ON graphile_worker._private_jobs (priority, run_at)
        INCLUDE (id, task_id, job_queue_id) WHERE is_available;
    ALTER TABLE graphile_worker._private_jobs ENABLE ROW LEVEL SECURITY;
    CREATE VIEW graphile_worker.jobs AS
        SELECT id, priority, run_at, attempts, max_attempts, last_error, created_at, key, locked_at
        FROM graphile_worker._private_jobs;
    """,
    Schema(
        "graphile_worker._private_jobs",
        ("id",),
        "created_at",
        "last_error",
        {
            "id": any_bigint,
            "last_error": maybe(one_of("timeout", "refused")),
            "attempts": number(0, 25),
            "payload": document,
            "task_id": number(1, 9),
            "locked_at": maybe(an_hour),
            "flags": maybe(document),
        },
        given=True,
    ),
    refused=("no-time-index", "unique-without-time"),
    way_out=(
        "ALTER TABLE graphile_worker._private_jobs DROP CONSTRAINT jobs_key_key1",
        'CREATE INDEX CONCURRENTLY ON graphile_worker._private_jobs ("created_at")',
    ),
)

# Discourse: who visited on which day, by a date.
DISCOURSE = Real(
    "Discourse",
    TableSpec("user_visits", "visited_at", retention_days=15),
    """
    CREATE TABLE user_visits (
        id serial PRIMARY KEY,
        user_id integer NOT NULL,
        visited_at date NOT NULL,
        posts_read integer DEFAULT 0,
        mobile boolean DEFAULT false,
        time_read integer DEFAULT 0 NOT NULL
    );
    CREATE UNIQUE INDEX index_user_visits_on_user_id_and_visited_at ON user_visits (user_id, visited_at);
    CREATE INDEX index_user_visits_on_user_id_and_visited_at_and_time_read
        ON user_visits (user_id, visited_at, time_read);
    CREATE INDEX index_user_visits_on_visited_at_and_mobile ON user_visits (visited_at, mobile);
    """,
    Schema(
        "user_visits",
        ("id",),
        "visited_at",
        "time_read",
        {
            "id": any_integer,
            "time_read": number(4, 999),
            "posts_read": number(0, 99),
            "user_id": any_integer,
            "mobile": one_of(True, False),
        },
        given=True,
        kind="date",
        marks=Marks(1, 2, 3),
    ),
)

# Kill Bill, a billing system: sessions of its console, with domains that stand in for MySQL types.
KILL_BILL = Real(
    "Kill Bill",
    TableSpec("sessions", "start_timestamp", retention_days=15),
    """
    CREATE DOMAIN datetime AS timestamp without time zone;
    CREATE DOMAIN mediumblob AS bytea;
    CREATE TABLE sessions (
        record_id serial UNIQUE,
        id varchar(36) NOT NULL,
        start_timestamp datetime NOT NULL,
        last_access_time datetime DEFAULT NULL,
        timeout int,
        host varchar(100) DEFAULT NULL,
        session_data mediumblob DEFAULT NULL,
        PRIMARY KEY (record_id)
    );
    CREATE UNIQUE INDEX sessions_id ON sessions (id);
    """,
    Schema(
        "sessions",
        ("record_id",),
        "start_timestamp",
        "host",
        {
            "record_id": any_integer,
            "host": one_of("a.example.com", "b.example.com"),
            "timeout": number(1, 99),
            "id": any_uuid,
            "last_access_time": maybe(an_hour),
            "session_data": maybe(blob),
        },
        given=True,
        kind="timestamp",
    ),
    refused=("time-column-type",),
    way_out=(
        "ALTER TABLE sessions ALTER COLUMN start_timestamp TYPE timestamp",
        "DROP INDEX sessions_id",
        'CREATE INDEX CONCURRENTLY ON public.sessions ("start_timestamp")',
    ),
)

# Mattermost: the time of an audit is a number of milliseconds.
MATTERMOST = Real(
    "Mattermost",
    TableSpec("audits", "createat", retention_days=15),
    """
    CREATE TABLE audits (
        id varchar(26) PRIMARY KEY,
        createat bigint,
        userid varchar(26),
        action varchar(512),
        extrainfo varchar(1024),
        ipaddress varchar(64),
        sessionid varchar(26)
    );
    CREATE INDEX idx_audits_user_id ON audits (userid);
    """,
    refused=("time-column-type",),
)

# Message DB, an event store: a message is identified by its uuid and by its position in its stream.
MESSAGE_DB = Real(
    "Message DB",
    TableSpec("messages", "time", schema="message_store"),
    """
    CREATE SCHEMA message_store;
    CREATE TABLE message_store.messages (
        global_position bigserial NOT NULL,
        position bigint NOT NULL,
        time timestamp DEFAULT (now() AT TIME ZONE 'utc') NOT NULL,
        stream_name text NOT NULL,
        type text NOT NULL,
        data jsonb,
        metadata jsonb,
        id uuid NOT NULL DEFAULT gen_random_uuid(),
        PRIMARY KEY (global_position)
    );
    CREATE UNIQUE INDEX messages_id ON message_store.messages (id);
    CREATE UNIQUE INDEX messages_stream ON message_store.messages (stream_name, position);
    """,
    refused=("no-time-index", "unique-without-time"),
)

ALL = (
    RIVER,
    PROCRASTINATE,
    PROCRASTINATE_JOBS,
    PGMQ,
    LITELLM,
    AUDITED,
    GITLAB,
    GITLAB_TODAY,
    OBAN,
    AUDITLOG,
    SVIX,
    TIMESCALE,
    UMAMI,
    BITWARDEN,
    SUPABASE,
    PG_BOSS,
    OPENFGA,
    BLOCKSCOUT,
    SQITCH,
    GRAPHILE,
    DISCOURSE,
    KILL_BILL,
    MATTERMOST,
    MESSAGE_DB,
)
