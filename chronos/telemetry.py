"""logfire spans, if there is a token or an OTLP endpoint; otherwise nothing, and no network traffic."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from chronos.settings import Settings

_configured = False


def this_process() -> str:
    """Who this is, for people: ``host=web1 pid=4242``."""
    return f"host={socket.gethostname()} pid={os.getpid()}"


def configure(settings: Settings, service_name: str = "chronos") -> None:
    """Set up logfire for this process, if there is somewhere to send spans.

    That is logfire itself, with ``LOGFIRE_TOKEN``, or any OpenTelemetry backend, with the standard
    ``OTEL_EXPORTER_OTLP_ENDPOINT``.
    """
    global _configured
    token = settings.logfire_token
    if token is None and not any(name.startswith("OTEL_EXPORTER_OTLP") for name in os.environ):
        return
    import logfire

    logfire.configure(
        token=token.get_secret_value() if token else None,
        send_to_logfire="if-token-present" if token else False,
        console=False,
        service_name=service_name,
        inspect_arguments=False,
    )
    _configured = True


@contextmanager
def span(template: str, **attributes: Any) -> Iterator[None]:
    """A span around the block, if ``configure`` found somewhere to send it; never holds a secret."""
    if not _configured:
        yield
        return
    import logfire

    with logfire.span(template, **attributes):
        yield


def gauge(name: str, unit: str, value: float, **attributes: str) -> None:
    """Record ``value``, if ``configure`` found somewhere to send it."""
    if _configured:
        import logfire

        logfire.metric_gauge(name, unit=unit).set(value, attributes)


def flush() -> None:
    """Send what is still pending, before the process ends or waits for its next task."""
    if _configured:
        import logfire

        logfire.force_flush()
