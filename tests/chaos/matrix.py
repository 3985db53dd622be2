"""The matrix: every component by every fault, either as a scenario or with the reason why there is none.

`docs/operations/faults.md` is made from it (`python -m tests.chaos.faults_page`).
"""

from __future__ import annotations

import asyncio
import statistics
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import aiohttp
import asyncpg  # type: ignore[import-untyped]

from libs.common import keys
from tests.chaos.kit import BENIGN, RECOVERY_SECONDS
from tests.chaos.rig import Rig
from tests.chaos.scenario import LATE, LIMIT, REFUSED, SHED, During, Fault, Scenario, ask, submit

COMPONENTS = ("edge", "auth", "limiter", "detector_proxy", "fallback_model", "primary", "nats", "redis", "postgres")
FAULTS = ("crash", "hang", "slow", "partition", "restart", "overload", "disk full", "clock skew")

NAMES = {
    "detector_proxy": "proxy",
    "fallback_model": "worker",
    "primary": "primary engine",
    "nats": "NATS",
    "redis": "Redis",
    "postgres": "PostgreSQL",
}
"""What the page calls them."""

# --- faults ------------------------------------------------------------------------------------------------------------------


def killed(name: str) -> Fault:
    return lambda rig: rig.killed(name)


def restarted(name: str) -> Fault:
    return lambda rig: rig.restarted(name)


def paused(name: str) -> Fault:
    return lambda rig: rig.stack.paused(name)


def held(name: str) -> Fault:
    return lambda rig: rig.held(name)


def cut(name: str) -> Fault:
    return lambda rig: rig.cut(name)


def slow(name: str, seconds: float) -> Fault:
    return lambda rig: rig.slow(name, seconds)


def engine_is(mode: str) -> Fault:
    return lambda rig: rig.engine_is(mode)


def full_disk(name: str) -> Fault:
    return lambda rig: rig.full_disk(name)


def off_clock(name: str, seconds: float, *, usable: bool) -> Fault:
    """`usable`: whether detections are answered with a verdict all the same."""
    return lambda rig: rig.off_clock(name, seconds, usable=usable)


@contextmanager
def _quiet(_: Rig) -> Iterator[None]:
    """No fault but what the probes do."""
    yield


# --- probes ------------------------------------------------------------------------------------------------------------------


async def unknown_keys_get_503(during: During) -> None:
    """A key that nobody can look up is not called wrong."""
    for _ in range(3):
        assert await ask(during.session, keys.generate()) == 503


async def unknown_keys_get_401(during: During) -> None:
    assert await ask(during.session, keys.generate()) == 401


async def the_limit_holds(during: During) -> None:
    """Failing open is bounded: at most 1.1 times the limit in a minute, one of which was used before."""
    statuses: Counter[int] = Counter({200: 1})
    for _ in range(10):
        statuses.update(await asyncio.gather(*(ask(during.session, during.key) for _ in range(6))))
    assert set(statuses) == {200, 429}, statuses
    assert statuses[200] <= 1.1 * LIMIT, statuses
    assert statuses[200] >= 0.5 * LIMIT, statuses


async def added_latency_is_small(during: During) -> None:
    """The median answer takes at most 100 ms more than without the fault."""
    load = during.load
    while len(load.since(during.began)) < 30:
        await asyncio.sleep(0.05)
    before = [seen.latency for seen in load.seen if seen.at < during.began - 0.2]
    assert statistics.median(seen.latency for seen in load.since(during.began)) <= statistics.median(before) + 0.1


async def jobs_are_refused(during: During) -> None:
    """What cannot be kept is not accepted."""
    assert await submit(during.session, during.rig.stack.key, 500) == 503


async def jobs_are_taken(during: During) -> None:
    async with asyncio.timeout(RECOVERY_SECONDS):
        while await submit(during.session, during.rig.stack.key, 10) != 202:
            await asyncio.sleep(0.2)


