"""uvicorn with httptools, and what it leaves open: header and linger limits, one form of error, and a stop that fails nobody."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Generator
from contextlib import asynccontextmanager
from typing import Any

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from libs.common.context import new_request_id
from libs.common.errors import ErrorCode, PortcullisError
from libs.common.service import ConfigurationError
from services.edge import problems
from services.edge.gate import Gate
from services.edge.metrics import Shed, shed
from services.edge.peer import PEER, Peer
from services.edge.settings import EdgeSettings

log = logging.getLogger(__name__)

LINGER_SECONDS = 5.0
"""After an answer that did not wait for the body, how long its rest is read and thrown away before the connection is cut.
Closing at once would reset the connection, and take the answer from a caller that is still sending."""
POLL_SECONDS = 0.02
BACKLOG = 2048


class _Answering:
    """A connection as uvicorn's answer to a request sees it, which closes after the answer whatever is still being sent: here it
    leaves that to the protocol where the request has not come to its end."""

    def __init__(self, protocol: Protocol) -> None:
        self.write = protocol.transport.write
        self.is_closing = protocol.transport.is_closing
        self._protocol = protocol

    def close(self) -> None:
        if not self._protocol.answered_early:
            self._protocol.transport.close()


class Protocol(HttpToolsProtocol):
    """One connection."""

    settings: EdgeSettings

    _peer: Peer
    _receiving_headers = False
    _receiving_body = False
    _message_ended = False
    _deaf = False
    _resuming = False
    _header_bytes = 0
    _framing_bytes = 0
    _header_timer: asyncio.TimerHandle | None = None
    _linger_timer: asyncio.TimerHandle | None = None
    _reader_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own does
        super().connection_made(transport)
        self._peer = Peer(transport.abort)
        if len(self.connections) > self.settings.edge_max_connections:
            shed(Shed.CONNECTIONS)
            self._refuse(PortcullisError(ErrorCode.OVERLOADED))
            self.transport.close()  # at once: there is no room to wait in
            return
        # uvicorn starts this timer after the first answer only: a connection on which nothing comes would stay for ever.
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def connection_lost(self, exc: Exception | None) -> None:
        self._peer.gone.set()
        self._unset_keepalive_if_required()
        self._cancel_header_timer()
        self._cancel_linger_timer()
        self._cancel_reader_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._deaf or self.transport.is_closing():
            return
        self._unset_keepalive_if_required()
        self._message_ended = False
        self._framing_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._decline_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            self._refuse(PortcullisError(ErrorCode.BAD_REQUEST))
        if self._receiving_body and self._framing_bytes > 2 * self.settings.max_header_bytes:
            # An extension of a chunk or trailers, without end: nothing of it is body, whose size and time are bounded.
            self._refuse(PortcullisError(ErrorCode.HEADERS_TOO_LARGE))
        if not self._receiving_headers:
            return
        # Not all of the headers came at once: they have so much time and room. (What a message ended in was not all headers.)
        if not self._message_ended:
            self._header_bytes += len(data)
        if self._header_bytes > 2 * self.settings.max_header_bytes:
            self._refuse(PortcullisError(ErrorCode.HEADERS_TOO_LARGE))
        elif self._header_timer is None:
            self._header_timer = self.loop.call_later(self.settings.header_timeout_seconds, self._headers_too_slow)

    def on_message_begin(self) -> None:
        if not self._resuming:
            self._receiving_headers = True
            super().on_message_begin()
            self.scope[PEER] = self._peer  # type: ignore[literal-required]  # our own, beside what ASGI names

    def on_url(self, url: bytes) -> None:
        if not self._resuming:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        # What comes after the body (trailers) uvicorn would add to the headers, which a proxy may have gone through.
        if self._receiving_headers and not self._resuming:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._resuming:
            return
        self._receiving_headers = False
        self._header_bytes = self._framing_bytes = 0
        self._cancel_header_timer()
        super().on_headers_complete()
        self.cycle.transport = _Answering(self)  # type: ignore[assignment]  # all of it that is used there
        self._receiving_body = True

    def on_body(self, body: bytes) -> None:
        self._framing_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return  # its body is still to come, see below
        self._receiving_body = False
        self._message_ended = True
        self._cancel_linger_timer()
        super().on_message_complete()

    @property
    def answered_early(self) -> bool:
        """The request of which the body is coming in has its answer."""
        return self._receiving_body and self.cycle.response_complete

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.answered_early or self.transport.is_closing():
            return
        if self.cycle.keep_alive:
            self._linger_timer = self.loop.call_later(LINGER_SECONDS, self.transport.close)
        else:
            self._unset_keepalive_if_required()
            self._close_for_senders()

    def pause_writing(self) -> None:
        """The caller does not read its answers: what waits for it, and the place that it takes up, is not kept for ever."""
        super().pause_writing()
        self._reader_timer = self.loop.call_later(self.settings.read_timeout_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        self._cancel_reader_timer()
        super().resume_writing()

    def _decline_upgrade(self, rest: bytes) -> None:
        """Go on in HTTP/1.1 when an upgrade was asked for, as some clients do with every request (`Upgrade: h2c`).

        The parser stops after such a request's headers; another one takes over at its body, told how long that is.
        """
        framing = [b"%b: %b\r\n" % header for header in self.headers if header[0] in (b"content-length", b"transfer-encoding")]
        self.parser = httptools.HttpRequestParser(self)
        self._resuming = True
        self.parser.feed_data(b"POST / HTTP/1.1\r\n" + b"".join(framing) + b"\r\n")
        self._resuming = False
        if rest:
            self.data_received(rest)

    def _headers_too_slow(self) -> None:
        self._refuse(PortcullisError(ErrorCode.BAD_REQUEST, "The headers did not arrive in time."))

    def _refuse(self, error: PortcullisError) -> None:
        """Answer something that never became a whole request, and close.

        What is wrong may follow requests that are being answered; the refusal must not be taken for the answer to one of those.
        """
        self._receiving_headers = False
        self._cancel_header_timer()
        if self.transport.is_closing():
            return
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering and not self._receiving_body:
            self._deaf = True
            self.cycle.keep_alive = False
            return
        begun = self._receiving_body and self.cycle.response_started
        if not begun and not self.pipeline:
            request_id = new_request_id()
            body = problems.document(error, request_id)
            retry = b"retry-after: %d\r\n" % error.retry_after if error.retry_after is not None else b""
            self.transport.write(
                STATUS_LINE[error.kind.status]
                + b"content-type: %b\r\ncontent-length: %d\r\n" % (problems.MEDIA_TYPE.encode(), len(body))
                + b"x-request-id: %b\r\ncache-control: no-store\r\nx-content-type-options: nosniff\r\n" % request_id.encode()
                + retry
                + b"connection: close\r\n\r\n"
                + body
            )
        if self._receiving_body:
            self.transport.close()  # whoever handles the request is to know at once
        else:
            self._close_for_senders()

    def _close_for_senders(self) -> None:
        """Close towards the caller, who may still be sending, and read no more; cut the connection a while later.

        To cut it at once would fail what the caller is writing, and few read an answer after that (RFC 9112, 9.6). To read on
        would be work for as much as somebody likes to send.
        """
        self._deaf = True
        self.transport.write_eof()
        self.flow.pause_reading()
        self._cancel_linger_timer()
        self._linger_timer = self.loop.call_later(LINGER_SECONDS, self.transport.close)

    def _cancel_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _cancel_linger_timer(self) -> None:
        if self._linger_timer is not None:
            self._linger_timer.cancel()
            self._linger_timer = None

    def _cancel_reader_timer(self) -> None:
        if self._reader_timer is not None:
            self._reader_timer.cancel()
            self._reader_timer = None

    @property
    def idle(self) -> bool:
        """Nothing is being received or answered."""
        return not self._receiving_headers and (self.cycle is None or self.cycle.response_complete)


class Server(uvicorn.Server):
    """Stops so that nobody notices, and leaves the signals to the service that it is a part of."""

    def __init__(self, config: uvicorn.Config, gate: Gate, *, grace_seconds: float, drain_seconds: float) -> None:
        super().__init__(config)
        self._gate = gate
        self._grace_seconds = grace_seconds
        self._drain_seconds = drain_seconds
        self.listening = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more; answer what is in hand; give idle connections the time to send one more request.

        A connection that is closed while a request is on its way to it fails that request, and a caller cannot know whether it
        was carried out. So each connection is closed with its next answer, which says so, and only those on which nothing came
        within the grace period are closed as they are.
        """
        for server in self.servers:
            server.close()
        for listener in sockets or []:
            listener.close()
        self._gate.stop.set()
        if not await self._gone(self._grace_seconds, idle_too=True):
            for connection in self._connections():
                if connection.idle:
                    connection.transport.close()
            await self._gone(self._drain_seconds, idle_too=False)
        for connection in self._connections():
            connection.transport.abort()

    def _connections(self) -> list[Protocol]:
        return [connection for connection in self.server_state.connections if isinstance(connection, Protocol)]

    async def _gone(self, seconds: float, *, idle_too: bool) -> bool:
        """Wait until no connection is left, or none that is not idle; False when the time is over first."""
        try:
            async with asyncio.timeout(seconds):
                # uvicorn keeps a set of connections, and no event that tells of its changes.
                while any(idle_too or not connection.idle for connection in self._connections()):  # noqa: ASYNC110
                    await asyncio.sleep(POLL_SECONDS)
        except TimeoutError:
            return False
        return True


