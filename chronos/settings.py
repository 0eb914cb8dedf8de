"""The environment and ``chronos.toml``, read once into one frozen ``Settings``."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
)
from pydantic_settings import (
    BaseSettings,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from chronos.errors import RefusedError
from chronos.table import WEBHOOK_LOG, Interval, TableSpec

CONFIGURATION = "chronos.toml"
# The variables that describe webhook_log when no file lists tables.
VARIABLES = {
    "retention_days": "WEBHOOK_LOG_RETENTION_DAYS",
    "ahead_days": "WEBHOOK_LOG_DAYS_AHEAD",
    "grace_days": "WEBHOOK_LOG_GRACE_DAYS",
}
_POSTGRES_SCHEMES = {"postgres", "postgresql", "postgresql+psycopg2"}


def _known_zone(name: str) -> str:
    try:
        ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise ValueError(f"{name!r} is not a time zone, for example UTC or Europe/Madrid") from error
    return name


def _table_name(text: str) -> str:
    TableSpec.named(text)
    return text


class _Table(BaseModel):
    """One block ``[[tables]]``."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: Annotated[str, AfterValidator(_table_name)]
    column: str = Field(min_length=1)
    every: Interval = Field(default=Interval.DAY, strict=False)
    retention_days: int | None = Field(default=None, ge=0, le=36_500)
    ahead_days: int = Field(default=30, ge=0, le=3_650)
    grace_days: int = Field(default=0, ge=0, le=3_650)

    @property
    def spec(self) -> TableSpec:
        """The block as a TableSpec."""
        return replace(
            TableSpec.named(self.name),
            column=self.column,
            every=self.every,
            retention_days=self.retention_days,
            ahead_days=self.ahead_days,
            grace_days=self.grace_days,
        )


