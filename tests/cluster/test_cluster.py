"""Servers of a NATS cluster die, are cut off and are restarted, under detections and a job: what callers see, and what is kept.

By `./run cluster` with 5 000 items and every fault (`PORTCULLIS_TEST_CLUSTER=long`); without, 500 items and one death.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import nats
import pytest

from infra.embedded import welcome
from libs.common import keys
from libs.common.subjects import DOOR_LIST, JOB_ITEMS_STREAM, JOB_RESULTS_STREAM, client_inbox
from tests.chaos.kit import Caller, Load, callers, register, wait_for_detection
from tests.chaos.questions import DISTINCT, is_right, question
from tests.chaos.scenario import steady, well
from tests.cluster.kit import Cluster, running_cluster
from tests.cluster.net import Machine, Network, unavailable
from tests.conftest import wait_until

LONG = os.environ.get("PORTCULLIS_TEST_CLUSTER") == "long"
ITEMS = int(os.environ.get("PORTCULLIS_TEST_CLUSTER_ITEMS", "5000" if LONG else "500"))
RATE = float(os.environ.get("PORTCULLIS_TEST_CLUSTER_RATE", "10"))
AWAY_SECONDS = 15.0 if LONG else 4.0
"""How long a server is dead or cut off: longer than it takes the others to notice and to elect another leader."""
DEADLINE_SECONDS = 5.0
WHOLE_SECONDS = 90.0
PATIENCE_SECONDS = 400.0
# Of the job's key, so that the job is still under way at the last fault.
ITEMS_PER_MINUTE = ITEMS * 2 // 5 if LONG else ITEMS

REASON = unavailable()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@pytest.fixture(scope="module")
def cluster(server_home: Path) -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="pc-", dir=server_home.parent) as home:
        Path(home).chmod(0o711)
        with running_cluster(Path(home)) as cluster:
            yield cluster


@dataclass
class Told:
    """What callers saw of each fault."""

    load: Load
    lines: list[str] = field(default_factory=list)

    @asynccontextmanager
    async def fault(self, name: str) -> AsyncIterator[None]:
        """The block is the fault; afterwards, until answers are as they should be."""
        began = self.load.now
        yield
        over = self.load.now
        await steady(self.load, over, 60)
        seen = self.load.since(began)
        bad = [one for one in seen if not well(one)]
        last = max((one.at + one.latency - began for one in bad), default=0.0)
        codes = dict(Counter(one.status for one in bad))
        self.lines.append(
            f"{name}: {len(bad)} of {len(seen)} detections failed {codes}; the last {last:.1f} s after the fault's beginning"
        )


async def each_fault(cluster: Cluster, told: Told) -> None:
    victim = await cluster.server_of("edge")
    leads = ", leader of JOB_RESULTS" if victim is await cluster.leader(JOB_RESULTS_STREAM) else ""
    async with told.fault(f"{victim.machine.name}, to which the edge is connected{leads}, killed"):
        victim.end(signal.SIGKILL)
        await asyncio.sleep(AWAY_SECONDS)
    await back(cluster, told, victim.start, f"{victim.machine.name} started again")
    if not LONG:
        return
    victim = await cluster.leader(JOB_ITEMS_STREAM)
    async with told.fault(f"{victim.machine.name}, leader of {JOB_ITEMS_STREAM}, cut off"):
        with cluster.network.cut_off(victim.machine):
            await asyncio.sleep(AWAY_SECONDS)
    await back(cluster, told, lambda: None, "its cable plugged in again")
    for node in cluster.nodes:
        async with told.fault(f"{node.machine.name} restarted"):
            node.end(signal.SIGTERM)
            await back(cluster, told, node.start, f"{node.machine.name} started again")


async def back(cluster: Cluster, told: Told, start: Callable[[], None], name: str) -> None:
    """Until every server has everything again: only then may the next be taken."""
    began = time.monotonic()
    start()
    await cluster.whole(WHOLE_SECONDS)
    told.lines.append(f"{name}: everything was everywhere after {time.monotonic() - began:.1f} s")


def lines_of_the_job() -> bytes:
    return b"".join(
        json.dumps({"id": f"item-{number}", "text": question(number % DISTINCT).text}).encode() + b"\n" for number in range(ITEMS)
    )


async def submitted(session: aiohttp.ClientSession) -> tuple[Caller, str]:
    key = await register(session, rate_limit_per_minute=ITEMS_PER_MINUTE, rate_limit_per_day=1_000_000)
    caller = Caller(session, key, patience_seconds=PATIENCE_SECONDS)
    return caller, await caller.submit(lines_of_the_job(), "the-job")


async def test_nothing_is_lost_whatever_happens_to_a_server_of_the_cluster(cluster: Cluster) -> None:
    await cluster.whole(WHOLE_SECONDS)
    await asyncio.to_thread(wait_until, lambda: is_ready(cluster), timeout_seconds=WHOLE_SECONDS, what="the services")
    async with callers(cluster.edge) as session:
        cluster.edge.key = await register(session, rate_limit_per_minute=1_000_000, rate_limit_per_day=1_000_000_000)
        await asyncio.to_thread(wait_for_detection, cluster.edge, 60)
        caller, job_id = await submitted(session)
        load = Load(session, cluster.edge.key, RATE, DEADLINE_SECONDS)
        told = Told(load)
        began = time.monotonic()
        async with load.running():
            await steady(load, 0.0, 30)
            await each_fault(cluster, told)
            under_way = (await progress(caller, job_id))["state"] == "running"
        job = await caller.wait(job_id)
        found = await caller.results(job_id)
    bad = [one for one in load.seen if not well(one)]
    share = len(bad) / len(load.seen)
    print(f"\n{len(cluster.nodes)} servers, {ITEMS} items, {RATE:g} detections/s", *told.lines, sep="\n  ")
    print(f"  of all {len(load.seen)} detections {len(bad)} failed ({100 * share:.2f} %); {load.summary()}")
    print(f"  the job took {time.monotonic() - began:.1f} s; its caller met {dict(caller.failures)}")
    load.assert_invariants()
    assert under_way or not LONG, "the job was over before the last fault: nothing is shown about it"
    assert (job["state"], job["done"], job["failed"]) == ("done", ITEMS, 0), job
    assert Counter(line["index"] for line in found) == Counter(range(ITEMS))
    assert not [line["index"] for line in found if not is_right(question(line["index"] % DISTINCT), line)]


async def test_a_client_is_let_in_by_every_server_and_is_out_everywhere_when_its_key_is_revoked(cluster: Cluster) -> None:
    await cluster.whole(WHOLE_SECONDS)
    await asyncio.to_thread(wait_until, lambda: is_ready(cluster), timeout_seconds=WHOLE_SECONDS, what="the services")
    async with callers(cluster.edge) as session:
        key = await register(session)
        parsed = keys.parse(key)
        assert parsed is not None
        clients, out = [], []
        for node in cluster.nodes:
            gone = asyncio.Event()
            clients.append(
                await nats.connect(
                    node.server.url,
                    token=key,
                    inbox_prefix=client_inbox(parsed.key_id),
                    allow_reconnect=False,
                    closed_cb=as_callback(gone),
                )
            )
            out.append(gone)
        for client in clients:
            answer = await client.request(DOOR_LIST.replace("*", parsed.key_id), b"{}", timeout=5)
            assert json.loads(answer.data)["result"] == {"jobs": [], "next_before": None}
        async with session.delete("/auth/key", headers={"X-API-Key": key}) as response:
            assert response.status == 204
        async with asyncio.timeout(20):
            await asyncio.gather(*(gone.wait() for gone in out))


def as_callback(event: asyncio.Event) -> Callable[[], Awaitable[None]]:
    async def told() -> None:
        event.set()

    return told


async def progress(caller: Caller, job_id: str) -> dict[str, object]:
    found: dict[str, object] = json.loads((await caller.insist("GET", f"/v1/jobs/{job_id}"))[1])
    return found


def is_ready(cluster: Cluster) -> bool:
    return welcome.call(cluster.edge.url, "/health/ready").status == 200


LISTEN = "import socket, sys; server = socket.create_server((sys.argv[1], 7000))\nwhile True: server.accept()"


def reached(machine: Machine) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((machine.address, 7000), 1):
        return True
    return False


def test_a_cable_can_be_pulled_and_the_network_leaves_nothing_behind() -> None:
    network = Network()
    try:
        machine = network.machine("a")
        listening = subprocess.Popen(machine.command(sys.executable, "-c", LISTEN, machine.address))
        wait_until(lambda: reached(machine))
        with network.cut_off(machine):
            assert not reached(machine)
        wait_until(lambda: reached(machine))
    finally:
        network.close()
    assert listening.wait(5) == -signal.SIGKILL
    for shown in (("netns", "list"), ("link", "show")):  # the kernel takes links away a moment later
        wait_until(lambda shown=shown: network.leg not in ip(*shown) and network.name not in ip(*shown))  # type: ignore[misc]


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True).stdout