async def _register(session: aiohttp.ClientSession) -> int:
    async with session.post("/auth/register", json={"name": "x" * 100}) as response:
        await response.read()
        return response.status


async def registrations_are_refused(during: During) -> None:
    """As soon as the pages that the tables have are full."""
    for _ in range(1000):
        status = await _register(during.session)
        if status != 201:
            break
    assert status == 503


async def registrations_are_taken(during: During) -> None:
    async with asyncio.timeout(RECOVERY_SECONDS):
        while await _register(during.session) != 201:
            await asyncio.sleep(0.2)


async def a_flood_of_unknown_keys(during: During) -> None:
    statuses = Counter(await asyncio.gather(*(ask(during.session, keys.generate()) for _ in range(300))))
    assert set(statuses) <= {401, 429, 503}, statuses
    assert statuses[401], statuses


async def one_key_in_a_hurry(during: During) -> None:
    statuses = Counter(await asyncio.gather(*(ask(during.session, during.key) for _ in range(200))))
    assert set(statuses) <= {200, 429, 503}, statuses
    assert statuses[200] <= LIMIT, statuses


async def a_burst_of_callers(during: During) -> None:
    """More than the edge takes at a time."""
    key = during.rig.stack.key
    statuses = Counter(await asyncio.gather(*(ask(during.session, key) for _ in range(700))))
    assert set(statuses) <= {200, 429, 503, 504}, statuses
    assert statuses[200], statuses


async def long_texts(during: During) -> None:
    """As much as a worker scores in many seconds, at once."""
    key, text = during.rig.stack.key, f"{BENIGN} " * 1500
    statuses = Counter(await asyncio.gather(*(ask(during.session, key, text) for _ in range(24))))
    assert set(statuses) <= {200, 429, 503, 504}, statuses


async def busy_connections(during: During) -> None:
    """Every connection that the server gives is taken, and each computes."""
    url = during.rig.stack.environment_of("auth")["PORTCULLIS_DATABASE_URL"]
    connections = []
    try:
        for _ in range(120):
            try:
                connections.append(await asyncpg.connect(url, timeout=5))
            except (asyncpg.PostgresError, OSError, TimeoutError):
                break
        assert len(connections) > 50
        await unknown_keys_get_401(during)
        await asyncio.gather(*(connection.execute("SELECT pg_sleep(1)") for connection in connections))
    finally:
        await asyncio.gather(*(connection.close(timeout=5) for connection in connections), return_exceptions=True)


@contextmanager
def _locked_keys(rig: Rig) -> Iterator[None]:
    """Every query for keys waits for a lock."""

    async def lock() -> asyncpg.Connection:
        connection = await asyncpg.connect(rig.stack.environment_of("auth")["PORTCULLIS_DATABASE_URL"])
        await connection.execute("BEGIN; LOCK TABLE api_keys IN ACCESS EXCLUSIVE MODE")
        return connection

    connection = rig.links.call(lock)
    try:
        yield
    finally:
        rig.links.call(connection.close)


# --- the cells ---------------------------------------------------------------------------------------------------------------

_SUPERVISED = "Nothing: the supervisor starts it anew. If it keeps dying, `./run logs {}` says why."


