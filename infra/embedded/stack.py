"""What runs: the servers that no URL replaces, the services and their replicas, and the environment of each.

`plan` decides, `write` puts the plan into the home: one private environment file per service and supervisord's configuration.
"""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from infra.embedded import servers
from infra.embedded.home import HOME_VARIABLE, ROOT, Home, HomeError, is_free, write_private
from infra.embedded.supervise import SUPERVISOR_PID_VARIABLE
from libs.common.subjects import SERVICES

SERVERS = ("nats", "redis", "postgres")

OPERATOR = "operator"
"""The NATS user of whoever runs the system; it may use every subject."""

DRAIN_SECONDS = 20
"""A service finishes what it has in hand within 15 s (`PORTCULLIS_DRAIN_SECONDS`), and is killed a while after that."""
STOP_RESERVE_SECONDS = 5

EDGE_BACKLOG = 2048
"""Connections that wait while the edge is busy or restarts; the kernel cuts it to net.core.somaxconn."""

LOOPBACK = ("127.0.0.1", "localhost")

LOG_BYTES = 10_000_000
LOG_BACKUPS = 2

# A secret goes to the service that needs it and to no other. Everything else that starts with PORTCULLIS_ goes to all.
ONLY_FOR = {
    "PORTCULLIS_DATABASE_URL": ("auth",),
    "PORTCULLIS_KEY_PEPPER": ("auth",),
    "PORTCULLIS_KEY_PEPPER_PREVIOUS": ("auth",),
    "PORTCULLIS_ADMIN_TOKEN": ("auth", "console"),
    "PORTCULLIS_NATS_ISSUER_SEED": ("auth",),
    "PORTCULLIS_REDIS_URL": ("limiter",),
}
TOGETHER = ("edge", "auth", "limiter", "detector_proxy")
"""The stages of a request in the order of its path, which share the edge's processes with `--together`."""
MODEL = "fallback_model"
"""Joins them where there is one such process: of several, each would have a model that knows nothing of what the others hold."""
SINGLE = ("console",)
"""Services of which there is one: each copy would know only a part."""
ENGINE_PREFIX = "PORTCULLIS_ENGINE_"  # for the proxy: addresses and keys of somebody else's service


class StackError(Exception):
    """The stack cannot be started as asked; the text is one line that says what to do."""


@dataclass(frozen=True, slots=True)
class Program:
    """A program under the supervisor. `replicas` of it run; `group`: what is stopped together."""

    name: str
    command: tuple[str, ...]
    group: str
    replicas: int = 1
    stop_signal: str = "TERM"
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    metrics_ports: tuple[int, ...] = ()
    """Where each replica serves its metrics; empty: nowhere."""
    listen: tuple[str, int] | None = None
    """Host and port of a socket that all replicas share as their file descriptor 0."""
    is_patient: bool = False
    """As of `servers.Server`."""


@dataclass(frozen=True, slots=True)
class Plan:
    """All programs, and where the edge is reached. `nats_url`: where clients reach NATS; None when it is not ours."""

    programs: tuple[Program, ...]
    edge_host: str
    edge_port: int
    nats_url: str | None = None
    metrics_host: str = "127.0.0.1"


def parse_scale(values: list[str]) -> dict[str, int]:
    """`["edge=2"]` → `{"edge": 2}`."""
    scale: dict[str, int] = {}
    for value in values:
        name, _, count = value.partition("=")
        if name not in SERVICES:
            raise StackError(f"--scale {value}: there is no service {name!r}; there are {', '.join(SERVICES)}")
        if not count.isdecimal() or not 1 <= int(count) <= 64:
            raise StackError(f"--scale {value}: say how many, from 1 to 64, as in --scale {name}=2")
        if name in SINGLE and int(count) > 1:
            raise StackError(f"--scale {value}: there can be one {name} only; it keeps what it shows in its own memory")
        scale[name] = int(count)
    return scale


def _port(environment: Mapping[str, str], name: str) -> int | None:
    variable = f"PORTCULLIS_{name.upper()}_PORT"
    text = environment.get(variable)
    if text is None:
        return None
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise StackError(f"{variable}={text} is not a port; set it to a number from 1 to 65535")
    return int(text)


def _claim_port(environment: Mapping[str, str], home: Home, name: str) -> int:
    """The port of an internal server: the one that was asked for, or a free one that the home remembers."""
    port = _port(environment, name)
    if port is None:
        return home.port(name)
    if not is_free(servers.HOST, port):
        raise StackError(f"port {port} is taken; set PORTCULLIS_{name.upper()}_PORT to a free one, or leave it unset")
    return port


