"""`./run jobs dead-letters`: what was given up, and another try of it."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import AsyncIterator, Sequence
from typing import TextIO

import msgspec

from libs.common import settings as settings_module
from libs.common.bus import Bus
from libs.common.clock import Clock
from libs.common.context import new_request_id
from libs.common.contracts import MAX_JOB_APPEND, DeadLetter, JobItem
from libs.common.errors import PortcullisError
from libs.common.subjects import JOB_DEAD_STREAM, job_subject
from services.jobs import core
from services.jobs.adapters import JetStream, JetStreamQueues, JetStreamRecords, translated
from services.jobs.core import JobRecord
from services.jobs.settings import Settings

CONNECT_SECONDS = 5.0
_LETTER = msgspec.json.Decoder(DeadLetter)


class NothingToReplayError(Exception):
    """No dead letter of the job holds an item."""


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="./run jobs", description="What became of jobs.")
    commands = parser.add_subparsers(dest="command", required=True)
    letters = commands.add_parser("dead-letters", help="the items that were given up, with the reason (never their texts)")
    letters.add_argument("--replay", metavar="JOB", help="submit the items of this job again, as a new job of the same key")
    parsed = parser.parse_args(arguments)
    try:
        return asyncio.run(_run(settings_module.load(Settings), parsed.replay, sys.stdout))
    except NothingToReplayError:
        print(f"portcullis jobs: job {parsed.replay} has no dead letters", file=sys.stderr)  # noqa: T201
    except (PortcullisError, TimeoutError, OSError) as error:
        print(f"portcullis jobs: NATS cannot be asked; does the stack run? ({error})", file=sys.stderr)  # noqa: T201
    return 1


async def _run(settings: Settings, replayed: str | None, out: TextIO) -> int:
    bus = Bus("jobs", settings)
    async with asyncio.timeout(CONNECT_SECONDS):
        await bus.connect()
    try:
        stream = JetStream(bus, settings)
        if replayed is None:
            await show(stream, out)
        else:
            out.write(f"{await replay(stream, bus.clock, replayed)}\n")
    finally:
        await bus.drain()
    return 0


async def letters(stream: JetStream, job_id: str | None = None) -> AsyncIterator[DeadLetter]:
    """Dead letters in the order in which they were given up; of one job, or of all."""
    after, more = 0, True
    while more:
        with translated("reading dead letters"):
            messages, more = await stream.read(JOB_DEAD_STREAM, job_subject("*", job_id or "*", "dead"), after, 100)
        for message in messages:
            after = message.metadata.sequence.stream
            yield _LETTER.decode(message.data)


async def show(stream: JetStream, out: TextIO) -> None:
    """One line for each: when, key, job, item, reason."""
    async for letter in letters(stream):
        out.write(f"{letter.at}  {letter.key_id}  {letter.job_id}  item {letter.index}  {letter.reason}\n")


async def replay(stream: JetStream, clock: Clock, job_id: str) -> str:
    """Submit a job's dead letters again, as a job of the same key; its id. They are removed once that is accepted.

    A job of its own, since an item's one result is never changed. Raises `NothingToReplayError`.
    """
    found = [letter async for letter in letters(stream, job_id) if letter.item is not None]
    if not found:
        raise NothingToReplayError
    key_id = found[0].key_id
    records, queues = JetStreamRecords(stream), JetStreamQueues(stream)
    kept = await records.get(key_id, job_id)
    now_ms = int(clock.now() * 1000)
    new_id = core.new_job_id(now_ms, new_request_id())
    await queues.open(key_id, new_id)
    record = JobRecord(key_id=key_id, job_id=new_id, state="open", created_ms=now_ms, updated_ms=now_ms)
    await records.create(record)
    texts: list[JobItem] = [letter.item for letter in found if letter.item is not None]
    for first in range(0, len(texts), MAX_JOB_APPEND):
        await queues.append(key_id, new_id, first, texts[first : first + MAX_JOB_APPEND])
    opened = await records.get(key_id, new_id)
    assert opened is not None
    await records.update(
        core.seal(
            opened.record,
            int(clock.now() * 1000),
            total=len(texts),
            digest="",
            threshold=kept.record.threshold if kept is not None else None,
            detailed=kept is not None and kept.record.detailed,
            webhook=None,
        ),
        opened.revision,
    )
    with translated("removing dead letters"):
        for letter in found:
            await stream.api.purge_stream(JOB_DEAD_STREAM, subject=job_subject(key_id, job_id, "dead", letter.index))
    return new_id
