"""`./run bench scale`: what more of something costs. Each of these is a part by itself, too.

- replicas: 2 and 4 of each stage against a stack with one of each, by turns, with the processor time of each stage for a request;
- length: the time of a text by its length;
- keys: one key in use and nothing else stored, against a stack with 1 000 000 keys in PostgreSQL and Redis;
- sizes: the time of a text in lists of 1 to 1 000;
- connections: the same callers on 16 to 5 000 open connections.
"""

from __future__ import annotations

import random
import resource
import statistics
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import Any

import aiohttp
import asyncpg  # type: ignore[import-untyped]
import uvloop
from redis.asyncio import Redis

from libs.common import keys
from services.auth.core import verifier_of
from tests.bench.batch import Gateway
from tests.bench.figures import Spread, exponent, ratios
from tests.bench.generator import loading
from tests.bench.load import LIMITS, SENTENCES, BenchError, issued_key, made
from tests.bench.overhead import engine_environment
from tests.bench.report import CPU, GENERATOR, P50, RATE, Bar, Report, Row, values_of
from tests.bench.systems import DISTINCT_REQUESTS, Stack, System, engine, key_of, loaded, portcullis, requests
from tests.bench.turns import WARM_UP_SECONDS, Options, closed, in_turn, side_by_side

REPLICAS = (2, 4)
CALLERS = 32
LENGTHS = (100, 1_000, 10_000, 100_000)
KEYS = 1_000_000
IN_TURN = 20_000
"""Keys of which each request takes the next: more than are used again within the time for which auth remembers a key."""
WARM_KEYS = 1_000
SIZES = (1, 10, 100, 1_000)
CONNECTIONS = (16, 1_000, 5_000)
CONNECTION_CALLERS = 16
FLAT = 1.1
COPY_ROWS = 50_000
STATES = "rl:v1:key:"
"""Before a key's id: where the limiter keeps its state."""
PER_TEXT = "ms/text"


# --- replicas ----------------------------------------------------------------------------------------------------------------


def replicas(options: Options) -> Report:
    report = Report("replicas", f"Replicas, {CALLERS} callers")
    with engine() as stub:
        environment = engine_environment(stub.url)
        for stages, settings in ((("edge", "auth", "limiter", "detector_proxy"), environment), (("fallback_model",), {})):
            with portcullis(settings) as base:
                for stage in stages:
                    for count in REPLICAS:
                        print(f"bench replicas: {count} × {stage}", file=sys.stderr)  # it takes minutes
                        with portcullis(settings, {stage: count}) as more:
                            uvloop.run(_against(report, options, f"{count} × {stage}", base, more))
    return report


async def _against(report: Report, options: Options, setting: str, base: Stack, more: Stack) -> None:
    found = await side_by_side({"one of each": base, "more": more}, CALLERS, options.seconds, options.repeats)
    for name, stretches in found.items():
        report.add(name, setting, values_of(stretches))
    rate, cpu = (_ratio(report.row("more", setting), report.row("one of each", setting), figure) for figure in (RATE, CPU))
    report.notes.append(f"{setting}: {rate:.2f} of the throughput, {cpu:.2f} of the processor time for a request")


def _ratio(over: Row, under: Row, figure: str) -> Spread:
    return Spread.of(ratios(over.values[figure], under.values[figure]))


# --- length ------------------------------------------------------------------------------------------------------------------


def prose(characters: int, seed: int) -> str:
    """So many characters of words in no order: no two windows of it are alike."""
    rng = random.Random(seed)
    words = " ".join(SENTENCES).split()
    text = ""
    while len(text) < characters:
        text += " ".join(rng.choices(words, k=1_000)) + " "
    return text[:characters]


def length(options: Options) -> Report:
    with portcullis({}, together=options.together) as stack:
        return uvloop.run(_length(options, stack))