def plan(home: Home, environment: Mapping[str, str], scale: Mapping[str, int], *, together: bool = False) -> Plan:
    """Decide what to run. Prepares the servers' files (the first time, PostgreSQL's data directory).

    `together`: the stages of a request run in the edge's processes, and in a single one the model, too, unless it is scaled.

    Raises StackError, ServerError, HomeError.
    """
    for name in TOGETHER[1:] if together else ():
        if name in scale:
            raise StackError(
                f"--scale {name}={scale[name]}: with --together there is one {name} in each edge; scale edge instead"
            )
    shared = _shared(scale) if together else ("edge",)
    edge_host = environment.get("PORTCULLIS_EDGE_HOST", "127.0.0.1")
    edge_port = _port(environment, "edge") or 8000
    if ":" in edge_host:
        raise StackError(f"PORTCULLIS_EDGE_HOST={edge_host}: the edge listens on IPv4 here; put a proxy in front of it for IPv6")
    if not is_free(edge_host, edge_port):
        raise StackError(
            f"port {edge_port} on {edge_host} is taken; choose another one: PORTCULLIS_EDGE_PORT={edge_port + 1} ./run up"
        )
    wanted = {name: value for name, value in environment.items() if name.startswith("PORTCULLIS_") and value}
    running: list[servers.Server] = []
    nats_url: str | None = None
    passwords: dict[str, str] = {}
    if "PORTCULLIS_NATS_URL" not in wanted:
        passwords = {user: home.secret(f"nats-{user}") for user in (*SERVICES, OPERATOR)}
        issuer = wanted.setdefault("PORTCULLIS_NATS_ISSUER_SEED", home.secret("nats-issuer", servers.new_issuer))
        server = servers.nats(home.path, _claim_port(environment, home, "nats"), passwords, issuer)
        running.append(server)
        nats_url = wanted["PORTCULLIS_NATS_URL"] = server.url
    if "PORTCULLIS_REDIS_URL" not in wanted:
        server = servers.redis(home.path, _claim_port(environment, home, "redis"), home.secret("redis"))
        running.append(server)
        wanted["PORTCULLIS_REDIS_URL"] = server.url
    if "PORTCULLIS_DATABASE_URL" not in wanted:
        server = servers.postgres(home.path, _claim_port(environment, home, "postgres"), home.secret("postgres"))
        running.append(server)
        wanted["PORTCULLIS_DATABASE_URL"] = server.url
    wanted.setdefault("PORTCULLIS_KEY_PEPPER", home.secret("key-pepper"))
    if (other := home.kept_secret("key-pepper-previous")) is not None:  # there only while the pepper is exchanged
        wanted.setdefault("PORTCULLIS_KEY_PEPPER_PREVIOUS", other)
    wanted.setdefault("PORTCULLIS_ADMIN_TOKEN", home.secret("admin-token"))
    if edge_host in LOOPBACK:
        # Whoever reaches the gateway may register a key: fine on this machine alone, and not a default for anybody else's.
        wanted.setdefault("PORTCULLIS_REGISTRATION", "open")
    console = _console(home, environment, wanted, edge_host)
    first_metrics_port = _port(wanted, "metrics")
    wanted.pop("PORTCULLIS_METRICS_PORT", None)
    processes = 0
    programs = [
        Program(
            server.name,
            server.command,
            group="servers",
            stop_signal=server.stop_signal,
            environment={variable: environment.get(variable, value) for variable, value in server.environment.items()},
            is_patient=server.is_patient,
        )
        for server in running
    ]
    for name in SERVICES:
        if name in shared[1:]:
            continue
        members = shared if name == "edge" else (name,)
        replicas = scale.get(name, 1)
        own = {variable: value for variable, value in wanted.items() if any(_is_for(variable, member) for member in members)}
        own |= _logins(members, passwords)
        for member in members:
            own |= console[member]
        if name == "edge":
            own |= {"PORTCULLIS_EDGE_HOST": edge_host, "PORTCULLIS_EDGE_PORT": str(edge_port)}
        programs.append(
            Program(
                name,
                (sys.executable, "-m", *(("services", *members) if len(members) > 1 else (f"services.{name}",))),
                group="edge" if name == "edge" else "services",
                replicas=replicas,
                environment=own,
                metrics_ports=_metrics_ports(home, name, replicas, first_metrics_port and first_metrics_port + processes),
                listen=(edge_host, edge_port) if name == "edge" else None,
            )
        )
        processes += replicas
    return Plan(tuple(programs), edge_host, edge_port, nats_url, wanted.get("PORTCULLIS_METRICS_HOST", "127.0.0.1"))


