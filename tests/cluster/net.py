"""Machines in network namespaces, on a switch that is a namespace with a bridge. Needs root and iproute2.

The test itself has a leg in that network, so that it reaches every machine. Everything is gone with `close`, processes included,
and what an earlier run has left behind goes before.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil

_PREFIX = "pcnet"
_BRIDGE = "br0"
_OURS = 254
_NUMBERS = itertools.count(1)


def _ip(*arguments: str) -> str:
    completed = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if completed.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {completed.stderr.strip()}")
    return completed.stdout


def unavailable() -> str | None:
    """Why there can be no such network here, in one line; None: there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need the command ip (iproute2)"
    probe = f"{_PREFIX}{os.getpid()}-probe"
    try:
        _ip("netns", "add", probe)
        _ip("-n", probe, "link", "add", _BRIDGE, "type", "bridge")
    except OSError as error:
        return f"network namespaces cannot be had here ({error})"
    finally:
        subprocess.run(["ip", "netns", "del", probe], capture_output=True)
    return None


@dataclass(frozen=True, slots=True)
class Machine:
    """A namespace. `port`: where its cable ends at the switch."""

    name: str
    namespace: str
    address: str
    port: str

    def command(self, *command: str) -> list[str]:
        """The command line with which a program runs on this machine; its process is the program's own."""
        return ["ip", "netns", "exec", self.namespace, *command]


class Network:
    """A switch, and the machines that `machine` adds."""

    def __init__(self) -> None:
        _sweep()
        self.name = f"{_PREFIX}{os.getpid()}-{next(_NUMBERS)}"
        self.leg = f"pc{self.name.removeprefix(_PREFIX)}"  # Linux has 15 characters for it
        self._switch = f"{self.name}-sw"
        self._subnet = _free_subnet()
        self.machines: list[Machine] = []
        _ip("netns", "add", self._switch)
        try:
            _ip("-n", self._switch, "link", "add", _BRIDGE, "type", "bridge")
            _ip("-n", self._switch, "link", "set", _BRIDGE, "up")
            _ip("link", "add", self.leg, "type", "veth", "peer", "name", "ours", "netns", self._switch)
            _ip("-n", self._switch, "link", "set", "ours", "master", _BRIDGE, "up")
            _ip("address", "add", f"{self._subnet}.{_OURS}/24", "dev", self.leg)
            _ip("link", "set", self.leg, "up")
        except OSError:
            self.close()
            raise

    @property
    def block(self) -> str:
        """All its addresses."""
        return f"{self._subnet}.0/24"

    def machine(self, name: str) -> Machine:
        number = len(self.machines) + 1
        machine = Machine(name, f"{self.name}-{name}", f"{self._subnet}.{number}", f"to{number}")
        _ip("netns", "add", machine.namespace)
        self.machines.append(machine)
        _ip(
            "link", "add", machine.port, "netns", self._switch, "type", "veth", "peer", "name", "eth0", "netns", machine.namespace
        )
        _ip("-n", self._switch, "link", "set", machine.port, "master", _BRIDGE, "up")
        _ip("-n", machine.namespace, "address", "add", f"{machine.address}/24", "dev", "eth0")
        for device in ("eth0", "lo"):
            _ip("-n", machine.namespace, "link", "set", device, "up")
        return machine

    @contextmanager
    def cut_off(self, machine: Machine) -> Iterator[None]:
        """Its cable is pulled: nothing arrives, nothing leaves, and nobody is told."""
        _ip("-n", self._switch, "link", "set", machine.port, "down")
        try:
            yield
        finally:
            _ip("-n", self._switch, "link", "set", machine.port, "up")

    def close(self) -> None:
        """End what runs on the machines, and take it all away; the test's own leg goes with the switch."""
        for namespace in (*(machine.namespace for machine in self.machines), self._switch):
            _remove(namespace)
        self.machines.clear()


def _remove(namespace: str) -> None:
    with contextlib.suppress(OSError):
        for pid in _ip("netns", "pids", namespace).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
    with contextlib.suppress(OSError):
        _ip("netns", "del", namespace)


def _sweep() -> None:
    """Take away what a run that was killed has left."""
    for line in _ip("netns", "list").splitlines():
        found = re.match(rf"({_PREFIX}(\d+)-\S+)", line)
        if found is not None and not psutil.pid_exists(int(found[2])):
            _remove(found[1])


def _free_subnet() -> str:
    """One of the networks that are set aside for measurements (RFC 2544), to which no route leads here."""
    routes = _ip("route", "show", "table", "all")
    while True:
        subnet = f"198.18.{random.randrange(256)}"
        if f"{subnet}." not in routes:
            return subnet
