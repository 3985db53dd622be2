"""nats-py against what others may do to it: a client, through the server, and whoever stands between the server and us.

What a client sends must not end the connection of the service that receives it.

The server passes on headers and reply subjects as they are: any bytes but spaces, tabs and line ends in a reply subject, and any
at all in headers. nats-py takes more for spaces than the server does, and an error in reading any of it ends its reading for good
(`tests/integration/test_nats_door.py` sends all of that). What cannot be read becomes what no handler accepts.

Whether a connection is encrypted nats-py leaves to the server's greeting, which is not: with `tls_required` taken out of it, the
password would be sent as it is. Here it is sent over TLS or not at all when TLS was asked for, by a tls:// URL or by a CA.
"""

from __future__ import annotations

import re
from typing import Any, Final

import nats.errors
from faststream.nats import NatsBroker
from nats.aio.client import Client
from nats.protocol import parser

UNREADABLE_REPLY: Final = b"unreadable"
"""No inbox: nothing is ever answered there."""

# As nats-py's own, but that words end where the server ends them: it is at form feeds and the like that the two disagree.
_MSG: Final = re.compile(rb"\AMSG[ \t]+([^ \t\r\n]+)[ \t]+([^ \t\r\n]+)[ \t]+(([^ \t\r\n]+)[ \t]+)?(\d+)\r\n")
_HMSG: Final = re.compile(rb"\AHMSG[ \t]+([^ \t\r\n]+)[ \t]+([^ \t\r\n]+)[ \t]+(([^ \t\r\n]+)[ \t]+)?(\d+)[ \t]+(\d+)\r\n")


class PlainTextError(nats.errors.Error):
    """The server does not offer the TLS that was asked for."""

    def __str__(self) -> str:
        return "the server offers no TLS"


class _EncryptedClient(Client):
    """Says who it is over TLS only, when TLS was asked for."""

    def _connect_command(self) -> bytes:
        asked = self.options.get("tls") is not None or any(server.uri.scheme == "tls" for server in self._server_pool)
        if asked and not self._server_info.get("tls_required"):
            raise PlainTextError
        return super()._connect_command()


class GuardedBroker(NatsBroker):
    """FastStream's broker on such a client."""

    async def _connect(self) -> Client:
        connection = _EncryptedClient()
        await connection.connect(**self._connection_kwargs)
        self.config.connect(connection)
        return connection


def guard(connection: Client) -> None:
    """Make a connection proof against them, before it subscribes to anything."""
    parser.MSG_RE, parser.HMSG_RE = _MSG, _HMSG
    read_headers, build = connection._process_headers, connection._build_message

    async def headers_or_none(headers: bytes | None) -> dict[str, str] | None:
        try:
            return await read_headers(headers)
        except Exception:  # noqa: BLE001  # IndexError, UnicodeDecodeError and whatever else bytes from outside lead to
            return None

    def readable(sid: int, subject: bytes, reply: bytes, data: bytes, headers: dict[str, str] | None) -> Any:
        try:
            reply.decode()
        except UnicodeDecodeError:
            reply = UNREADABLE_REPLY
        return build(sid, subject, reply, data, headers)

    connection._process_headers = headers_or_none  # type: ignore[method-assign]
    connection._build_message = readable  # type: ignore[method-assign]
