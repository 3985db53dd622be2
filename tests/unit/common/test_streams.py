"""Streams are made as configured, and left alone ever after."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any, cast

import nats.js.errors
import pytest
from nats.js import JetStreamContext, api
from pydantic import ValidationError

from libs.common.service import ConfigurationError
from libs.common.settings import CommonSettings
from libs.common.streams import Keeper, bucket, differences

WANTED = api.StreamConfig(
    name="USAGE", subjects=["usage.v1.recorded"], retention=api.RetentionPolicy.LIMITS, max_bytes=1000, num_replicas=3
)
NEEDS = ("subjects", "retention")


class FakeJetStream:
    """As much as the keeper asks. `refuses`: the error code with which the server answers a new stream."""

    def __init__(self, *streams: api.StreamConfig, refuses: int | None = None) -> None:
        self.streams = {stream.name: stream for stream in streams}
        self.consumers: dict[str, api.ConsumerConfig] = {}
        self.made: list[api.StreamConfig] = []
        self.refuses = refuses

    async def stream_info(self, name: str) -> Any:
        if name not in self.streams:
            raise nats.js.errors.NotFoundError(code=404, err_code=10059)
        return api.StreamInfo(self.streams[name], state=cast(Any, None))

    async def add_stream(self, config: api.StreamConfig) -> Any:
        if self.refuses is not None:
            error, self.refuses = nats.js.errors.BadRequestError(code=400, err_code=self.refuses), None
            self.streams[config.name] = replace(config, max_bytes=5)
            raise error
        self.made.append(config)
        self.streams[config.name] = config
        return await self.stream_info(str(config.name))

    async def consumer_info(self, _: str, name: str) -> Any:
        if name not in self.consumers:
            raise nats.js.errors.NotFoundError(code=404, err_code=10014)
        return api.ConsumerInfo(name, "S", self.consumers[name], created=cast(Any, None))

    async def add_consumer(self, _: str, config: api.ConsumerConfig) -> None:
        assert str(config.durable_name) not in self.consumers, "that would alter it"
        self.consumers[str(config.durable_name)] = config


def js(fake: FakeJetStream) -> JetStreamContext:
    return cast(JetStreamContext, fake)


async def test_a_stream_that_is_not_there_is_made(caplog: pytest.LogCaptureFixture) -> None:
    fake = FakeJetStream()
    await Keeper().stream(js(fake), WANTED, NEEDS)
    assert fake.made == [WANTED]
    assert [each for each in caplog.records if each.levelno >= logging.WARNING] == []


async def test_one_that_is_as_configured_is_not_worth_a_word(caplog: pytest.LogCaptureFixture) -> None:
    fake = FakeJetStream(replace(WANTED, description="ours", max_msgs=-1, subjects=["more", "usage.v1.recorded"]))
    await Keeper().stream(js(fake), WANTED, NEEDS)
    assert (fake.made, caplog.records) == ([], [])


async def test_one_that_is_otherwise_is_left_so_and_told_in_one_line_once(caplog: pytest.LogCaptureFixture) -> None:
    fake = FakeJetStream(replace(WANTED, max_bytes=5, num_replicas=1))
    keeper = Keeper()
    for _ in range(3):
        info = await keeper.stream(js(fake), WANTED, NEEDS)
        assert (info.config.max_bytes, info.config.num_replicas) == (5, 1)
    (line,) = [each.getMessage() for each in caplog.records]
    assert "USAGE" in line
    assert "max_bytes is 5, configured 1000" in line
    assert "num_replicas is 1, configured 3" in line
    assert "nats stream edit USAGE" in line
    assert "\n" not in line


async def test_one_with_which_the_service_cannot_work_ends_the_start() -> None:
    fake = FakeJetStream(replace(WANTED, retention=api.RetentionPolicy.WORK_QUEUE))
    with pytest.raises(ConfigurationError, match="USAGE cannot be used as it is: retention is workqueue, configured limits"):
        await Keeper().stream(js(fake), WANTED, NEEDS)
    assert fake.made == []


async def test_replicas_need_a_cluster() -> None:
    with pytest.raises(ConfigurationError, match="PORTCULLIS_STREAM_REPLICAS to 1, or PORTCULLIS_NATS_URL to a cluster"):
        await Keeper().stream(js(FakeJetStream(refuses=10074)), WANTED, NEEDS)


async def test_a_cluster_that_is_not_complete_yet_is_waited_for() -> None:
    with pytest.raises(nats.js.errors.BadRequestError):  # which the services take for JetStream being away
        await Keeper().stream(js(FakeJetStream(refuses=10005)), WANTED, NEEDS)


async def test_whoever_comes_second_takes_what_the_first_has_made(caplog: pytest.LogCaptureFixture) -> None:
    info = await Keeper().stream(js(FakeJetStream(refuses=10058)), WANTED, NEEDS)
    assert info.config.max_bytes == 5
    assert len(caplog.records) == 1


async def test_a_consumer_is_left_alone_as_well(caplog: pytest.LogCaptureFixture) -> None:
    wanted = api.ConsumerConfig(durable_name="webhooks", ack_wait=30.0)
    fake = FakeJetStream()
    await Keeper().consumer(js(fake), "JOB_HOOKS", wanted)
    assert fake.consumers == {"webhooks": wanted}
    await Keeper().consumer(js(fake), "JOB_HOOKS", replace(wanted, ack_wait=60.0))
    assert fake.consumers == {"webhooks": wanted}
    (line,) = [each.getMessage() for each in caplog.records]
    assert "ack_wait is 30.0, configured 60.0" in line


def test_what_is_not_configured_may_be_anything() -> None:
    found = api.StreamConfig(max_age=5.0, max_bytes=7)
    assert differences(found, api.StreamConfig(max_bytes=8), ("max_age", "max_bytes")) == {"max_bytes": (7, 8)}


def test_a_bucket_keeps_one_value_of_a_key_and_refuses_what_does_not_fit() -> None:
    made = bucket("JOBS", ttl_seconds=60, max_bytes=1000, replicas=3)
    assert (made.name, made.subjects, made.num_replicas) == ("KV_JOBS", ["$KV.JOBS.>"], 3)
    assert (made.max_msgs_per_subject, made.discard, made.duplicate_window) == (1, api.DiscardPolicy.NEW, 60)


@pytest.mark.parametrize("replicas", [0, 2, 4, 7])
def test_replicas_are_an_odd_number(replicas: int) -> None:
    with pytest.raises(ValidationError):
        CommonSettings(stream_replicas=replicas)


def test_servers_are_separated_by_commas() -> None:
    assert CommonSettings(nats_url="nats://a:4222, nats://b:4222").nats_url == "nats://a:4222,nats://b:4222"
    with pytest.raises(ValidationError):
        CommonSettings(nats_url="nats://a:4222,")
