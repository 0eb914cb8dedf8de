"""A TCP proxy that reads enough of PostgreSQL's protocol to act before a chosen statement is sent."""

from __future__ import annotations

import re
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import NamedTuple, Self

from sqlalchemy.engine import make_url

# What differs between days and runs: masked, so that equal statements look equal.
_VARIABLE = re.compile(
    r"y\d{4}m\d\dd\d\d|\d{4}-\d\d-\d\d([ T]\d\d:\d\d:\d\d(\.\d+)?(\+00(:00)?)?)?"
    r"|'\{[^']*\}'(?=::tid\[\])|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|\b[0-9A-F]+/[0-9A-F]+\b|\b\d+\b"
)


# Statements that change, lock or release something. Reads leave no trace when they are cut off.
_CHANGE = re.compile(
    r"(^|;)\s*(ALTER|ANALYZE|CREATE|DELETE|DO|DROP|INSERT|LOCK|UPDATE"
    r"|WITH \w+ AS( MATERIALIZED)? \(\s*(DELETE|INSERT|UPDATE))\b"
)


class Point(NamedTuple):
    """A kind of moment: between two changes, before the COMMIT of one, or right after it.

    ``done`` is the last change sent before it, over any connection; ``next`` is the change that follows,
    "COMMIT", or "" when the COMMIT has just been answered.
    """

    done: str
    next: str


class Trace:
    """The statements of a run in the order they were sent, and the points that it passed."""

    def __init__(self) -> None:
        self.statements: list[str] = []
        self.points: list[Point | None] = []
        self._done = ""
        self._open = self._committed = False

    def add(self, text: str) -> None:
        """Record ``text`` before it is sent."""
        self.statements.append(text)
        self.points.append(self._point(text))

    def _point(self, text: str) -> Point | None:
        done, committed = self._done, self._committed
        self._committed = False
        if _CHANGE.search(text):
            self._done, self._open = text, True
            return Point(done, text)
        if text == "COMMIT" and self._open:
            self._open, self._committed = False, True
            return Point(done, text)
        return Point(done, "") if committed else None


class Proxy:
    """Forwards connections to the server of ``url``, and records every statement of all connections.

    ``act`` is called once, with the proxy: before the statement numbered ``at`` (from 1) is forwarded, or
    when a point is passed for the nth time: (point, n). ``hold`` is called with each statement, which is sent
    when it returns.
    """

    def __init__(
        self,
        url: str,
        at: int | tuple[Point, int] = 0,
        act: Callable[[Proxy], None] = lambda proxy: None,
        hold: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._server = make_url(url)
        self._at = at
        self._act = act
        self._hold = hold
        self._turn = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.trace = Trace()
        self.acted = threading.Event()

    @property
    def statements(self) -> list[str]:
        """The statements sent so far."""
        return self.trace.statements

    @property
    def url(self) -> str:
        """The URL through the proxy; without TLS, which the proxy could not read."""
        port = self._listener.getsockname()[1]
        url = self._server.set(host="127.0.0.1", port=port).update_query_dict({"sslmode": "disable"})
        return url.render_as_string(hide_password=False)

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.close()
        self.cut()

    def cut(self) -> None:
        """Close every connection, as a failing network would."""
        for end in self._sockets:
            _hang_up(end)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(
                    (self._server.host or "127.0.0.1", self._server.port or 5432)
                )
            except OSError:
                client.close()
                continue
            self._sockets += [client, server]
            threading.Thread(target=self._forward, args=(client, server), daemon=True).start()
            threading.Thread(target=_pump, args=(server, client), daemon=True).start()

    def _forward(self, client: socket.socket, server: socket.socket) -> None:
        try:
            (length,) = struct.unpack("!I", head := _exactly(client, 4))
            server.sendall(head + _exactly(client, length - 4))
            while True:
                head = _exactly(client, 5)
                (length,) = struct.unpack("!I", head[1:])
                body = _exactly(client, length - 4)
                if head[:1] == b"Q":
                    self._on_statement(body.rstrip(b"\0").decode())
                server.sendall(head + body)
        except OSError:
            _hang_up(client)
            _hang_up(server)

    def _on_statement(self, text: str) -> None:
        with self._turn:
            self.trace.add(_VARIABLE.sub("?", text))
            if self._is_there() and not self.acted.is_set():
                self._act(self)
                self.acted.set()
            self._hold(text)

    def _is_there(self) -> bool:
        if isinstance(self._at, int):
            return len(self.statements) == self._at
        point, times = self._at
        return self.trace.points[-1] == point and self.trace.points.count(point) == times


def _pump(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            sink.sendall(data)
    except OSError:
        pass
    _hang_up(source)
    _hang_up(sink)


def _hang_up(end: socket.socket) -> None:
    # Closing alone neither wakes a thread that waits for data on the socket nor tells the peer.
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()


def _exactly(source: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = source.recv(size - len(data))
        if not part:
            raise OSError("closed")
        data += part
    return data
