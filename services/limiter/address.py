"""Where Redis is: one server by its URL, the primary that sentinels name, or the nodes of a cluster."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import SplitResult, urlsplit

from redis.asyncio.connection import SSLConnection, parse_url

SENTINEL_PORT: Final = 26379
REDIS_PORT: Final = 6379
A_CLUSTER: Final = (
    "this is a node of a Redis Cluster; name some of its nodes as in redis+cluster://:password@host:6379,host:6379 "
    "(rediss+cluster:// for TLS)"
)
NO_CLUSTER: Final = (
    "this is no node of a Redis Cluster; name a single server as in redis://:password@host:6379/0, or its sentinels as in "
    "redis+sentinel://:password@host:26379,host:26379/mymaster/0"
)
_PRIMARY: Final = re.compile(r"[A-Za-z0-9._-]+")  # as Sentinel's own configuration has it

Address = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Sentinels:
    """Some of the sentinels that watch over the primary called `primary`. `connection`: how one talks to that; `own`: to them."""

    addresses: tuple[Address, ...]
    primary: str
    connection: Mapping[str, Any] = field(repr=False)
    own: Mapping[str, Any] = field(repr=False)
    tls: bool


@dataclass(frozen=True, slots=True)
class Nodes:
    """Some of the nodes of a cluster, which know the others. `connection`: how one talks to any of them."""

    addresses: tuple[Address, ...]
    connection: Mapping[str, Any] = field(repr=False)
    tls: bool


def located(url: str) -> Sentinels | Nodes | None:
    """Whom to ask where Redis is; None: the URL names Redis itself.

    `redis+sentinel://[user:password@]host[:port],…/primary[/database]`: sentinels. User and password are Redis's;
    `?sentinel_username=…&sentinel_password=…` are the sentinels' own. `redis+cluster://[user:password@]host[:port],…`: nodes of a
    cluster, which has no numbered databases. With `rediss+` it is TLS to all of them. Raises ValueError, which may quote the URL.
    """
    parts = urlsplit(url)
    base, _, way = parts.scheme.partition("+")
    if way not in ("sentinel", "cluster"):
        parse_url(url)
        return None
    if base not in ("redis", "rediss"):
        raise ValueError(parts.scheme)
    return _sentinels(base, parts) if way == "sentinel" else _nodes(base, parts)


def _sentinels(base: str, parts: SplitResult) -> Sentinels:
    primary, _, database = parts.path.strip("/").partition("/")
    if not _PRIMARY.fullmatch(primary) or not (database or "0").isdecimal():
        raise ValueError(parts.path)
    addresses, connection, tls = _connection(base, parts, database, SENTINEL_PORT)
    own = {name: connection.pop(f"sentinel_{name}") for name in ("username", "password") if f"sentinel_{name}" in connection}
    return Sentinels(addresses, primary, connection, own, tls)


def _nodes(base: str, parts: SplitResult) -> Nodes:
    if parts.path.strip("/") not in ("", "0"):
        raise ValueError(parts.path)
    addresses, connection, tls = _connection(base, parts, "", REDIS_PORT)
    if connection.pop("db", 0):
        raise ValueError("a cluster has no databases")
    return Nodes(addresses, connection, tls)


def _connection(base: str, parts: SplitResult, database: str, port: int) -> tuple[tuple[Address, ...], dict[str, Any], bool]:
    """The hosts, what redis-py makes of the rest, and whether that is TLS."""
    user, _, hosts = parts.netloc.rpartition("@")
    connection: dict[str, Any] = dict(parse_url(f"{base}://{user}@redis/{database}?{parts.query}"))
    del connection["host"]
    tls = connection.pop("connection_class", None) is SSLConnection
    return tuple(_address(host, port) for host in hosts.split(",")), connection, tls


def _address(text: str, port: int) -> Address:
    parts = urlsplit(f"//{text.strip()}")
    if not parts.hostname:
        raise ValueError(text)
    return parts.hostname, parts.port or port
