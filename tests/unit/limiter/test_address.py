"""URLs of sentinels and of clusters."""

from __future__ import annotations

import pytest
from redis.asyncio import BlockingConnectionPool, SSLConnection
from redis.asyncio.sentinel import SentinelConnectionPool

from services.limiter import adapters
from services.limiter.address import Nodes, Sentinels, located


@pytest.mark.parametrize("url", ["redis://:p@host:6379/0", "rediss://host", "unix:///run/redis.sock?db=1"])
def test_a_url_of_redis_itself_names_no_sentinels(url: str) -> None:
    assert located(url) is None


def test_a_url_of_sentinels_says_all() -> None:
    url = "rediss+sentinel://me:p%40ss@one:26380,two,[::1]:26379/my-master/3?sentinel_password=other&sentinel_username=s"
    known = located(url)
    assert isinstance(known, Sentinels)
    assert known.addresses == (("one", 26380), ("two", 26379), ("::1", 26379))
    assert (known.primary, known.tls) == ("my-master", True)
    assert known.connection == {"username": "me", "password": "p@ss", "db": 3}
    assert known.own == {"username": "s", "password": "other"}
    assert "p@ss" not in repr(known)
    assert "other" not in repr(known)


def test_what_need_not_be_said_is_as_redis_has_it() -> None:
    known = located("redis+sentinel://one/mymaster")
    assert isinstance(known, Sentinels)
    assert (known.addresses, known.tls, known.connection, known.own) == ((("one", 26379),), False, {}, {})


async def test_the_pool_waits_for_a_connection_and_asks_sentinels_briefly() -> None:
    client = adapters.connect("redis+sentinel://:p@one,two/mymaster/1")
    pool = client.connection_pool
    assert isinstance(pool, SentinelConnectionPool)
    assert isinstance(pool, BlockingConnectionPool)
    assert pool.max_connections == adapters.MAX_CONNECTIONS + 1
    assert pool.connection_kwargs["db"] == 1
    for asked in pool.sentinel_manager.sentinels:
        ways = asked.connection_pool.connection_kwargs
        assert ways["socket_timeout"] == ways["socket_connect_timeout"] == adapters.SENTINEL_SECONDS
        assert ways.get("password") is None  # that is Redis's own
    await client.aclose()


def test_a_url_of_a_cluster_says_all() -> None:
    known = located("rediss+cluster://me:p%40ss@one:6380,two,[::1]:6379/0?ssl_ca_certs=ca.crt&ssl_check_hostname=no")
    assert isinstance(known, Nodes)
    assert known.addresses == (("one", 6380), ("two", 6379), ("::1", 6379))
    assert known.connection == {
        "username": "me",
        "password": "p@ss",
        "ssl_ca_certs": "ca.crt",
        "ssl_check_hostname": False,
    }
    assert known.tls
    assert "p@ss" not in repr(known)
    assert located("redis+cluster://one") == Nodes((("one", 6379),), {}, False)


async def test_every_node_of_a_cluster_is_spoken_to_as_the_url_says() -> None:
    known = located("rediss+cluster://me:p@one,two?ssl_ca_certs=ca.crt&timeout=9")
    assert isinstance(known, Nodes)
    client = adapters.connect_to_node(known, ("three", 7000))
    pool = client.connection_pool
    assert isinstance(pool, BlockingConnectionPool)
    assert (pool.connection_class, pool.timeout) == (SSLConnection, adapters.TIMEOUT_SECONDS)
    ways = pool.connection_kwargs
    assert (ways["host"], ways["port"], ways["username"], ways["ssl_ca_certs"]) == ("three", 7000, "me", "ca.crt")
    await client.aclose()
