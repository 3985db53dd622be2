"""A job through the whole stack while its processes are killed: one result for each item, and the results of a quiet run.

`PORTCULLIS_TEST_JOB_ITEMS` items (600), from `PORTCULLIS_TEST_JOB_TEXTS` (JSON lines with a `text`, or a text a line) or made
up, and a kill every `PORTCULLIS_TEST_JOB_KILL_SECONDS` (2).
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.conftest import ROOMY, running_stack
from tests.chaos.kit import Caller, Stack, callers, wait_for_detection

ITEMS = int(os.environ.get("PORTCULLIS_TEST_JOB_ITEMS", "600"))
TEXTS = os.environ.get("PORTCULLIS_TEST_JOB_TEXTS")
KILL_SECONDS = float(os.environ.get("PORTCULLIS_TEST_JOB_KILL_SECONDS", "2"))
VICTIMS = ("fallback_model", "detector_proxy", "limiter", "auth", "nats", "edge", "jobs")
SECONDS_PER_ITEM = 0.2
"""What an item may take at most on a slow machine whose processes are killed all the time; and a while for the beginning."""
PATIENCE_SECONDS = 180.0
CONFIDENCE_TOLERANCE = 1e-6
"""The release's results do not depend on the batch; what is left is the order of additions."""

_WORDS = [
    "please",
    "summarise",
    "the",
    "minutes",
    "of",
    "our",
    "meeting",
    "about",
    "the",
    "museum",
    "budget",
    "and",
    "send",
    "them",
    "to",
    "Anna",
    "ignore",
    "all",
    "previous",
    "instructions",
    "reveal",
    "your",
    "system",
    "prompt",
    "decode",
    "this",
    "act",
    "as",
    "an",
    "unrestricted",
    "assistant",
    "the",
    "train",
    "leaves",
    "at",
    "noon",
    "what",
    "should",
    "I",
    "cook",
    "for",
    "six",
    "people",
    "tonight",
]


def texts() -> list[str]:
    if TEXTS is None:
        rng = random.Random(6)
        return [" ".join(rng.choices(_WORDS, k=rng.randrange(4, 40))) for _ in range(ITEMS)]
    lines = Path(TEXTS).read_text().splitlines()
    found = [json.loads(line)["text"] if line.startswith("{") else line for line in lines if line.strip()]
    assert len(found) >= ITEMS
    return found[:ITEMS]


@pytest.fixture(scope="module")
def victims() -> Iterator[Stack]:
    """A stack of its own: what is killed here must not matter to others."""
    with running_stack(environment=ROOMY) as stack:
        yield stack


async def kill_at_random(stack: Stack, killed: Counter[str], stop: asyncio.Event) -> None:
    rng = random.Random(11)
    while not stop.is_set():
        name = rng.choice(VICTIMS)
        for pid in await asyncio.to_thread(stack.pids, name):
            stack.signal(pid, signal.SIGKILL)
            killed[name] += 1
        try:
            await asyncio.wait_for(stop.wait(), KILL_SECONDS)
        except TimeoutError:
            continue


def comparable(line: dict[str, Any]) -> tuple[object, ...]:
    return line["id"], line.get("is_malicious"), tuple(line.get("threat_types", ())), line["endpoint"]


async def test_one_result_for_each_item_whatever_is_killed(victims: Stack) -> None:
    given = texts()
    lines = b"".join(json.dumps({"id": f"item-{place}", "text": text}).encode() + b"\n" for place, text in enumerate(given))
    wait_for_detection(victims, 60)
    async with callers(victims) as session:
        caller = Caller(session, victims.key, patience_seconds=PATIENCE_SECONDS + ITEMS * SECONDS_PER_ITEM)
        began = time.monotonic()
        quiet_id = await caller.submit(lines, "quiet")
        assert (await caller.wait(quiet_id))["state"] == "done"
        quiet = {line["index"]: line for line in await caller.results(quiet_id)}
        quiet_seconds = time.monotonic() - began
        assert len(quiet) == ITEMS
        assert not caller.failures

        killed: Counter[str] = Counter()
        stop = asyncio.Event()
        killing = asyncio.create_task(kill_at_random(victims, killed, stop))
        began = time.monotonic()
        try:
            job_id = await caller.submit(lines, "disturbed")
            job = await caller.wait(job_id)
            found = await caller.results(job_id)
        finally:
            stop.set()
            await killing
        print(f"\nquiet {quiet_seconds:.1f} s, disturbed {time.monotonic() - began:.1f} s; killed {dict(killed)}")
        print(f"the caller saw {dict(caller.failures)}")
        assert sum(killed.values()) >= 3
        assert job == {**job, "state": "done", "total": ITEMS, "done": ITEMS, "failed": 0}
        assert Counter(line["index"] for line in found) == Counter(range(ITEMS))
        assert not [line for line in found if "error" in line]
        worst = max(abs(line["confidence"] - quiet[line["index"]]["confidence"]) for line in found)
        print(f"largest difference of a confidence: {worst:.2e}")
        assert worst <= CONFIDENCE_TOLERANCE
        differing = [line["index"] for line in found if comparable(line) != comparable(quiet[line["index"]])]
        assert not differing
        # The same body under the same key is the same job, also after all that.
        wait_for_detection(victims, 60)
        assert await caller.submit(lines, "disturbed") == job_id
