"""The list of bad inputs leaves nothing out that a caller can cause, and names each row once."""

from __future__ import annotations

from collections import Counter

from libs.common.errors import CATALOGUE
from libs.common.subjects import DEFAULT_POOL, PERMISSIONS
from tests.bad_inputs import HTTP, NATS, STAGES

OF_THE_CALLER = {400, 401, 403, 404, 413, 415, 422, 431, 504}
"""The contract's statuses for what is wrong with a call itself. (409 needs a call before it, the others a gateway in trouble.)"""
HTTP_GROUPS = {
    *("not HTTP", "smuggling", "host", "no JSON", "lone surrogates", "bombs", "types", "fields", "credentials", "paths"),
    *("floods", "trickles", "NDJSON", "Unicode", "slow readers"),
}
NATS_GROUPS = {"undecodable", "oversized", "expired", "forged reply", "version 99", "no deadline", "headers", "door"}


def test_every_status_that_a_call_itself_can_have_is_in_the_list() -> None:
    assert {CATALOGUE[row.code].status for row in HTTP if row.code is not None} == OF_THE_CALLER


def test_every_kind_of_bad_input_is_in_the_list() -> None:
    assert {row.group for row in HTTP} == HTTP_GROUPS
    assert {row.group for row in NATS} == NATS_GROUPS
    assert {"CL, then TE", "TE, then CL", "two lengths", "bare LF"} <= {row.name for row in HTTP if row.group == "smuggling"}
    assert "none" in {row.name for row in HTTP if row.group == "host"}


def test_every_service_that_takes_messages_is_sent_some() -> None:
    reached = {
        name for name, own in PERMISSIONS.items() if {each.replace("*", DEFAULT_POOL) for each in own.subscribe} & set(STAGES)
    }
    assert reached == {"auth", "limiter", "detector_proxy", "fallback_model", "jobs"}


def test_each_row_has_a_name_of_its_own_and_a_time() -> None:
    names = [*((row.group, row.name) for row in HTTP), *((row.group, row.name) for row in NATS)]
    assert [name for name, count in Counter(names).items() if count > 1] == []
    assert all(0 < seconds <= 20 for seconds in (*(row.seconds for row in HTTP), *(row.seconds for row in NATS)))