def _stage(name: str, *, short: tuple[str, ...], partition: str, callers: str) -> list[Scenario]:
    """What is alike for the stages behind the edge, of which one runs here. With more, nobody notices the death of one."""
    shown = NAMES.get(name, name)
    return [
        Scenario(
            name, "crash", killed(name), 0, statuses=REFUSED, job=True, short="crash" in short,
            callers=f"503 with `Retry-After` at once until the new {shown} is there, 1 to 5 s; with two replicas nothing.",
            operator=_SUPERVISED.format(name),
        ),
        Scenario(
            name, "hang", paused(name), 3, statuses=LATE, shows="failures", prompt=False, job=True,
            engine=name != "fallback_model", short="hang" in short,
            callers="504 at the caller's own deadline, for what was given to the hung process; nothing of it is done afterwards.",
            operator=f"*Replicas away* shows it: `kill -9` its process; another {shown} is started.",
        ),
        Scenario(
            name, "slow", slow(name, 0.05), 3, shows="slower", short="slow" in short,
            callers="Slower answers, by as much; 504 where that passes the caller's deadline.",
            operator="[PortcullisStageSlow](runbooks.md#portcullisstageslow).",
        ),
        Scenario(
            name, "partition", held(name), 7, statuses=LATE, shows="failures", prompt=False, job=True, short="partition" in short,
            callers=callers,
            operator=partition,
        ),
        Scenario(
            name, "restart", restarted(name), 0, statuses=REFUSED, short="restart" in short,
            callers="As for a crash, but that what it had in hand is finished first; with two replicas nothing.",
            operator="Restart replicas one after the other.",
        ),
    ]  # fmt: skip


_PARTITION = (
    "504 until the NATS server has noticed (up to 15 s) that nobody is behind the connection, then 503 at once; "
    "with other replicas only for the part that was sent to this one."
)
_PARTITION_HELP = "The network between them; or end the process, if others can be reached."
_CLOCK = (
    "Give the host its time (NTP); nothing else helps. `./run logs` of every stage is silent: it drops what it thinks is late."
)


def _clock(name: str, more: str = "") -> list[Scenario]:
    return [
        Scenario(
            name, "clock skew", off_clock(name, -3600, usable=True), 2, statuses=SHED, probes=(the_limit_holds,),
            callers="A clock that is slow: nothing; there is no more time for a request than the stage before had left. "
            f"One that is fast by more than the deadline: 504 for everything, since the stage takes it for late.{more}",
            operator=_CLOCK,
        )
    ]  # fmt: skip