def listen(settings: EdgeSettings) -> socket.socket:
    """The listening socket: the inherited one, or one of our own."""
    if settings.edge_socket_fd is not None:
        try:
            return socket.socket(fileno=settings.edge_socket_fd)
        except OSError:
            raise ConfigurationError(
                f"PORTCULLIS_EDGE_SOCKET_FD is {settings.edge_socket_fd}, which is no socket; leave it unset to listen on a port"
            ) from None
    family = socket.AF_INET6 if ":" in settings.edge_host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((settings.edge_host, settings.edge_port))
    except OSError as error:
        listener.close()
        raise ConfigurationError(
            f"cannot listen on {settings.edge_host}:{settings.edge_port} ({error.strerror}); "
            "set PORTCULLIS_EDGE_PORT to a free port"
        ) from None
    return listener


@asynccontextmanager
async def serving(gate: Gate, settings: EdgeSettings) -> AsyncIterator[None]:
    """Serve `gate` until the end of the block, which waits for what is in hand."""
    listener = listen(settings)
    proxies = settings.trusted_proxy_networks

    class Configured(Protocol):
        """uvicorn makes the connections itself, from a class."""

    Configured.settings = settings
    # uvicorn tells of every request that it cannot parse: anybody could fill the log with those.
    config = uvicorn.Config(
        gate,
        http=Configured,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level=logging.ERROR,
        access_log=False,
        server_header=False,
        proxy_headers=bool(proxies),
        forwarded_allow_ips=list(proxies),
        timeout_keep_alive=settings.keep_alive_seconds,
        backlog=BACKLOG,
    )
    server = Server(config, gate, grace_seconds=settings.edge_stop_grace_seconds, drain_seconds=settings.drain_seconds)
    task: asyncio.Task[Any] = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        await server.listening.wait()
        yield
    finally:
        server.should_exit = True
        await task
