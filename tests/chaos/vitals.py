"""What a stack has in hand, as its processes tell it and as it is seen from outside."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from libs.common.subjects import SERVICES
from tests.chaos.kit import Stack

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


@dataclass(frozen=True, slots=True)
class Health:
    """Who is there, and how much went wrong so far without being foreseen."""

    pids: Mapping[str, list[int]]
    failures: int

    @classmethod
    def of(cls, stack: Stack) -> Health:
        return cls({name: stack.pids(name) for name in SERVICES}, stack.log_text().count("Traceback"))