SCENARIOS: tuple[Scenario, ...] = (
    # --- edge ---
    Scenario(
        "edge", "crash", killed("edge"), 0, statuses=REFUSED | {0}, deadline_seconds=10, job=True, short=True,
        callers="Connections to the dead process break, and so do the calls on them; new ones wait in the shared socket's queue "
        "until the next edge is there (1 to 3 s).",
        operator=_SUPERVISED.format("edge"),
    ),
    Scenario(
        "edge", "hang", paused("edge"), 3, deadline_seconds=10, shows="slower",
        callers="Silence: no other process has the connection, so nobody can answer 504. A caller's own timeout is the remedy. "
        "When it goes on, it answers.",
        operator="`/health/live` does not answer: `kill -9` the process; new calls then go to the next one.",
    ),
    Scenario(
        "edge", "slow", slow("edge", 0.05), 3, shows="slower",
        callers="Slower answers, by as much.",
        operator="[PortcullisSlow](runbooks.md#portcullisslow).",
    ),
    Scenario(
        "edge", "partition", held("edge"), 7, statuses=LATE, shows="failures", prompt=False, job=True,
        callers="504 at the deadline; after some 6 s, when the edge has given the connection up, 503 at once.",
        operator="The network between the edge and NATS. `/health/ready` says 503, so a load balancer takes another edge.",
    ),
    Scenario(
        "edge", "restart", restarted("edge"), 0, deadline_seconds=10,
        callers="Nothing: what is in hand is answered, and what is new waits in the shared socket's queue, 1 to 3 s.",
        operator="Nothing.",
    ),
    Scenario(
        "edge", "overload", _quiet, 1, statuses=SHED | {504}, prompt=False, probes=(a_burst_of_callers,), deadline_seconds=5,
        callers="429 `overloaded` with `Retry-After` at once for what is too much; the rest is answered.",
        operator="[PortcullisStageFull](runbooks.md#portcullisstagefull): more replicas.",
    ),
    Scenario(
        "edge", "disk full", full_disk("logs"), 3,
        callers="Nothing: no service writes a file. What it would have logged is lost.",
        operator="Make room. The same holds for every service.",
    ),
    Scenario(
        "edge", "clock skew", off_clock("edge", -1, usable=True), 2, statuses=LATE, prompt=False, deadline_seconds=10,
        callers="The edge sets the deadlines: a clock that is slow by more than a deadline gives 504 for everything. One that is "
        "fast: nothing; there is no more time for a request than the edge had left.",
        operator=_CLOCK,
    ),
    # --- auth ---
    *_stage(
        "auth", short=("crash",), partition=_PARTITION_HELP, callers=_PARTITION,
    ),
    Scenario(
        "auth", "overload", _quiet, 1, probes=(a_flood_of_unknown_keys,), statuses=SHED,
        callers="A flood of unknown keys is looked up by a few large queries: known keys notice nothing.",
        operator="Block the address in front of the gateway.",
    ),
    *_clock("auth", " Keys expire by this clock."),
    # --- limiter ---
    *_stage(
        "limiter", short=("crash",), partition=_PARTITION_HELP, callers=_PARTITION,
    ),
    Scenario(
        "limiter", "overload", _quiet, 1, probes=(one_key_in_a_hurry,),
        callers="429 for the key that is over its limit; the others notice nothing.",
        operator="Nothing.",
    ),
    *_clock("limiter"),
    # --- proxy ---
    *_stage(
        "detector_proxy", short=("crash",), partition=_PARTITION_HELP, callers=_PARTITION,
    ),
    Scenario(
        "detector_proxy", "overload", _quiet, 1, probes=(long_texts,), statuses=SHED | {504}, prompt=False,
        callers="429 or 503 with `Retry-After` for what cannot be judged in time.",
        operator="[PortcullisModelSaturated](runbooks.md#portcullismodelsaturated).",
    ),
    *_clock("detector_proxy"),
    # --- worker ---
    *_stage(
        "fallback_model", short=("crash",), partition=_PARTITION_HELP,
        callers="Without a primary engine: 504, and 503 as soon as the breaker of the pool is open. Where there is another "
        "worker, it is tried.",
    ),
    Scenario(
        "fallback_model", "overload", _quiet, 1, probes=(long_texts,), statuses=SHED | {504}, prompt=False,
        callers="429 or 503 with `Retry-After` for what cannot be judged in time; short texts go before long ones.",
        operator="[PortcullisModelSaturated](runbooks.md#portcullismodelsaturated): `--scale fallback_model=2`.",
    ),
    *_clock("fallback_model"),
    # --- primary engine ---
    Scenario(
        "primary", "crash", cut("primary"), 3, engine=True, shows="degraded",
        callers="Verdicts of the pool, with `degraded: true`; no failure.",
        operator="[PortcullisBreakerOpen](runbooks.md#portcullisbreakeropen): its operator; Portcullis tries again by itself.",
    ),
    Scenario(
        "primary", "hang", engine_is("hang"), 3, engine=True, shows="degraded", deadline_seconds=4, short=True,
        callers="The first few wait for `PORTCULLIS_ENGINE_TIMEOUT_SECONDS`, then the breaker is open: verdicts of the pool, "
        "`degraded: true`.",
        operator="As above; a shorter `PORTCULLIS_ENGINE_TIMEOUT_SECONDS` shortens the wait of the first.",
    ),
    Scenario(
        "primary", "slow", slow("primary", 0.1), 3, engine=True, shows="slower",
        callers="Slower answers, as long as it keeps within `PORTCULLIS_ENGINE_TIMEOUT_SECONDS`; beyond it, as if it hung.",
        operator="[PortcullisSlow](runbooks.md#portcullisslow).",
    ),
    Scenario(
        "primary", "partition", held("primary"), 4, engine=True, shows="degraded", deadline_seconds=4,
        callers="As for a hang.",
        operator="The network between the proxy and the engine.",
    ),
    Scenario(
        "primary", "restart", cut("primary"), 1, engine=True,
        callers="Verdicts of the pool, `degraded: true`, for up to `PORTCULLIS_BREAKER_OPEN_MAX_SECONDS` (4) after its return.",
        operator="Nothing; `POST /v1/circuit-breakers/primary/reset` ends the wait.",
    ),
    Scenario(
        "primary", "overload", engine_is("busy"), 3, engine=True, shows="degraded",
        callers="An engine that answers 503 is left alone: verdicts of the pool, `degraded: true`.",
        operator="More of the engine, or a lower `PORTCULLIS_ENGINE_MAX_CONCURRENCY`.",
    ),
    # --- NATS ---
    Scenario(
        "nats", "crash", killed("nats"), 0, statuses=REFUSED, job=True, short=True,
        callers="503 at once until it is back, 1 to 2 s; nothing that was asked meanwhile is done later.",
        operator=_SUPERVISED.format("nats"),
    ),
    Scenario(
        "nats", "hang", paused("nats"), 3, statuses=LATE, shows="failures", prompt=False, job=True, engine=True,
        callers="504 at the deadline; after some 6 s, when the services have given it up, 503 at once.",
        operator="[PortcullisWithoutNats](runbooks.md#portculliswithoutnats): `kill -9` its process.",
    ),
    Scenario(
        "nats", "slow", slow("nats", 0.02), 3, shows="slower",
        callers="Slower answers: each of five messages takes its part.",
        operator="The network or the machine of NATS.",
    ),
    Scenario(
        "nats", "partition", held("nats"), 9, statuses=LATE, shows="failures", prompt=False, job=True, short=True,
        callers="504 at the deadline; after some 6 s, when the services have given it up, 503 at once.",
        operator="The network. Services come back by themselves.",
    ),
    Scenario(
        "nats", "restart", restarted("nats"), 0, statuses=REFUSED, engine=True,
        callers="503 at once until it is back; nothing that was asked meanwhile is done later.",
        operator="Nothing.",
    ),
    Scenario(
        "nats", "disk full", full_disk("jetstream"), 3, job=True, probes=(jobs_are_refused,), afterwards=(jobs_are_taken,),
        callers="Detections: nothing. Submissions of jobs get 503.",
        operator="Make room ([jobs.md](../jobs.md) says what the streams take). What was accepted goes on.",
    ),
    # --- Redis ---
    Scenario(
        "redis", "crash", killed("redis"), 0, short=True,
        callers="Nothing, or some answers with `degraded: true`.",
        operator=_SUPERVISED.format("redis"),
    ),
    Scenario(
        "redis", "hang", paused("redis"), 3, shows="degraded", probes=(the_limit_holds, added_latency_is_small), short=True,
        callers="`degraded: true`: each limiter counts for itself, and admits no more than the limit.",
        operator="[PortcullisWithoutRedis](runbooks.md#portculliswithoutredis).",
    ),
    Scenario(
        "redis", "slow", slow("redis", 0.2), 3, shows="degraded", probes=(the_limit_holds, added_latency_is_small),
        callers="Beyond 0.1 s for an answer, as if it hung.",
        operator="[PortcullisWithoutRedis](runbooks.md#portculliswithoutredis).",
    ),
    Scenario(
        "redis", "partition", held("redis"), 3, shows="degraded", probes=(the_limit_holds, added_latency_is_small),
        callers="As for a hang.",
        operator="The network between the limiter and Redis.",
    ),
    Scenario(
        "redis", "restart", restarted("redis"), 0,
        callers="Nothing, or some answers with `degraded: true`. Used limits are kept.",
        operator="Nothing.",
    ),
    Scenario(
        "redis", "disk full", full_disk("redis"), 4, shows="degraded", probes=(the_limit_holds,),
        callers="Redis refuses to write (`MISCONF`): as if it were away.",
        operator="Make room; it goes on by itself.",
    ),
    # --- PostgreSQL ---
    Scenario(
        "postgres", "crash", killed("postgres"), 0, short=True,
        callers="Nothing with a key that was used in the last 30 s; 503 with another one for a second or two.",
        operator=_SUPERVISED.format("postgres"),
    ),
    Scenario(
        "postgres", "hang", paused("postgres"), 4, shows="stores.postgres=down", probes=(unknown_keys_get_503,), short=True,
        callers="Nothing for 30 s with a key that is known; 503, and never 401, with another one. Calls about keys: 503.",
        operator="[PortcullisWithoutPostgres](runbooks.md#portculliswithoutpostgres).",
    ),
    Scenario(
        "postgres", "slow", slow("postgres", 0.05), 3, probes=(unknown_keys_get_401,),
        callers="The first call with a key takes that much longer.",
        operator="*Time of a statement* on the dashboard *limits and tenants*.",
    ),
    Scenario(
        "postgres", "partition", held("postgres"), 4, shows="stores.postgres=down", probes=(unknown_keys_get_503,),
        callers="As for a hang.",
        operator="The network between auth and PostgreSQL.",
    ),
    Scenario(
        "postgres", "restart", restarted("postgres"), 0,
        callers="As for a crash.",
        operator="Nothing.",
    ),
    Scenario(
        "postgres", "overload", _quiet, 1, probes=(busy_connections,),
        callers="Nothing: auth keeps its connections.",
        operator="Whoever takes them: `pg_stat_activity`. Auth needs `PORTCULLIS_DATABASE_POOL_SIZE` + 2 for each replica.",
    ),
    Scenario(
        "postgres", "disk full", full_disk("postgres"), 2,
        probes=(registrations_are_refused,), afterwards=(registrations_are_taken,),
        callers="Nothing with a key that exists. Calls that change one, and registrations, get 503; counts of use wait in NATS.",
        operator="Make room; it goes on by itself. When its log cannot grow either, PostgreSQL stops: as for a hang.",
    ),
)  # fmt: skip