async def _length(options: Options, stack: Stack) -> Report:
    report = Report("length", "Length of a text, one caller", plotted=(P50, CPU))
    async with AsyncExitStack() as entered:
        key = await entered.enter_async_context(key_of(stack))
        systems = [
            await entered.enter_async_context(
                loaded(f"{size} characters", stack.port, stack.cpu, [prose(size, seed) for seed in range(16)], [key])
            )
            for size in LENGTHS
        ]
        work = dict.fromkeys((system.name for system in systems), closed(1, options.seconds))
        found = await in_turn(systems, work, options.repeats, closed(1, WARM_UP_SECONDS))
    for name, stretches in found.items():
        report.add("Portcullis", name, values_of(stretches))
    for figure in (P50, CPU):
        # The shortest has the cost of a call in it, which does not grow.
        slopes = [
            exponent(LENGTHS[1:], [report.row("Portcullis", f"{size} characters").values[figure][number] for size in LENGTHS[1:]])
            for number in range(options.repeats)
        ]
        report.bars.append(Bar(f"{figure} grows with the power", Spread.of(slopes), FLAT, at_least=False))
    return report


# --- keys --------------------------------------------------------------------------------------------------------------------


def keyring(options: Options) -> Report:
    with (
        engine() as stub,
        portcullis(engine_environment(stub.url), together=options.together) as few,
        portcullis(engine_environment(stub.url), together=options.together) as many,
    ):
        return uvloop.run(_keys(options, few, many))


async def _keys(options: Options, few: Stack, many: Stack) -> Report:
    report = Report("keys", f"Keys stored and in use, {CALLERS} callers")
    supply = made(IN_TURN)
    in_use = await _store_keys(many, KEYS, IN_TURN)
    async with (
        key_of(few) as only,
        loaded("1 stored, 1 in use", few.port, few.cpu, supply, [only]) as one,
        loaded(f"{KEYS} stored, 1 in use", many.port, many.cpu, supply, in_use[:1]) as same,
        loaded(f"{KEYS} stored, {WARM_KEYS} in use", many.port, many.cpu, supply, in_use[:WARM_KEYS]) as warm,
        loaded(f"{KEYS} stored, {IN_TURN} in turn", many.port, many.cpu, supply, in_use) as cold,
    ):
        systems = [one, same, warm, cold]
        work = dict.fromkeys((system.name for system in systems), closed(CALLERS, options.seconds))
        found = await in_turn(systems, work, options.repeats, closed(CALLERS, WARM_UP_SECONDS))
    for name, stretches in found.items():
        report.add("Portcullis", name, values_of(stretches))
    base = report.row("Portcullis", one.name)
    for system in (same, warm, cold):
        cost = _ratio(report.row("Portcullis", system.name), base, CPU)
        report.bars.append(Bar(f"processor time, {system.name}, of {one.name}", cost, FLAT, at_least=False))
    return report


