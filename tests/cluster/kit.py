"""Three NATS servers that keep everything three times, a machine with Redis and PostgreSQL, and two with services."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import nats
import nats.errors
from nats.js import JetStreamContext

from infra.embedded import servers
from infra.embedded.servers import Member, Server
from infra.embedded.stack import OPERATOR
from libs.common.subjects import (
    CONNECTIONS,
    JOB_BUCKET,
    JOB_DEAD_STREAM,
    JOB_HOOKS_STREAM,
    JOB_ITEMS_STREAM,
    JOB_RESULTS_STREAM,
    SERVICES,
    USAGE_STREAM,
    service_of,
)
from tests.chaos.conftest import ROOMY
from tests.chaos.kit import ROOT, Stack
from tests.cluster.net import Machine, Network

STREAMS = (USAGE_STREAM, JOB_ITEMS_STREAM, JOB_RESULTS_STREAM, JOB_DEAD_STREAM, JOB_HOOKS_STREAM, f"KV_{JOB_BUCKET}")
NODES = 3
CLIENT_PORT, ROUTE_PORT, EDGE_PORT, REDIS_PORT, POSTGRES_PORT = 4222, 6222, 8000, 6379, 5432
EVERYTHING = dict.fromkeys(SERVICES, 1)
WITHOUT_EDGE = EVERYTHING | {"edge": 0, "console": 0}
STOP_SECONDS = 20.0


@dataclass(slots=True)
class Running:
    """A server on a machine, which can be killed and started again."""

    machine: Machine
    server: Server
    log: Path
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.machine.command(*self.server.command), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def end(self, number: signal.Signals) -> None:
        """Signal it and wait until it has gone."""
        if self.process is None:
            return
        self.process.send_signal(number)
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None


@dataclass(slots=True)
class Cluster:
    """`nodes`: the NATS servers. `edge`: the services behind which the only edge stands; `other`: those of the second machine."""

    network: Network
    nodes: list[Running]
    edge: Stack
    other: Stack
    passwords: dict[str, str]

    @asynccontextmanager
    async def jetstream(self, without: Running | None = None) -> AsyncIterator[JetStreamContext]:
        """As the operator, by a new connection to a server that is there."""
        urls = [node.server.url for node in self.nodes if node is not without]
        connection = await nats.connect(
            urls, user=OPERATOR, password=self.passwords[OPERATOR], connect_timeout=1, max_reconnect_attempts=1
        )
        try:
            yield connection.jetstream(timeout=2)
        finally:
            await connection.close()

    async def leader(self, stream: str) -> Running:
        """Who leads a stream now."""
        async with self.jetstream() as jetstream:
            cluster = (await jetstream.stream_info(stream)).cluster
        assert cluster is not None
        return next(node for node in self.nodes if node.machine.name == cluster.leader)

    async def server_of(self, service: str) -> Running:
        """To which server one process of a service is connected."""
        async with self.jetstream() as jetstream:
            connection = jetstream._nc
            inbox = connection.new_inbox()
            answers = await connection.subscribe(inbox)
            await connection.publish(CONNECTIONS, b"{}", reply=inbox)
            async with asyncio.timeout(5):
                while True:
                    told = json.loads((await answers.next_msg(timeout=5)).data)
                    names = [service_of(each.get("name", "")) for each in told["data"]["connections"]]
                    if any(name is not None and name[0] == service for name in names):
                        return next(node for node in self.nodes if node.machine.name == told["server"]["name"])

    async def whole(self, timeout_seconds: float) -> None:
        """Wait until every server has everything of every stream."""
        said = "nothing"
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_seconds):
                while said := await self._missing():
                    await asyncio.sleep(0.1)
        assert not said, f"not whole after {timeout_seconds} s: {said}"

    async def _missing(self) -> str:
        try:
            async with self.jetstream() as jetstream:
                for name in STREAMS:
                    cluster = (await jetstream.stream_info(name)).cluster
                    peers = (cluster.replicas or []) if cluster is not None else []
                    if cluster is None or not cluster.leader or len(peers) != NODES - 1:
                        return f"{name} has no leader"
                    if behind := [peer.name for peer in peers if peer.offline or not peer.current]:
                        return f"{name} is not current on {behind}"
        except (nats.errors.Error, OSError) as error:
            return repr(error)
        return ""


@contextmanager
def running_cluster(home: Path) -> Iterator[Cluster]:
    """Everything started; the services need not be ready yet."""
    network = Network()
    with ExitStack() as cleanup:
        cleanup.callback(network.close)
        passwords = {name: secrets.token_urlsafe(12) for name in (*SERVICES, OPERATOR)}
        issuer = servers.new_issuer()
        nodes = _nats(network, home, passwords, issuer)
        stores, urls = _stores(network, home)
        for each in (*nodes, *stores):
            each.start()
            cleanup.callback(each.end, signal.SIGKILL)
        environment = {
            **ROOMY,
            **urls,
            "PORTCULLIS_NATS_URL": ",".join(node.server.url for node in nodes),
            "PORTCULLIS_STREAM_REPLICAS": str(NODES),
            "PORTCULLIS_KEY_PEPPER": secrets.token_urlsafe(24),
            "PORTCULLIS_ADMIN_TOKEN": secrets.token_urlsafe(24),
            "PORTCULLIS_NATS_ISSUER_SEED": issuer,
            "PORTCULLIS_REGISTRATION": "open",
            "OTEL_SDK_DISABLED": "true",
        }
        hosts = []
        for name, services in (("one", EVERYTHING), ("two", WITHOUT_EDGE)):
            machine = network.machine(name)
            stack = Stack(home / name, port=EDGE_PORT, host=machine.address)
            cleanup.callback(stack.run, "down", check=False)
            _start_services(machine, stack, environment, passwords, services)
            hosts.append(stack)
        edge, other = hosts
        yield Cluster(network, nodes, edge, other, passwords)


def _nats(network: Network, home: Path, passwords: dict[str, str], issuer: str) -> list[Running]:
    machines = [network.machine(f"n{number}") for number in range(NODES)]
    routes = tuple(f"{machine.address}:{ROUTE_PORT}" for machine in machines)
    secret = secrets.token_urlsafe(12)
    return [
        Running(
            machine,
            servers.nats(
                home / machine.name,
                CLIENT_PORT,
                passwords,
                issuer,
                host=machine.address,
                member=Member(machine.name, ROUTE_PORT, routes, secret),
            ),
            home / f"{machine.name}.log",
        )
        for machine in machines
    ]


def _stores(network: Network, home: Path) -> tuple[list[Running], dict[str, str]]:
    machine = network.machine("stores")
    folder = home / machine.name
    folder.mkdir()
    redis = servers.redis(folder, REDIS_PORT, secrets.token_urlsafe(12), host=machine.address)
    postgres = servers.postgres(folder, POSTGRES_PORT, secrets.token_urlsafe(12), host=machine.address)
    with (folder / "postgres" / "pg_hba.conf").open("a") as rules:
        rules.write(f"host all all {network.block} scram-sha-256\n")
    running = [Running(machine, server, home / f"{server.name}.log") for server in (redis, postgres)]
    return running, {"PORTCULLIS_REDIS_URL": redis.url, "PORTCULLIS_DATABASE_URL": postgres.url}


def _start_services(
    machine: Machine, stack: Stack, environment: dict[str, str], passwords: dict[str, str], services: dict[str, int]
) -> None:
    own = {
        "PORTCULLIS_EDGE_HOST": machine.address,
        "PORTCULLIS_EDGE_PORT": str(EDGE_PORT),
        "PORTCULLIS_ALLOWED_HOSTS": machine.address,
    }
    given = {"environment": environment | own, "users": passwords, "services": services}
    bare = {name: value for name, value in os.environ.items() if not name.startswith("PORTCULLIS_")}
    completed = subprocess.run(
        machine.command(sys.executable, "-m", "tests.cluster.host", str(stack.home)),
        cwd=ROOT, env=bare, input=json.dumps(given), text=True, capture_output=True,
    )  # fmt: skip
    assert completed.returncode == 0, completed.stderr
