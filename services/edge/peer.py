"""The caller's end of a connection, as the server knows it and ASGI does not tell."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

PEER = "portcullis.peer"
"""Where the `Peer` is in the ASGI scope; there is none outside our own server."""


@dataclass(slots=True)
class Peer:
    """`gone`: set when the connection is lost, whether or not anybody reads from it. `abort`: cut it, whatever is unsent."""

    abort: Callable[[], None]
    gone: asyncio.Event = field(default_factory=asyncio.Event)


def peer_of(scope: MutableMapping[str, Any]) -> Peer | None:
    peer: Peer | None = scope.get(PEER)
    return peer