def _shared(scale: Mapping[str, int]) -> tuple[str, ...]:
    """What runs in each of the edge's processes, with `--together`."""
    return TOGETHER if scale.get("edge", 1) > 1 or MODEL in scale else (*TOGETHER, MODEL)


def _logins(members: Sequence[str], passwords: Mapping[str, str]) -> dict[str, str]:
    """As whom the services of a process connect to NATS; without passwords it is not ours, and the operator has said so."""
    if not passwords:
        return {}
    if len(members) > 1:
        return {"PORTCULLIS_NATS_PASSWORDS": json.dumps({member: passwords[member] for member in members})}
    return {"PORTCULLIS_NATS_USER": members[0], "PORTCULLIS_NATS_PASSWORD": passwords[members[0]]}


def _metrics_ports(home: Home, service: str, replicas: int, first: int | None) -> tuple[int, ...]:
    """One number for all would set every process on the same port: it is the first of a row, in the order of the path."""
    if first is not None:
        return tuple(range(first, first + replicas))
    return tuple(home.port(f"metrics-{service}-{number}") for number in range(replicas))


def _is_for(variable: str, service: str) -> bool:
    if variable.startswith(ENGINE_PREFIX):
        return service == "detector_proxy"
    return service in ONLY_FOR.get(variable, (service,))


def _collectors_own(environment: Mapping[str, str]) -> bool:
    """Whether the operator has said where traces go, or that there are none."""
    elsewhere = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    return any(environment.get(name) for name in elsewhere) or environment.get("OTEL_SDK_DISABLED", "").lower() == "true"


def _console(home: Home, environment: Mapping[str, str], wanted: dict[str, str], edge_host: str) -> dict[str, dict[str, str]]:
    """What the services must know of the console, by service."""
    url = f"http://{servers.HOST}:{_claim_port(environment, home, 'console')}"
    console = {"PORTCULLIS_CONSOLE_HOST": servers.HOST, "PORTCULLIS_CONSOLE_PORT": url.rpartition(":")[2]}
    # Whoever lets the gateway be reached under other names, or through a proxy, has callers that are not on this machine.
    elsewhere = ("PORTCULLIS_ALLOWED_HOSTS", "PORTCULLIS_TRUSTED_PROXIES", "PORTCULLIS_CORS_ORIGINS")
    if edge_host in LOOPBACK and not any(name in wanted for name in elsewhere):
        console["PORTCULLIS_CONSOLE_OPEN"] = wanted.get("PORTCULLIS_CONSOLE_OPEN", "true")
    traces = {} if _collectors_own(environment) else {"OTEL_EXPORTER_OTLP_ENDPOINT": url}
    known = {name: dict(traces) for name in SERVICES if name != "console"}
    known["edge"]["PORTCULLIS_CONSOLE_URL"] = wanted.get("PORTCULLIS_CONSOLE_URL", url)
    return known | {"console": console}


def external_hosts(environment: Mapping[str, str]) -> list[str]:
    """`NATS at host:port` for each server that a URL replaces, without its credentials."""
    found = []
    for label in ("NATS", "REDIS", "DATABASE"):
        url = environment.get(f"PORTCULLIS_{label}_URL")
        if url:
            first = urlsplit(url.split(",")[0])
            found.append(f"{label.title() if label != 'NATS' else label} at {first.hostname}:{first.port}")
    return found


def write(home: Home, plan: Plan) -> None:
    """Put the plan into the home, for the supervisor and for `just service`."""
    for program in plan.programs:
        environment = {HOME_VARIABLE: str(home.path), **program.environment}
        write_private(home.environments / f"{program.name}.json", json.dumps(environment, indent=1) + "\n")
    write_private(home.supervisor_configuration, configuration(home, plan.programs))
    write_private(home.metrics_targets, json.dumps(targets(plan), indent=1) + "\n")
    write_private(home.edge_address, json.dumps({"host": plan.edge_host, "port": plan.edge_port, "nats": plan.nats_url}) + "\n")


