"""What a stack has in hand, as its processes tell it and as it is seen from outside."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import psutil
from prometheus_client.parser import text_string_to_metric_families

from libs.common.subjects import SERVICES
from tests.chaos.kit import SERVERS, Stack, callers
from tests.chaos.questions import is_right, question

IN_HAND = (
    "portcullis_http_in_flight",
    "portcullis_detect_in_flight",
    "portcullis_batches_in_flight",
    "portcullis_stage_in_flight",
    "portcullis_stage_queued",
    "portcullis_engine_in_flight",
)
"""Gauges that are 0 when nobody asks for anything."""


def gauges(stack: Stack) -> Mapping[tuple[str, str], float]:
    """Every family's sum in each service, all replicas together; by service and family."""
    found: defaultdict[tuple[str, str], float] = defaultdict(float)
    for group in json.loads((stack.home / "prometheus" / "targets.json").read_text()):
        for target in group["targets"]:
            with urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as page:
                for family in text_string_to_metric_families(page.read().decode()):
                    if family.type == "gauge":
                        found[group["labels"]["service"], family.name] += sum(sample.value for sample in family.samples)
    return found


def in_hand(stack: Stack) -> Mapping[tuple[str, str], float]:
    """What is not done yet; nothing when the stack is at rest."""
    return {key: value for key, value in gauges(stack).items() if key[1] in IN_HAND and value}


async def until_at_rest(stack: Stack, seconds: float = 30.0) -> None:
    """Wait until no process has anything in hand."""
    left: Mapping[tuple[str, str], float] = {}
    try:
        async with asyncio.timeout(seconds):
            while left := await asyncio.to_thread(in_hand, stack):
                await asyncio.sleep(0.1)
    except TimeoutError:
        raise AssertionError(f"still in hand after {seconds} s: {dict(left)}") from None


async def assert_answers(stack: Stack) -> None:
    """Right, and healthy."""
    async with callers(stack) as session:
        for number in range(2):
            headers = {"X-API-Key": stack.key}
            async with session.post("/v1/detect", json={"text": question(number).text}, headers=headers) as response:
                assert response.status == 200, await response.text()
                assert is_right(question(number), await response.json())
        async with session.get("/health") as response:
            assert (await response.json())["status"] == "healthy"


@dataclass(frozen=True, slots=True)
class Health:
    """Who is there, and how much went wrong so far without being foreseen."""

    pids: Mapping[str, list[int]]
    failures: int

    @classmethod
    def of(cls, stack: Stack) -> Health:
        return cls({name: stack.pids(name) for name in SERVICES}, stack.log_text().count("Traceback"))


TASKS = "portcullis_event_loop_tasks"
POOL_LIMIT = "portcullis_pool_connections_limit"


def held(stack: Stack) -> Mapping[tuple[str, str], int]:
    """What each service and server holds on to: open files and connections, as the system tells, and tasks of the event loop.

    Of PostgreSQL nothing, whose own workers come and go; auth's connections to it are among auth's.
    """
    found: dict[tuple[str, str], int] = {}
    for name in (*SERVICES, *(name for name in SERVERS if name != "postgres")):
        processes = [psutil.Process(pid) for pid in stack.pids(name)]
        found[name, "files"] = sum(process.num_fds() for process in processes)
        found[name, "connections"] = sum(len(process.net_connections()) for process in processes)
    return found | {(name, "tasks"): int(value) for (name, family), value in gauges(stack).items() if family == TASKS}


def most_held(samples: Sequence[Mapping[tuple[str, str], int]], stack: Stack) -> Mapping[tuple[str, str], int]:
    """The most of each, and what pools of connections may still grow by, to a Redis and a PostgreSQL of bounded size."""
    limits = {name: int(value) for (name, family), value in gauges(stack).items() if family == POOL_LIMIT}
    room = {"auth": limits["auth"], "limiter": limits["limiter"], "redis": limits["limiter"]}
    return {
        (name, what): max(sample[name, what] for sample in samples) + (room.get(name, 0) if what != "tasks" else 0)
        for name, what in samples[0]
    }


async def until_let_go(stack: Stack, before: Mapping[tuple[str, str], int], seconds: float) -> None:
    """Wait until nothing is held that was not held before."""
    more: dict[tuple[str, str], str] = {}
    try:
        async with asyncio.timeout(seconds):
            while more := {
                key: f"{before[key]} → {count}"
                for key, count in (await asyncio.to_thread(held, stack)).items()
                if count > before[key]
            }:
                await asyncio.sleep(0.2)
    except TimeoutError:
        raise AssertionError(f"still held after {seconds} s: {more}") from None