async def _store_keys(stack: Stack, count: int, known: int) -> list[str]:
    """Put so many keys into PostgreSQL, and the limiter's state of each into Redis; returns `known` of them, to be used."""
    pepper = stack.setting("PORTCULLIS_KEY_PEPPER").encode()
    issued: list[str] = []
    now = datetime.now(UTC)
    limits = (LIMITS["rate_limit_per_minute"], LIMITS["rate_limit_per_day"])

    def record(number: int) -> tuple[Any, ...]:
        key_id = _key_id(number)
        verifier = bytes(32)
        if number % (count // known) == 0:
            issued.append(keys.generate(key_id))
            verifier = verifier_of(pepper, keys.digest(issued[-1]))
        return key_id, "Bench", ["detect", "batch"], *limits, now, verifier

    columns = ["key_id", "name", "scopes", "limit_minute", "limit_day", "created_at", "verifier"]
    database = await asyncpg.connect(stack.setting("PORTCULLIS_DATABASE_URL"))
    redis = Redis.from_url(stack.setting("PORTCULLIS_REDIS_URL"))
    try:
        state = await _a_state(stack, redis)
        for begin in range(0, count, COPY_ROWS):
            numbers = range(begin, min(count, begin + COPY_ROWS))
            await database.copy_records_to_table("api_keys", records=map(record, numbers), columns=columns)
            async with redis.pipeline(transaction=False) as pipeline:
                for number in numbers:
                    pipeline.set(STATES + _key_id(number), state, ex=86_400)
                await pipeline.execute()
        await database.execute("ANALYZE api_keys")
        stored, states = await database.fetchval("SELECT count(*) FROM api_keys"), await redis.dbsize()
    finally:
        await database.close()
        await redis.aclose()
    if stored < count or states < count:
        raise BenchError(f"{stored} keys and {states} states are stored, and not {count}")
    return issued


async def _a_state(stack: Stack, redis: Any) -> bytes:
    """What the limiter keeps of a key that has been used once."""
    async with aiohttp.ClientSession(stack.url) as session, issued_key(session, stack.token) as key:
        async with session.post("/v1/detect", json={"text": "Hello"}, headers={"X-API-Key": key}) as response:
            await response.read()
        parsed = keys.parse(key)
        state = await redis.get(STATES + parsed.key_id) if parsed is not None else None
    if not state:
        raise BenchError("the limiter keeps no state where it is expected")
    return bytes(state)


def _key_id(number: int) -> str:
    """The same for the same number, never twice, and in no order: an odd factor permutes the numbers below 2^48."""
    return f"{number * 0x9E37_79B9_7F4B % 2**48:012x}"


# --- sizes -------------------------------------------------------------------------------------------------------------------


def sizes(options: Options) -> Report:
    with portcullis({}, together=options.together) as stack:
        return uvloop.run(_sizes(options, stack))


async def _sizes(options: Options, stack: Stack) -> Report:
    report = Report("sizes", "Texts in a list", plotted=(PER_TEXT, CPU))
    spent: dict[int, dict[str, list[float]]] = {size: {PER_TEXT: [], CPU: []} for size in SIZES}
    async with aiohttp.ClientSession(stack.url) as session, issued_key(session, stack.token) as key:
        gateway = Gateway(session, key)
        await gateway.listed(made(SIZES[-1]))
        for _ in range(options.repeats):
            for size in SIZES:
                # As many texts of each size, up to a tenth of the largest, so that short lists are not measured by one call.
                lists = [made(size) for _ in range(max(1, SIZES[-1] // 10 // size))]
                before = sum(stack.cpu().values())
                took = [(await gateway.listed(batch))[1] / size for batch in lists]
                spent[size][PER_TEXT].append(statistics.mean(took))
                spent[size][CPU].append((sum(stack.cpu().values()) - before) * 1000 / (size * len(lists)))
    for size, values in spent.items():
        report.add("Portcullis", f"{size} text{'s' if size > 1 else ''}", values)
    return report


# --- connections -------------------------------------------------------------------------------------------------------------


def connections(options: Options) -> Report:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    counts = [count for count in CONNECTIONS if count + 500 <= most]
    if len(counts) < 2:
        raise BenchError(f"only {most} files may be open here (ulimit -n)")
    with engine() as stub, portcullis(engine_environment(stub.url), together=options.together) as stack:
        report = uvloop.run(_connections(options, stack, counts))
    if len(counts) < len(CONNECTIONS):
        report.notes.append(f"no more than {counts[-1]} connections: only {most} files may be open here (ulimit -n)")
    return report


async def _connections(options: Options, stack: Stack, counts: Sequence[int]) -> Report:
    report = Report("connections", f"Open connections, {CONNECTION_CALLERS} callers on all of them in turn")
    supply = made(DISTINCT_REQUESTS)
    found: dict[int, list[Any]] = {count: [] for count in counts}
    async with key_of(stack) as key:
        for number in range(options.repeats):
            for count in counts if number % 2 else reversed(counts):
                async with loading(stack.port, requests(stack.port, supply, [key])) as load:
                    used = 0
                    while used < count:  # the first request of a connection costs more, and is not what is asked for
                        used += len((await load.closed(CONNECTION_CALLERS, WARM_UP_SECONDS, count)).latencies)
                    system = System(str(count), load, stack.cpu)
                    found[count].append(await system.measure(closed(CONNECTION_CALLERS, options.seconds, count)))
    for count in counts:
        report.add("Portcullis", f"{count} open", values_of(found[count]))
    base = report.row("Portcullis", f"{counts[0]} open")
    for count in counts[1:]:
        cost = _ratio(report.row("Portcullis", f"{count} open"), base, CPU)
        report.bars.append(Bar(f"processor time, {count} connections, of {counts[0]}", cost, FLAT, at_least=False))
        own = _ratio(report.row("Portcullis", f"{count} open"), base, GENERATOR)
        report.notes.append(f"the load generator's own time for a request, {count} connections: {own:.2f} of that at {counts[0]}")
    return report
