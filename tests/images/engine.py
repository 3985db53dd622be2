"""buildah and podman on a store and settings of our own, so that nothing of the machine's is touched."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


class TrialError(Exception):
    """One line that says what cannot be done, or was not as it must be."""


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def expect(condition: object, otherwise: str) -> None:
    if not condition:
        raise TrialError(otherwise)


def check_machine(*programs: str) -> None:
    missing = [name for name in programs if shutil.which(name) is None]
    expect(not missing, f"{', '.join(missing)} missing: apt-get install --no-install-recommends {' '.join(programs)} runc")
    expect(sys.platform == "linux" and os.geteuid() == 0, "this needs Linux and root")


@dataclass
class Engine:
    """`environment`: under which podman, buildah and podman-compose work on this store."""

    home: Path
    driver: str
    environment: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.home.mkdir(parents=True, exist_ok=True)
        storage, settings = self.home / "storage.conf", self.home / "containers.conf"
        storage.write_text(
            f'[storage]\ndriver = "{self.driver}"\ngraphroot = "{self.home / "storage"}"\nrunroot = "{self.home / "run"}"\n'
        )
        # podman would ask for more open files and processes than root of a container or of a small machine may have.
        files, processes = (resource.getrlimit(limit)[1] for limit in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC))
        processes = 32768 if processes == resource.RLIM_INFINITY else min(processes, 32768)
        runtime = "runc" if shutil.which("runc") else "crun"  # crun refuses machines with both versions of cgroups
        settings.write_text(
            f'[containers]\ndefault_ulimits = ["nofile={files}:{files}", "nproc={processes}:{processes}"]\n'
            f'[engine]\nruntime = "{runtime}"\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\n'
        )
        self.environment = {
            **os.environ,
            "CONTAINERS_STORAGE_CONF": str(storage),
            "CONTAINERS_CONF": str(settings),
            # Health checks are run by us: podman would have systemd run them.
            "DISABLE_HC_SYSTEMD": "true",
        }

    def run(self, *command: str) -> str:
        """What a command prints. Raises `TrialError` with the end of its complaint."""
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=self.environment)
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["it said nothing"]
            raise TrialError(f"{' '.join(command[:3])} … failed with {done.returncode}: {' / '.join(said[-4:])}")
        return done.stdout.strip()

    def buildah(self, *arguments: str) -> str:
        return self.run("buildah", *arguments)

    def podman(self, *arguments: str) -> str:
        return self.run("podman", *arguments)

    def status(self, *arguments: str) -> int:
        """The exit status of a command of podman that may fail."""
        return subprocess.run(["podman", *arguments], cwd=ROOT, capture_output=True, env=self.environment).returncode

    def logs(self, name: str) -> str:
        done = subprocess.run(["podman", "logs", "--tail", "5", name], capture_output=True, text=True, env=self.environment)
        return (done.stdout + done.stderr).strip()

    def inspect_image(self, name: str) -> dict[str, Any]:
        (described,) = json.loads(self.podman("image", "inspect", name))
        return dict(described)

    def wait_healthy(self, names: Sequence[str], seconds: float = 90.0) -> None:
        """Until the health check of each container says that it is well; fails when one has ended."""
        deadline = time.monotonic() + seconds
        waiting = list(names)
        while waiting:
            for name in list(waiting):
                if self.status("healthcheck", "run", name) == 0:
                    waiting.remove(name)
                elif self.podman("inspect", "--format", "{{.State.Status}}", name) not in ("running", "created"):
                    raise TrialError(f"{name} has ended: {self.logs(name)}")
            if waiting and time.monotonic() > deadline:
                raise TrialError(f"{waiting[0]} is not healthy: {self.logs(waiting[0])}")
            time.sleep(0.2)
