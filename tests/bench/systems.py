"""What is measured, a stack of Portcullis and what stands beside it: how it is started, and what processor time it uses."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import aiohttp
import psutil

from infra.embedded.control import Supervisor
from infra.embedded.home import ROOT, Home, free_port
from services.fallback_model import processors
from tests.bench import generator
from tests.bench.figures import Stretch
from tests.bench.generator import Load, Work
from tests.bench.load import BenchError, bodies, issued_key

START_SECONDS = 120
SERVER_SECONDS = 60
DISTINCT_REQUESTS = 600

Cpu = Callable[[], dict[str, float]]
"""Seconds of processor time that have been used so far, by stage."""


Pids = Callable[[], list[int]]
"""Its processes, without their children."""


@dataclass(slots=True)
class System:
    """One that answers requests, with the load that it is given. `pids`: what may be stopped while others are measured."""

    name: str
    load: Load
    cpu: Cpu
    pids: Pids = list

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """In the block it uses no processor time: some are busy while they wait, and would take it from whoever is measured."""
        family = family_of(self.pids())
        for process in family:
            process.suspend()
        try:
            yield
        finally:
            for process in family:
                process.resume()

    async def measure(self, work: Work) -> Stretch:
        """What this run came to."""
        before, own = self.cpu(), time.process_time()
        done = await work(self.load)
        spent = time.process_time() - own
        after = self.cpu()
        return done.stretch(spent, {stage: seconds - before.get(stage, 0.0) for stage, seconds in after.items()})


@dataclass(frozen=True, slots=True)
class Stack:
    """A running stack of Portcullis."""

    home: Home
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def token(self) -> str:
        return self.home.admin_token.read_text().strip()

    def cpu(self) -> dict[str, float]:
        """By service or server, all replicas and their children together."""
        spent: dict[str, float] = {}
        for state in Supervisor(self.home).processes():
            name = state.name.rpartition("_")[0]
            spent[name] = spent.get(name, 0.0) + seconds_of(state.pid)
        return spent

    def pids(self) -> list[int]:
        return [state.pid for state in Supervisor(self.home).processes() if state.pid]

    def setting(self, variable: str) -> str:
        """What the service that knows it was started with."""
        environments = (json.loads(path.read_text()) for path in self.home.environments.iterdir())
        return next(str(environment[variable]) for environment in environments if variable in environment)


def family_of(pids: Sequence[int]) -> list[psutil.Process]:
    """These processes and all below them."""
    found: list[psutil.Process] = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            found += [process, *process.children(recursive=True)]
    return found


def seconds_of(pid: int) -> float:
    """Processor seconds of a process and its children, also of those that have ended; 0 of one that is gone."""
    try:
        process = psutil.Process(pid)
        used = [each.cpu_times() for each in (process, *process.children(recursive=True))]
    except psutil.NoSuchProcess:
        return 0.0
    return sum(times.user + times.system for times in used) + used[0].children_user + used[0].children_system


@contextmanager
def portcullis(
    environment: Mapping[str, str],
    scale: Mapping[str, int] | None = None,
    *,
    together: bool = False,
    root: Path = ROOT,
    python: str = sys.executable,
) -> Iterator[Stack]:
    """A stack in a home of its own, with nothing of the caller's settings. Raises `BenchError`.

    `together`: its stages share processes, of which there is one for each processor; or, where no engine is named, a single one,
    with the shipped model in it, whose threads use all processors. `root`, `python`: of another checkout.
    """
    with tempfile.TemporaryDirectory(prefix="pc-bench-") as folder:
        port = free_port()
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PORTCULLIS_", "OTEL_"))}
        own = {**inherited, **environment, "PORTCULLIS_HOME": folder, "PORTCULLIS_EDGE_PORT": str(port)}

        def run(*arguments: str) -> None:
            done = subprocess.run(
                [python, "-m", "infra.embedded", *arguments], cwd=root, env=own, capture_output=True, timeout=START_SECONDS
            )
            if done.returncode:
                raise BenchError(f"{arguments[0]}: {(done.stdout + done.stderr).decode()[-500:]}")

        try:
            processes = processors.usable() if "PORTCULLIS_ENGINE_URL" in environment else 1
            layout = ["--together", f"--scale=edge={processes}"] if together else []
            run("up", "--detach", *layout, *(f"--scale={name}={count}" for name, count in (scale or {}).items()))
            yield Stack(Home(Path(folder)), port)
        finally:
            run("down")


@contextmanager
def server(
    what: str, command: Sequence[str], port: int, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that listens on `port` when the block begins, ended after it with its children. Raises `BenchError`."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [*command], cwd=ROOT, env={**os.environ, **(environment or {})}, stdout=log, stderr=log, start_new_session=True
        )
        try:
            deadline = time.monotonic() + SERVER_SECONDS
            while not _listens(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise BenchError(f"{what} does not start: {log.read().decode(errors='replace')[-500:]}")
                time.sleep(0.05)
            yield process
        finally:
            _end(process)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _end(process: subprocess.Popen[bytes]) -> None:
    family = family_of([process.pid])
    process.terminate()
    _, left = psutil.wait_procs(family, timeout=10)
    for each in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait()


@dataclass(frozen=True, slots=True)
class Served:
    """A server that answers on `port`."""

    port: int
    pid: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def cpu(self) -> float:
        return seconds_of(self.pid)


@contextmanager
def engine() -> Iterator[Served]:
    """A detection engine that answers a constant at once (`tests.bench.stub`)."""
    port = free_port()
    with server("the stub engine", [sys.executable, "-m", "tests.bench.stub", str(port)], port) as process:
        yield Served(port, process.pid)


@contextmanager
def monolith(stack: Stack, engine_url: str, workers: int) -> Iterator[Served]:
    """The same checks in one FastAPI application (`tests.bench.monolith`), on the stack's own PostgreSQL and Redis."""
    port = free_port()
    environment = {
        "BENCH_DATABASE_URL": stack.setting("PORTCULLIS_DATABASE_URL"),
        "BENCH_KEY_PEPPER": stack.setting("PORTCULLIS_KEY_PEPPER"),
        "BENCH_REDIS_URL": stack.setting("PORTCULLIS_REDIS_URL"),
        "BENCH_ENGINE_URL": engine_url,
    }
    command = [sys.executable, "-m", "tests.bench.monolith", str(port), str(workers)]
    with server("the one-process gateway", command, port, environment) as process:
        yield Served(port, process.pid)


@asynccontextmanager
async def key_of(stack: Stack) -> AsyncIterator[str]:
    async with aiohttp.ClientSession(stack.url) as session, issued_key(session, stack.token) as key:
        yield key


def requests(port: int, supply: list[str], keys: Sequence[str] = (), path: str = "/v1/detect") -> Iterator[bytes]:
    """Requests about these texts, over and over, with these keys in turn."""
    headers: list[dict[str, str]] = [{"X-API-Key": key} for key in keys] or [{}]
    return cycle([generator.request(port, path, body, headers[at % len(headers)]) for at, body in enumerate(bodies(supply))])


@asynccontextmanager
async def loaded(
    name: str, port: int, cpu: Cpu, supply: list[str], keys: Sequence[str] = (), path: str = "/v1/detect", pids: Pids = list
) -> AsyncIterator[System]:
    """A system under load that asks about these texts."""
    async with generator.loading(port, requests(port, supply, keys, path)) as load:
        yield System(name, load, cpu, pids)
