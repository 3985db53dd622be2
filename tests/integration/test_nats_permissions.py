"""Every service's NATS user against every subject there is, on a real server: what is not its own, it neither sends nor reads.

Who may do what is `subjects.PERMISSIONS`; what there is is read off the module `subjects`, so a new subject is tried by itself.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import nats
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg

from infra.embedded import servers
from infra.embedded.servers import Server
from libs.common import subjects
from libs.common.subjects import PERMISSIONS, SERVICES
from tests.conftest import OPERATOR, arrived, free_port, running

ROOT = Path(__file__).parents[2]
KEY_ID, JOB_ID, INSTANCE = "0" * 12, "0" * 28, "0" * 16

NAMED = {
    name: value
    for name, value in vars(subjects).items()
    if name.isupper() and isinstance(value, str) and "." in value.strip("$.")
}
"""Every constant that is a subject."""
STREAMS = [value for name, value in vars(subjects).items() if name.endswith("_STREAM")] + [f"KV_{subjects.JOB_BUCKET}"]
API = tuple(
    """
    INFO STREAM.NAMES STREAM.LIST STREAM.CREATE.{} STREAM.UPDATE.{} STREAM.DELETE.{} STREAM.PURGE.{} STREAM.INFO.{}
    STREAM.SNAPSHOT.{} STREAM.RESTORE.{} STREAM.MSG.GET.{} STREAM.MSG.DELETE.{} DIRECT.GET.{} DIRECT.GET.{}.a CONSUMER.NAMES.{}
    CONSUMER.LIST.{} CONSUMER.CREATE.{} CONSUMER.CREATE.{}.c CONSUMER.CREATE.{}.c.a CONSUMER.DURABLE.CREATE.{}.c
    CONSUMER.DELETE.{}.c CONSUMER.INFO.{}.c CONSUMER.MSG.NEXT.{}.c CONSUMER.PAUSE.{}.c
    """.split()  # noqa: SIM905
)
"""What JetStream can be asked about a stream, and by whom it could be emptied."""


def concrete(pattern: str) -> str:
    """A subject that a pattern stands for."""
    return re.sub(r"\.>$", ".x.y", pattern.replace("*", "x"))


def covers(pattern: str, subject: str) -> bool:
    """Whether a pattern allows a subject, or everything that another pattern stands for."""
    wanted, given = pattern.split("."), subject.split(".")
    if wanted[-1] == ">":
        return len(given) >= len(wanted) and covers(".".join(wanted[:-1]), ".".join(given[: len(wanted) - 1]))
    # The server takes a `>` that is asked for as one more word: `a.*` allows `a.>`.
    return len(wanted) == len(given) and all(one in (other, "*") for one, other in zip(wanted, given, strict=True))


def allowed(patterns: Iterable[str], subject: str) -> bool:
    return any(covers(pattern, subject) for pattern in patterns)


def _of(service: str) -> str:
    return f".{subjects.micro_name(service)}"


def everything() -> list[str]:
    """A subject of each kind."""
    patterns = {*NAMED.values(), *(each for one in PERMISSIONS.values() for each in (*one.publish, *one.subscribe))}
    door = subjects.door_permissions(KEY_ID)
    return sorted(
        {
            *map(concrete, patterns),
            *map(concrete, (*door.publish, *door.subscribe)),
            *(f"{subjects.inbox(service, INSTANCE)}.1" for service in SERVICES),
            *(f"{subjects.inbox(service, INSTANCE)}-js.1" for service in SERVICES),
            *(subjects.job_subject(KEY_ID, JOB_ID, kind, 0) for kind in ("items", "results", "dead", "hook")),
            subjects.model_pool("other"),
            subjects.model_pool_batch("other"),
            subjects.kick("N" * 56),
            *(f"$JS.API.{call.replace('{}', stream)}" for stream in STREAMS for call in API),
            *(f"$JS.ACK.{stream}.c.1.1.1.1.1" for stream in STREAMS),
            *(f"$SRV.{verb}{of}" for verb in subjects.MICRO for of in ("", *map(_of, SERVICES))),
            "$SYS.REQ.SERVER.PING", "$SYS.REQ.USER.INFO", "$SYS.ACCOUNT.SYS.CONNECT", "$JS.EVENT.ADVISORY.X",
            "$KV.OTHER.a", "something.else",
        }
    )  # fmt: skip


WILDCARDS = tuple(
    """
    > * *.> *.* *.*.* _INBOX.> _INBOX.*.> $SYS.> $JS.> $JS.API.> $JS.ACK.> $KV.> $SRV.> $SRV.*
    detect.> detect.v1.* batch.> jobs.> account.> admin.> events.> model.> usage.>
    """.split()  # noqa: SIM905
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One of our own: what is tried here may empty streams."""
    passwords = dict.fromkeys((*SERVICES, OPERATOR), "password")
    home = tmp_path_factory.mktemp("nats")
    with running(servers.nats(home, free_port(), passwords, servers.new_issuer())) as server:
        yield server


@asynccontextmanager
async def connected(server: Server, user: str) -> AsyncIterator[tuple[Client, list[str]]]:
    """A connection of the user, and what the server refuses it, as "publish SUBJECT" and "subscription SUBJECT"."""
    refused: list[str] = []

    async def on_error(error: Exception) -> None:
        found = re.search(r'permissions violation for (\w+) to "([^"]+)"', str(error).lower())
        assert found is not None, error
        refused.append(" ".join(found.groups()))

    client = await nats.connect(server.url, user=user, password="password", error_cb=on_error)
    try:
        yield client, refused
    finally:
        await client.close()


