"""Where Redis is: one server by its URL, or the primary that sentinels name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

from redis.asyncio.connection import SSLConnection, parse_url

SENTINEL_PORT: Final = 26379
NO_CLUSTER: Final = (
    "a Redis Cluster cannot be used: the limits that are decided together lie on one server; "
    "name a primary, or its sentinels as in redis+sentinel://host:26379,host:26379/mymaster/0"
)
_PRIMARY: Final = re.compile(r"[A-Za-z0-9._-]+")  # as Sentinel's own configuration has it


@dataclass(frozen=True, slots=True)
class Sentinels:
    """Some of the sentinels that watch over the primary called `primary`. `connection`: how one talks to that; `own`: to them."""

    addresses: tuple[tuple[str, int], ...]
    primary: str
    connection: Mapping[str, Any] = field(repr=False)
    own: Mapping[str, Any] = field(repr=False)
    tls: bool


def sentinels(url: str) -> Sentinels | None:
    """The sentinels of `redis+sentinel://[user:password@]host[:port],…/primary[/database]`; None: the URL names Redis itself.

    `rediss+sentinel://` is TLS to all of them. User and password are Redis's; `?sentinel_username=…&sentinel_password=…` are the
    sentinels' own. Raises ValueError, which may quote the URL.
    """
    parts = urlsplit(url)
    base, _, way = parts.scheme.partition("+")
    if way == "cluster":
        raise ClusterError(NO_CLUSTER)
    if way != "sentinel":
        parse_url(url)
        return None
    if base not in ("redis", "rediss"):
        raise ValueError(parts.scheme)
    user, _, hosts = parts.netloc.rpartition("@")
    primary, _, database = parts.path.strip("/").partition("/")
    if not _PRIMARY.fullmatch(primary) or not (database or "0").isdecimal():
        raise ValueError(parts.path)
    one = f"{base}://{user}@redis/{database}?{parts.query}"
    connection: dict[str, Any] = dict(parse_url(one))
    del connection["host"]
    tls = connection.pop("connection_class", None) is SSLConnection
    own = {name: connection.pop(f"sentinel_{name}") for name in ("username", "password") if f"sentinel_{name}" in connection}
    return Sentinels(tuple(map(_address, hosts.split(","))), primary, connection, own, tls)


class ClusterError(ValueError):
    """The URL names a Redis Cluster."""


def _address(text: str) -> tuple[str, int]:
    parts = urlsplit(f"//{text.strip()}")
    if not parts.hostname:
        raise ValueError(text)
    return parts.hostname, parts.port or SENTINEL_PORT
