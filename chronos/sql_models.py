"""The two tables as the application sees them; one model reads the plain and the partitioned table."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, ClassVar

from sqlalchemy import BigInteger, Column, DateTime, Sequence, Text
from sqlalchemy.dialects.postgresql import JSONB
from sqlmodel import Field, SQLModel


def _utc_now() -> datetime:
    return datetime.now(UTC)


class WebhookEndpoint(SQLModel, table=True):
    """An address that webhooks are delivered to."""

    __tablename__: ClassVar[Any] = "webhook_endpoint"

    id: int | None = Field(default=None, sa_type=BigInteger, primary_key=True)
    url: str = Field(sa_type=Text)


# A composite key gets no sequence by itself: without this one, inserts get no id.
_webhook_log_id = Sequence("webhook_log_id_seq", data_type=BigInteger, metadata=SQLModel.metadata)


class WebhookLog(SQLModel, table=True):
    """One delivery of a webhook.

    The key is (id, timestamp): a unique key of a partitioned table must include its partition column.
    """

    __tablename__: ClassVar[Any] = "webhook_log"

    id: int | None = Field(
        default=None,
        sa_column=Column(
            BigInteger,
            _webhook_log_id,
            server_default=_webhook_log_id.next_value(),
            primary_key=True,
        ),
    )
    request_headers: dict[str, Any] | None = Field(default=None, sa_type=JSONB)
    request_body: Any | None = Field(default=None, sa_type=JSONB)
    response_headers: dict[str, Any] | None = Field(default=None, sa_type=JSONB)
    response_body: Any | None = Field(default=None, sa_type=JSONB)
    status: str = Field(sa_type=Text)
    status_code: int | None = None
    timestamp: datetime = Field(
        default_factory=_utc_now,
        sa_type=DateTime(timezone=True),
        primary_key=True,
        index=True,
    )
    webhook_endpoint_id: int | None = Field(
        default=None, sa_type=BigInteger, foreign_key="webhook_endpoint.id", index=True
    )