@pytest.mark.parametrize("service", SERVICES)
async def test_a_service_sends_on_its_own_subjects_only(server: Server, service: str) -> None:
    tried = everything()
    foreign = {subject for subject in tried if not allowed(PERMISSIONS[service].publish, subject)}
    seen: set[str] = set()
    last = asyncio.Event()

    async def note(message: Msg) -> None:
        seen.add(message.subject)
        if message.subject == "the.last.one":
            last.set()

    async with connected(server, OPERATOR) as (operator, _), connected(server, service) as (client, refused):
        await operator.subscribe(">", cb=note)
        await arrived(operator)
        for subject in tried:
            await client.publish(subject, b"{}")
        await arrived(client)
        await operator.publish("the.last.one")
        await asyncio.wait_for(last.wait(), 10)
        assert set(refused) == {f"publish {subject.lower()}" for subject in foreign}
        assert seen & foreign == set()
        assert subjects.EVENT_LEFT in seen  # what is its own did pass


@pytest.mark.parametrize("service", SERVICES)
@pytest.mark.parametrize("queue", ["", "as others do"])
async def test_a_service_reads_its_own_subjects_only(server: Server, service: str, queue: str) -> None:
    others = {pattern for name, permissions in PERMISSIONS.items() if name != service for pattern in permissions.subscribe}
    tried = sorted({*everything(), *NAMED.values(), *others, *WILDCARDS})
    foreign = {subject for subject in tried if not allowed(PERMISSIONS[service].subscribe, subject)}
    async with connected(server, service) as (client, refused):
        for subject in tried:
            # Sharing the work of a stage is reading along, too.
            await client.subscribe(subject, queue=queue and next(iter(SERVICES)))
        await arrived(client)
        assert set(refused) == {f"subscription {subject.lower()}" for subject in foreign}


# --- what the lists say --------------------------------------------------------------------------------------------------

BROADCASTS = {
    subjects.EVENT_LEFT, subjects.CLIENT_DISCONNECTED, subjects.EVENT_BREAKER_CHANGED, subjects.EVENT_TRACE_KEPT,
    subjects.EVERYBODYS_STATS,
}  # fmt: skip
"""What several services read."""
FROM_ELSEWHERE = {subjects.AUTH_CALLOUT, subjects.CLIENT_DISCONNECTED}
"""What the server itself sends."""
FOR_ELSEWHERE = {
    subjects.AUTH_CALLOUT_REPLIES, subjects.CONNECTIONS, subjects.KICK, subjects.USAGE_RECORDED, subjects.DOOR_LIVE_RESULTS,
}  # fmt: skip
"""What the server itself, a stream or a client takes."""
UNNAMED = {"AUTH_CALLOUT_REPLIES", "POOL_PING", "EVERYBODYS_STATS"}
"""Where a message says that its answer goes, and where nats-py answers by itself."""
GROUPS = {
    "JOBS_OPERATIONS": subjects.JOBS_OPERATIONS.values(),
    "DOOR_OPERATIONS": subjects.DOOR_OPERATIONS,
    "kick": [subjects.KICK],
}
API_CALLS = re.compile(r"\$JS\.API\.(STREAM\.(INFO|CREATE|PURGE|MSG\.GET)|CONSUMER\.(CREATE|INFO|DELETE|LIST|MSG\.NEXT))\.[A-Z]")


@pytest.mark.parametrize("subject", sorted(NAMED.values()))
def test_a_subject_is_read_by_one_service_and_sent_by_somebody(subject: str) -> None:
    """A second reader of a stage would take its messages away from it; a subject that nobody sends or reads is a leftover."""
    readers = [name for name in SERVICES if allowed(PERMISSIONS[name].subscribe, subject)]
    door = subjects.door_permissions(KEY_ID).publish
    senders = [name for name in SERVICES if allowed(PERMISSIONS[name].publish, concrete(subject))]
    assert senders or subject in FROM_ELSEWHERE or subject.replace("*", KEY_ID) in door
    assert readers or subject in FOR_ELSEWHERE
    assert len(readers) <= 1 or subject in BROADCASTS


@pytest.mark.parametrize("service", SERVICES)
def test_a_list_holds_nothing_that_gives_away_more_than_is_meant(service: str) -> None:
    permissions = PERMISSIONS[service]
    for pattern in permissions.subscribe:
        assert not covers(pattern, concrete("_INBOX.>")), pattern  # an inbox of anybody else
        assert pattern.split(".")[0] not in ("$JS", "$KV", "*", ">"), pattern
    for other in set(SERVICES) - {service}:
        assert not allowed(permissions.subscribe, f"$SRV.PING.{subjects.micro_name(other)}.x")  # nobody answers for another
    streams = {call.rpartition(".>")[0] or call for call in permissions.publish if call.startswith("$JS.API")}
    for call in streams:
        assert API_CALLS.match(call), call
        assert call.rpartition(".")[2] in STREAMS, call  # of one stream, and not of all


@pytest.mark.parametrize("service", SERVICES)
def test_a_list_holds_nothing_that_the_service_does_not_name(service: str) -> None:
    """A subject that a service no longer uses leaves its list with the code that used it."""
    folders = (ROOT / "services" / service, ROOT / "libs" / "common")
    source = "\n".join(
        path.read_text() for folder in folders for path in sorted(folder.rglob("*.py")) if path.name != "subjects.py"
    )
    for name, subject in NAMED.items():
        if subject in (*PERMISSIONS[service].publish, *PERMISSIONS[service].subscribe) and name not in UNNAMED:
            names = {name, *(group for group, members in GROUPS.items() if subject in members)}
            assert re.search(rf"\b({'|'.join(names)})\b", source), name
