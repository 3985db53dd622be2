"""Attacks in texts of nothing but marks, invisible characters and changes of direction, as long as a text may be; and batches
of such texts. Each of them alone is a row of `tests/bad_inputs.py`.
"""

from __future__ import annotations

import json
import time
from typing import Any

import aiohttp
import pytest

from libs.common.contracts import MAX_TEXT_CHARACTERS
from libs.common.subjects import SERVICES
from tests.bad_inputs import UNICODE_FLOODS, flood
from tests.chaos.kit import ATTACK, CONTRACT_STATUSES, Stack, callers, wait_for_detection

DEADLINE_SECONDS = 10.0
"""The default of a call."""
OF_THE_LOOP_SECONDS = 1.0
"""How late this process may read an answer that came in time, on a machine that is busy with other things."""


HIDDEN = {
    "behind zero width": flood("\u200b", "\u200b" * (MAX_TEXT_CHARACTERS - len(ATTACK)))[: -len(ATTACK)] + ATTACK,
    "under marks": "".join(char + "\u0301" * 100 for char in ATTACK),
    "between directions": "".join(f"\u202d{char}\u202c" for char in ATTACK) + "\u202e" * 50_000,
}
"""The attack is in there, and a model reads it."""


def check_verdict(answer: dict[str, Any], text: str) -> None:
    assert 0 <= answer["confidence"] <= 1
    assert answer["coverage"]["truncated"] is False
    assert all(0 <= span["start"] < span["end"] <= len(text) for span in answer.get("spans", []))


async def detect(session: aiohttp.ClientSession, stack: Stack, text: str) -> tuple[int, dict[str, Any]]:
    """Status and answer, which came in time."""
    body = json.dumps({"text": text, "config": {"detailed_response": True}})
    began = time.monotonic()
    headers = {"X-API-Key": stack.key, "Content-Type": "application/json"}
    async with session.post("/v1/detect", data=body, headers=headers) as response:
        answer = await response.json(content_type=None)
    assert time.monotonic() - began < DEADLINE_SECONDS + OF_THE_LOOP_SECONDS
    return response.status, answer


@pytest.fixture
def unharmed(stack: Stack) -> Any:
    """The same processes before and after, with nothing unforeseen in their logs, and right about what is plain."""
    wait_for_detection(stack, 30)
    pids = {name: stack.pids(name) for name in SERVICES}
    failures = stack.log_text().count("Traceback")
    yield
    wait_for_detection(stack, 30)
    assert {name: stack.pids(name) for name in SERVICES} == pids
    assert stack.log_text().count("Traceback") == failures


@pytest.mark.usefixtures("unharmed")
async def test_what_is_hidden_in_a_flood_is_found(stack: Stack) -> None:
    async with callers(stack) as session:
        for name, text in HIDDEN.items():
            status, answer = await detect(session, stack, text)
            assert (status, answer.get("is_malicious")) == (200, True), name


@pytest.mark.usefixtures("unharmed")
async def test_a_batch_of_floods_has_a_line_for_each(stack: Stack) -> None:
    lines = "".join(json.dumps({"id": name, "text": text}) + "\n" for name, text in UNICODE_FLOODS.items())
    headers = {"X-API-Key": stack.key, "Content-Type": "application/x-ndjson"}
    async with callers(stack) as session, session.post("/v1/detect/batch", data=lines, headers=headers) as response:
        *results, last = [json.loads(line) async for line in response.content]
    assert response.status == 200
    assert sorted(result["id"] for result in results) == sorted(UNICODE_FLOODS)
    for result in results:
        if "error" in result:
            assert result["error"]["status"] in CONTRACT_STATUSES
        else:
            check_verdict(result, UNICODE_FLOODS[result["id"]])
    assert last["summary"]["total"] == len(UNICODE_FLOODS)