class _Tables(BaseModel):
    """The whole file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tables: tuple[_Table, ...] = Field(min_length=1)

    @field_validator("tables")
    @classmethod
    def _each_once(cls, tables: tuple[_Table, ...]) -> tuple[_Table, ...]:
        for place, table in enumerate(tables):
            for one, other in ((table.spec, earlier.spec) for earlier in tables[:place]):
                if one.name != other.name:
                    continue
                if one.schema == other.schema:
                    raise ValueError(f"{one.typed} is listed twice")
                if None in (one.schema, other.schema):
                    raise ValueError(
                        f"{other.typed} and {one.typed} may be the same table; name both schemas"
                    )
        return tables


def _read_tables(path: Path) -> tuple[TableSpec, ...]:
    try:
        read = TomlConfigSettingsSource(Settings, toml_file=path).toml_data
    except OSError as error:
        raise RefusedError(f"{path}: {error.strerror}; nothing was changed") from error
    except ValueError as error:  # what TOML or UTF-8 does not allow
        raise RefusedError(f"{path} cannot be read as TOML: {error}; nothing was changed") from error
    try:
        return tuple(table.spec for table in _Tables(**read).tables)
    except ValidationError as error:
        raise RefusedError(f"{path}: {_first_fault(error, read)}; nothing was changed") from None


def _first_fault(error: ValidationError, read: dict[str, Any]) -> str:
    """Which key of the file is at fault, and what it should be; ``read`` is what the file says."""
    first = error.errors(include_url=False)[0]
    tables, message = read.get("tables"), first["msg"].removeprefix("Value error, ")
    if isinstance(tables, dict):
        return "write [[tables]], in double brackets, above each table"
    if not tables:
        others = "".join(f"there is no key {key}; " for key in read if key != "tables")
        return f"{others}it lists no table: write [[tables]] above each"
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        return "tables must be one block for each table, with [[tables]] above it"
    match first["loc"]:
        case ("tables", int(place), str(key)):
            where = str(tables[place].get("name", f"table number {place + 1}"))
            if first["type"] == "missing":
                return f"{where} lacks the key {key}"
            if first["type"] == "extra_forbidden":
                return f"{where}: there is no key {key}; the keys are {', '.join(_Table.model_fields)}"
            return f"{where}, {key}: {message}"
        case (str(key),) if first["type"] == "extra_forbidden":
            return f"there is no key {key} outside the [[tables]] blocks"
    return message


class Settings(BaseSettings):
    """Everything chronos reads from the environment or from ``.env``; the environment wins."""

    model_config = SettingsConfigDict(
        env_file=".env",
        env_file_encoding="utf-8",
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
    )

    database_url: SecretStr | None = None
    test_database_url: SecretStr | None = None
    # Empty: there is no Celery, and cron runs `upkeep`.
    redis_url: SecretStr = SecretStr("")
    testing: bool = False
    logfire_token: SecretStr | None = None
    webhook_log_retention_days: int = Field(default=15, ge=0, le=36_500)
    webhook_log_days_ahead: int = Field(default=30, ge=0, le=3_650)
    webhook_log_grace_days: int = Field(default=0, ge=0, le=3_650)
    beat_timezone: Annotated[str, AfterValidator(_known_zone)] = "UTC"
    # It may hold a token, like any webhook URL.
    chronos_alert_command: SecretStr | None = None
    chronos_config: Path | None = None

    @cached_property
    def listed_in(self) -> Path | None:
        """The file that lists the tables; None when there is none, and ``tables`` is webhook_log alone.

        Raises RefusedError when CHRONOS_CONFIG names a missing file.
        """
        path = self.chronos_config or Path(CONFIGURATION)
        if path.is_file():
            return path
        if self.chronos_config is not None:
            what = "that is a directory" if path.is_dir() else "there is no such file"
            raise RefusedError(f"CHRONOS_CONFIG names {path}, but {what}; nothing was changed")
        return None

    @cached_property
    def tables(self) -> tuple[TableSpec, ...]:
        """The tables to keep partitioned; their schemas may not be located yet.

        Raises RefusedError when the file that lists them cannot be read, naming it and the key at fault.
        """
        if self.listed_in is not None:
            return _read_tables(self.listed_in)
        return (self.webhook_log,)

    @property
    def webhook_log(self) -> TableSpec:
        """The table to use without a file, as the environment describes it."""
        return replace(WEBHOOK_LOG, **{what: getattr(self, name.lower()) for what, name in VARIABLES.items()})

    @property
    def database(self) -> URL:
        """The database to work on: ``TEST_DATABASE_URL`` when ``TESTING`` is true.

        Raises RefusedError when it is not set or is not a PostgreSQL URL; the message never quotes it.
        """
        name = "TEST_DATABASE_URL" if self.testing else "DATABASE_URL"
        value = self.test_database_url if self.testing else self.database_url
        if value is None:
            why, database = ("", "chronos")
            if self.testing:
                why, database = (", and is needed because TESTING is true", "chronos_test")
            raise RefusedError(
                f"{name} is not set{why}; nothing was changed. Set it in the environment or in .env, "
                f"for example {name}=postgresql://user:password@127.0.0.1:5432/{database}"
            )
        return postgres_url(value.get_secret_value(), name)


def postgres_url(text: str, variable: str = "DATABASE_URL") -> URL:
    """Read a PostgreSQL URL in any accepted spelling and set psycopg2 as its driver.

    Raises RefusedError, naming ``variable`` and never the text, which may hold a password.
    """
    try:
        url = make_url(text)
    except (ArgumentError, ValueError) as error:
        raise RefusedError(
            f"{variable} cannot be read as a URL; nothing was changed. "
            "It looks like postgresql://user:password@host:5432/database "
            "(a password with special characters must be percent-encoded)."
        ) from error
    if url.drivername not in _POSTGRES_SCHEMES:
        raise RefusedError(
            f"{variable} must start with postgresql://, not {url.drivername}://; nothing was changed."
        )
    # What follows an unencoded @ in a password would be taken for the host, and shown as such.
    if text.count("@") > 1:
        raise RefusedError(
            f"{variable} has more than one @; nothing was changed. Write %40 for every @ except the one"
            " before the host, for example in the password"
        )
    return url.set(drivername="postgresql+psycopg2")


@lru_cache(maxsize=1)
def get_settings() -> Settings:
    """Settings of this process, read on first use.

    Raises RefusedError, naming the variable at fault without its value, or the file and its key.
    """
    try:
        settings = Settings()
        settings.tables  # noqa: B018  an error in the file is raised before anything is done
        return settings
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"]).upper()
        raise RefusedError(f"{name}: {first['msg']}; nothing was changed.") from error