def targets(plan: Plan) -> list[dict[str, object]]:
    """Where each replica serves its metrics, as Prometheus's file_sd reads it."""
    host = LOOPBACK[0] if plan.metrics_host == "0.0.0.0" else plan.metrics_host  # noqa: S104  # who listens everywhere is here, too
    return [
        {"targets": [f"{host}:{port}"], "labels": {"service": program.name, "replica": str(number)}}
        for program in plan.programs
        for number, port in enumerate(program.metrics_ports)
    ]


# Servers first, the edge last; stopped in the opposite order, each group together.
PRIORITIES = {"servers": 10, "services": 20, "edge": 30}


def configuration(home: Home, programs: tuple[Program, ...]) -> str:
    """supervisord's configuration for these programs. It holds no secret."""
    for path in (str(home.path), str(ROOT), sys.executable):
        if any(special in path for special in ("%", " ;", " #", "\n")):
            raise HomeError(f"{path!r} holds a character that supervisor would interpret (%, ' #' or ' ;'); use another folder")
    sections = [
        {
            "": "supervisord",
            "nodaemon": "true",
            "silent": "true",
            "logfile": str(home.logs / "supervisor.log"),
            "logfile_maxbytes": str(LOG_BYTES),
            "logfile_backups": str(LOG_BACKUPS),
            "pidfile": str(home.path / "supervisord.pid"),
            "directory": str(ROOT),
        },
        {"": "unix_http_server", "file": str(home.supervisor_socket()), "chmod": "0600"},
        {
            "": "rpcinterface:supervisor",
            "supervisor.rpcinterface_factory": "supervisor.rpcinterface:make_main_rpcinterface",
        },
        *(_program_section(home, program) for program in programs),
        *(
            {
                "": f"group:{group}",
                "programs": ",".join(program.name for program in programs if program.group == group),
                "priority": str(PRIORITIES[group]),
            }
            for group in PRIORITIES
            if any(program.group == group and program.listen is None for program in programs)
        ),
    ]
    return "\n".join(
        f"[{section['']}]\n" + "".join(f"{name} = {value}\n" for name, value in section.items() if name) for section in sections
    )


def _stop_seconds(environment: Mapping[str, str]) -> int:
    """How long a service may take to stop. A number that is none its own process complains about."""
    asked = environment.get("PORTCULLIS_DRAIN_SECONDS", "")
    if not asked.replace(".", "", 1).isdecimal():
        return DRAIN_SECONDS
    return max(DRAIN_SECONDS, math.ceil(float(asked)) + STOP_RESERVE_SECONDS)


def _program_section(home: Home, program: Program) -> dict[str, str]:
    process = f"{program.name}_%(process_num)d"
    child = [sys.executable, "-I", "-S", str(Path(__file__).with_name("child.py"))]
    child += ["--environment", str(home.environments / f"{program.name}.json")]
    child += ["--parent-pid-variable", SUPERVISOR_PID_VARIABLE, "--parent-signal", program.stop_signal]
    if program.metrics_ports:
        child += ["--metrics-ports", ",".join(map(str, program.metrics_ports))]
    if program.is_patient:
        child.append("--patient")
    section = {
        "": f"{'fcgi-' if program.listen else ''}program:{program.name}",
        "command": " ".join(
            [
                *map(shlex.quote, child),
                "--starts",
                shlex.quote(f"{home.starts}/") + process,
                "--number",
                "%(process_num)d",
                "--",
                *map(shlex.quote, program.command),
            ]
        ),
        "process_name": process,
        "numprocs": str(program.replicas),
        "priority": str(PRIORITIES[program.group]),
        # Started again whatever happens, for ever: the child itself paces a program that keeps dying, so supervisor's own
        # count of retries, after which it gives up, must never begin (a start counts as successful at once).
        "autorestart": "true",
        "startsecs": "0",
        "stopsignal": program.stop_signal,
        "stopwaitsecs": str(_stop_seconds(program.environment)),
        "killasgroup": "true",
        "redirect_stderr": "true",
        "stdout_logfile": f"{home.logs}/{process}.log",
        "stdout_logfile_maxbytes": str(LOG_BYTES),
        "stdout_logfile_backups": str(LOG_BACKUPS),
    }
    if program.listen:
        host, port = program.listen
        section |= {
            "socket": f"tcp://{host}:{port}",
            "socket_backlog": str(EDGE_BACKLOG),
            "environment": 'PORTCULLIS_EDGE_SOCKET_FD="0"',
        }
    return section
