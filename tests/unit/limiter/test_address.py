"""URLs of sentinels, and what is no use."""

from __future__ import annotations

import pytest
from pydantic import ValidationError
from redis.asyncio import BlockingConnectionPool
from redis.asyncio.sentinel import SentinelConnectionPool

from services.limiter import adapters
from services.limiter.address import sentinels
from services.limiter.settings import Settings


@pytest.mark.parametrize("url", ["redis://:p@host:6379/0", "rediss://host", "unix:///run/redis.sock?db=1"])
def test_a_url_of_redis_itself_names_no_sentinels(url: str) -> None:
    assert sentinels(url) is None


def test_a_url_of_sentinels_says_all() -> None:
    url = "rediss+sentinel://me:p%40ss@one:26380,two,[::1]:26379/my-master/3?sentinel_password=other&sentinel_username=s"
    known = sentinels(url)
    assert known is not None
    assert known.addresses == (("one", 26380), ("two", 26379), ("::1", 26379))
    assert (known.primary, known.tls) == ("my-master", True)
    assert known.connection == {"username": "me", "password": "p@ss", "db": 3}
    assert known.own == {"username": "s", "password": "other"}
    assert "p@ss" not in repr(known)
    assert "other" not in repr(known)


def test_what_need_not_be_said_is_as_redis_has_it() -> None:
    known = sentinels("redis+sentinel://one/mymaster")
    assert known is not None
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


def test_a_cluster_is_refused_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORTCULLIS_REDIS_URL", "redis+cluster://:secret@one:6379")
    with pytest.raises(ValidationError) as caught:
        Settings()
    (problem,) = caught.value.errors(include_input=False, include_url=False)
    assert "redis+sentinel://" in problem["msg"]
    assert "secret" not in str(caught.value)
