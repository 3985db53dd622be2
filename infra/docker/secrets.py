"""What infra/compose.yaml mounts: passwords, and the configuration of the servers that holds them; `./run secrets` makes it.

Passwords are made once and kept. What is made from them (NATS's users with their permissions, URLs) is written anew each time,
so that it follows the code. The folder can be entered by its owner only; the files in it can be read by anybody, since the
engine mounts them one by one for users of its containers that are nobody's here.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
from pathlib import Path
from typing import Any

from infra.embedded import servers
from infra.embedded.home import ROOT, HomeError, locate_home, write_private
from infra.embedded.stack import OPERATOR
from libs.common.subjects import SERVICES

ENVIRONMENT_FILES = (ROOT / ".env", ROOT / "infra" / ".env")
"""Beside each compose.yaml, where compose looks for it."""
FOLDER_VARIABLE = "PORTCULLIS_SECRETS"

ANYWHERE = "0.0.0.0"  # noqa: S104  # a container's own network
NATS_PORT, REDIS_PORT, POSTGRES_PORT = 4222, 6379, 5432
NATS_ROUTES_PORT, NATS_MONITOR_PORT = 6222, 8222
CLUSTER = ("nats", "nats-2", "nats-3")
"""The servers of infra/compose.cluster.yaml."""
STORE = Path("/data")
"""Where the servers' volumes are."""


def _kept(folder: Path, name: str, made: str) -> str:
    """The secret of this name: what is there, or what was `made` for it."""
    path = folder / name
    if not path.exists():
        write_private(path, made + "\n")
    return path.read_text().strip()


def _password(folder: Path, name: str) -> str:
    return _kept(folder, name, secrets.token_urlsafe(24))


def write(folder: Path) -> None:
    """Make what is missing in `folder`, and write what is made of it."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    for name in ("key-pepper", "admin-token", "grafana-password"):
        _password(folder, name)
    # Nothing is in it but during an exchange of the pepper; what compose mounts must be there.
    _kept(folder, "key-pepper-previous", "")
    postgres, redis = _password(folder, "postgres-password"), _password(folder, "redis-password")
    files = {
        "database-url": f"postgresql://{servers.POSTGRES_USER}:{postgres}@postgres:{POSTGRES_PORT}/{servers.POSTGRES_DATABASE}\n",
        "redis-url": f"redis://:{redis}@redis:{REDIS_PORT}/0\n",
        "redis.conf": servers.redis_configuration(redis, host=ANYWHERE, port=REDIS_PORT, store=STORE),
        **_nats(folder),
    }
    for name, text in files.items():
        write_private(folder / name, text)
    for path in folder.iterdir():
        path.chmod(0o444)


def _nats(folder: Path) -> dict[str, str]:
    """The configuration of the one server, and of each of the three of a cluster."""
    passwords = {user: _password(folder, f"nats-{user}") for user in (*SERVICES, OPERATOR)}
    issuer = _kept(folder, "nats-issuer", servers.new_issuer())
    routes = _password(folder, "nats-routes")

    def configuration(member: servers.Member | None) -> dict[str, object]:
        server = servers.nats_configuration(passwords, issuer, host=ANYWHERE, port=NATS_PORT, store=STORE, member=member)
        return {**server, "http": f"127.0.0.1:{NATS_MONITOR_PORT}"}  # for the health check, which runs beside it

    found = {"nats.conf": configuration(None)}
    addresses = tuple(f"{name}:{NATS_ROUTES_PORT}" for name in CLUSTER)
    for number, name in enumerate(CLUSTER, 1):
        node: dict[str, Any] = configuration(servers.Member(name, NATS_ROUTES_PORT, addresses, routes))
        # Clients know the names; the addresses of containers change.
        found[f"nats-cluster-{number}.conf"] = {**node, "cluster": {**node["cluster"], "no_advertise": True}}
    return {name: json.dumps(text, indent=1) + "\n" for name, text in found.items()}


def name_folder(folder: Path, path: Path) -> None:
    """Have an environment file name the folder; what else is in it stays."""
    lines = path.read_text().splitlines() if path.exists() else []
    kept = [line for line in lines if not line.startswith(f"{FOLDER_VARIABLE}=")]
    write_private(path, "\n".join([*kept, f"{FOLDER_VARIABLE}={folder}"]) + "\n")


def main() -> int:
    folder = locate_home(dict(os.environ)).path / "compose" / "secrets"
    try:
        write(folder)
        for path in ENVIRONMENT_FILES:
            name_folder(folder, path)
    except (OSError, HomeError, servers.ServerError) as error:
        print(f"portcullis: {folder}: {error}", file=sys.stderr)
        return 1
    print(f"The secrets are in {folder}. Next: docker compose up -d")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
