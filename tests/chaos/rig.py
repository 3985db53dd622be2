"""A whole stack in which each connection runs over a link, with a primary engine that can be put in front of the pool, small
disks and clocks of its own: everything that the faults of the matrix need.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import pytest

from libs.common.subjects import SERVICES
from tests import debian
from tests.chaos.hostile_engine import NAME, HostileEngine
from tests.chaos.kit import Stack, wait_for_detection
from tests.chaos.links import Link, Links

DISK_BYTES = 256 * 1024**2
ENGINE_TIMEOUT_SECONDS = 0.8
_ENGINE_VARIABLES = ("ENGINE_URL", "ENGINE_KIND", "ENGINE_NAME", "ENGINE_TIMEOUT_SECONDS")


@dataclass(slots=True)
class Rig:
    """`stack` must be up; `wire` puts the links between its processes."""

    stack: Stack
    engine: HostileEngine
    links: Links = field(default_factory=Links)
    nats: dict[str, Link] = field(default_factory=dict)
    """Of each service, its own."""
    redis: Link = field(init=False)
    postgres: Link = field(init=False)
    primary: Link = field(init=False)
    with_engine: bool = False

    # --- building --------------------------------------------------------------------------------------------------------

    def wire(self) -> None:
        """Lead every connection over a link, and start the services anew."""
        for service in SERVICES:
            self.nats[service] = self._lead(service, "PORTCULLIS_NATS_URL")
        self.redis = self._lead("limiter", "PORTCULLIS_REDIS_URL")
        self.postgres = self._lead("auth", "PORTCULLIS_DATABASE_URL")
        self.primary = self.links.to(self.engine.port)
        with ThreadPoolExecutor(len(SERVICES)) as pool:
            list(pool.map(self.stack.end, SERVICES))
        wait_for_detection(self.stack, 180)

    def _lead(self, service: str, variable: str) -> Link:
        url = urlsplit(self.stack.environment_of(service)[variable])
        assert url.port is not None, url.hostname
        link = self.links.to(url.port)
        host = url.netloc.rpartition(":")[0]
        self.stack.set_environment(service, **{variable: urlunsplit(url._replace(netloc=f"{host}:{link.port}"))})
        return link

    def use_engine(self, wanted: bool) -> None:
        """With a primary engine in front of the pool, or without."""
        if wanted == self.with_engine:
            return
        values = (f"http://127.0.0.1:{self.primary.port}", "detect", NAME, str(ENGINE_TIMEOUT_SECONDS))
        changes = {f"PORTCULLIS_{name}": value if wanted else None for name, value in zip(_ENGINE_VARIABLES, values, strict=True)}
        self.stack.set_environment("detector_proxy", **changes)
        self.stack.end("detector_proxy")
        self.with_engine = wanted
        wait_for_detection(self.stack, 180)

    def close(self) -> None:
        self.links.close()

    # --- faults of processes ---------------------------------------------------------------------------------------------

    @contextmanager
    def killed(self, name: str) -> Iterator[None]:
        """SIGKILL; by the end of the block another is there (the supervisor's doing)."""
        self.stack.end(name, signal.SIGKILL)
        yield

    @contextmanager
    def restarted(self, name: str) -> Iterator[None]:
        """As an operator does it."""
        self.stack.end(name, signal.SIGINT if name == "postgres" else signal.SIGTERM)
        yield

    @contextmanager
    def off_clock(self, service: str, seconds: float, *, usable: bool) -> Iterator[None]:
        """The service with a clock that is `seconds` ahead of everybody else's; its monotonic clock is as it was."""
        try:
            library = next(debian.unpacked("libfaketime").rglob("libfaketime.so.1"))
        except debian.NotToBeHadError as error:
            pytest.skip(str(error))
        names = {"LD_PRELOAD": str(library), "FAKETIME": f"{seconds:+.0f}s", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
        self.stack.set_environment(service, **names)
        self.stack.end(service)
        if usable:
            wait_for_detection(self.stack, 180)
        try:
            yield
        finally:
            self.stack.set_environment(service, **dict.fromkeys(names))
            self.stack.end(service)

    # --- faults of links -------------------------------------------------------------------------------------------------

    def link_of(self, component: str) -> list[Link]:
        """What a component is reached by: a service by its connection to NATS, NATS by everybody's."""
        if component == "nats":
            return list(self.nats.values())
        return [self.nats[component]] if component in self.nats else [getattr(self, component)]

    @contextmanager
    def held(self, component: str) -> Iterator[None]:
        with ExitStack() as stack:
            for link in self.link_of(component):
                stack.enter_context(link.held())
            yield

    @contextmanager
    def cut(self, component: str) -> Iterator[None]:
        with ExitStack() as stack:
            for link in self.link_of(component):
                stack.enter_context(link.cut())
            yield

    @contextmanager
    def slow(self, component: str, seconds: float) -> Iterator[None]:
        with ExitStack() as stack:
            for link in self.link_of(component):
                stack.enter_context(link.slow(seconds))
            yield

    @contextmanager
    def engine_is(self, mode: str) -> Iterator[None]:
        self.engine.mode = mode
        try:
            yield
        finally:
            self.engine.mode = "ok"

    # --- disks -----------------------------------------------------------------------------------------------------------

    @contextmanager
    def full_disk(self, name: str) -> Iterator[None]:
        """The disk that `name` (logs, jetstream, redis, postgres) has for itself has no byte left."""
        disk = disk_of(self.stack.home, name)
        if not disk.is_mount():
            pytest.skip("a small disk is a tmpfs, which only root can mount")
        if name == "postgres":
            self._move_postgres(disk)
        ballast = disk / "ballast"
        _fill(ballast)
        try:
            yield
        finally:
            ballast.unlink()

    def _move_postgres(self, disk: Path) -> None:
        """initdb moves the finished cluster into its place, which cannot be another disk; afterwards it can."""
        data = self.stack.home / "postgres"
        if data.is_symlink():
            return
        with self.stack.stopped("postgres"):
            shutil.move(data, disk / "data")
            for path in (disk / "data", *(disk / "data").rglob("*")):
                shutil.chown(path, "nobody")
            data.symlink_to(disk / "data")
        wait_for_detection(self.stack, 180)


def disk_of(home: Path, name: str) -> Path:
    return home / name if name in ("logs", "jetstream") else home / f"disk-{name}"


def _fill(ballast: Path) -> None:
    with ballast.open("wb", buffering=0) as file:
        for size in (1024**2, 4096, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"\0" * size)
    assert shutil.disk_usage(ballast).free == 0, os.strerror(errno.ENOSPC)


@contextmanager
def small_disks(home: Path) -> Iterator[None]:
    """Disks of their own for what is written, before the stack is first up; none where we are not root."""
    mounted = []
    if os.geteuid() == 0:
        home.chmod(0o711)
        for name in ("logs", "jetstream", "redis", "postgres"):
            disk = disk_of(home, name)
            disk.mkdir()
            options = f"size={DISK_BYTES},mode=0711"
            if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "portcullis-test", str(disk)]).returncode == 0:
                mounted.append(disk)
        if disk_of(home, "redis").is_mount():
            (home / "appendonly.aof").symlink_to(disk_of(home, "redis") / "appendonly.aof")
    try:
        yield
    finally:
        for disk in mounted:
            subprocess.run(["umount", "--lazy", str(disk)], check=True)
