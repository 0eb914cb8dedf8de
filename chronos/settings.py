"""The environment, read once into one frozen ``Settings``."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Annotated
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import AfterValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from chronos.errors import RefusedError
from chronos.table import WEBHOOK_LOG, TableSpec

_POSTGRES_SCHEMES = {"postgres", "postgresql", "postgresql+psycopg2"}


def _known_zone(name: str) -> str:
    try:
        ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise ValueError(f"{name!r} is not a time zone, for example UTC or Europe/Madrid") from error
    return name


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
    redis_url: SecretStr = SecretStr("redis://127.0.0.1:6379/0")
    testing: bool = False
    logfire_token: SecretStr | None = None
    webhook_log_retention_days: int = Field(default=15, ge=0, le=36_500)
    webhook_log_days_ahead: int = Field(default=30, ge=0, le=3_650)
    beat_timezone: Annotated[str, AfterValidator(_known_zone)] = "UTC"

    @property
    def tables(self) -> tuple[TableSpec, ...]:
        """The tables that are kept in partitions; their schemas are still to be located."""
        return (
            replace(
                WEBHOOK_LOG,
                retention_days=self.webhook_log_retention_days,
                ahead_days=self.webhook_log_days_ahead,
            ),
        )

    @property
    def database(self) -> URL:
        """The database to work on: ``TEST_DATABASE_URL`` when ``TESTING`` is true.

        Raises RefusedError when it is not set or is no PostgreSQL URL; the message never quotes it.
        """
        name = "TEST_DATABASE_URL" if self.testing else "DATABASE_URL"
        value = self.test_database_url if self.testing else self.database_url
        if value is None:
            raise RefusedError(
                f"{name} is not set; nothing was changed. Set it in the environment or in .env, "
                f"for example {name}=postgresql://user:password@127.0.0.1:5432/chronos"
            )
        return postgres_url(value.get_secret_value(), name)


def postgres_url(text: str, variable: str = "DATABASE_URL") -> URL:
    """Read a PostgreSQL URL in any of its accepted spellings and name psycopg2 as its driver.

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
    if "@" in (url.host or "") or "@" in (url.database or ""):
        raise RefusedError(
            f"{variable} has more than one @; nothing was changed. Write %40 for an @ in the password"
        )
    return url.set(drivername="postgresql+psycopg2")


@lru_cache(maxsize=1)
def get_settings() -> Settings:
    """Settings of this process, read on first use.

    Raises RefusedError that names the variable at fault, without its value.
    """
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"]).upper()
        raise RefusedError(f"{name}: {first['msg']}; nothing was changed.") from error