FAST = Scenario(
    "auth", "fast clock", off_clock("auth", 3600, usable=False), 2, statuses=LATE, shows="failures", prompt=False,
    callers="", operator="",
)  # fmt: skip
"""The other half of `clock skew`."""

FAST_EDGE = Scenario(
    "edge", "fast clock", off_clock("edge", 3600, usable=True), 2, deadline_seconds=10,
    callers="", operator="",
)  # fmt: skip
"""Deadlines that are an hour away."""

LOCKED = Scenario(
    "postgres", "lock", _locked_keys, 3, probes=(unknown_keys_get_503,),
    callers="", operator="",
)  # fmt: skip
"""Another kind of hang: the server is well, and one table is not to be had."""

_NO_DISK = "It writes no file; its log is the supervisor's (see *edge*)."
_OTHERS_CLOCK = "Its clock decides nothing of ours."
NOT_SENSIBLE: dict[tuple[str, str], str] = {
    **{(name, "disk full"): _NO_DISK for name in ("auth", "limiter", "detector_proxy", "fallback_model")},
    ("primary", "disk full"): "It is somebody else's; whatever it answers then is one of the failures above.",
    ("primary", "clock skew"): "It is told no time.",
    ("nats", "overload"): "What comes in is bounded at the edge (see *edge*), and what a client sends at its connection.",
    ("nats", "clock skew"): "No deadline is NATS's: the services look at their own clocks.",
    (
        "redis",
        "overload",
    ): "The limiter makes at most five calls at a time; from outside a Redis that does too much is a slow one.",
    ("redis", "clock skew"): "Windows follow Redis's clock alone, whatever it says; a jump moves a window once.",
    ("postgres", "clock skew"): "It writes times that are shown; whether a key has expired auth decides by its own clock.",
}

CELLS = {(scenario.component, scenario.fault): scenario for scenario in SCENARIOS}
