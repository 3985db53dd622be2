"""A server of a cluster that lags behind must not make a page of results look like the last."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import nats.js.errors
import pytest
from nats.js.api import RawStreamMsg

from libs.common.bus import Bus
from libs.common.errors import ErrorCode, PortcullisError
from services.jobs.adapters import JetStream, JetStreamResults
from services.jobs.settings import Settings


@dataclass
class Lagging:
    """As much of `JetStream` as results are read by. `there`: what has come to the server; `newest`: what its leader has."""

    there: tuple[int, ...]
    newest: int | None
    more: bool = False

    async def read(self, _: str, __: str, after: int, ___: int, **____: Any) -> tuple[list[Any], bool]:
        found = [place for place in self.there if place > after]
        return [
            SimpleNamespace(metadata=SimpleNamespace(sequence=SimpleNamespace(stream=one)), data=b"") for one in found
        ], self.more

    async def last(self, _: str, __: str) -> RawStreamMsg | None:
        return RawStreamMsg(seq=self.newest) if self.newest is not None else None


async def page(stream: Lagging, after: int = 0) -> tuple[list[int], bool]:
    found, more = await JetStreamResults(cast(JetStream, stream)).page("key", "job", after, 10, 1000)
    return [place for place, _ in found], more


@pytest.mark.parametrize(
    ("stream", "after", "expected"),
    [
        (Lagging((1, 2), newest=2), 0, ([1, 2], False)),
        (Lagging((), newest=None), 0, ([], False)),
        (Lagging((1, 2), newest=2), 2, ([], False)),
        (Lagging((1, 2), newest=3), 0, ([1, 2], True)),
        (Lagging((1, 2), newest=9, more=True), 0, ([1, 2], True)),
    ],
)
async def test_the_last_page_is_last_by_the_word_of_the_leader(
    stream: Lagging, after: int, expected: tuple[list[int], bool]
) -> None:
    assert await page(stream, after) == expected


@pytest.mark.parametrize("after", [0, 2])
async def test_a_page_that_would_say_too_early_that_nothing_comes_is_refused(after: int) -> None:
    with pytest.raises(PortcullisError) as caught:
        await page(Lagging((1, 2) if after else (), newest=3), after)
    assert caught.value.code == ErrorCode.STAGE_UNAVAILABLE


class Api:
    """A connection's JetStream on which every message is missing for the same reason."""

    def __init__(self, code: int) -> None:
        self._code = code

    async def get_msg(self, _: str, subject: str) -> RawStreamMsg:
        raise nats.js.errors.NotFoundError(code=404, err_code=self._code, description=subject)


async def test_a_stream_that_is_not_there_says_nothing_about_what_it_held() -> None:
    def stream(code: int) -> JetStream:
        connection = SimpleNamespace(jetstream=lambda timeout: Api(code))
        return JetStream(cast(Bus, SimpleNamespace(connection=connection)), Settings())

    assert await stream(10037).last("JOB_RESULTS", "a") is None
    with pytest.raises(nats.js.errors.NotFoundError):
        await stream(10059).last("JOB_RESULTS", "a")
