"""logfire, when there is a token or an OTLP endpoint; otherwise silent, and nothing goes over the network."""

from __future__ import annotations

import logfire

from chronos.settings import Settings


def configure(settings: Settings, service_name: str = "chronos") -> None:
    """Set logfire up for this process; without a token nothing is sent to it."""
    token = settings.logfire_token
    logfire.configure(
        token=token.get_secret_value() if token else None,
        send_to_logfire="if-token-present" if token else False,
        console=False,
        service_name=service_name,
        inspect_arguments=False,
    )
