from __future__ import annotations

import json
import shlex
import socket
from pathlib import Path
from typing import Any

import pytest
from supervisor.options import ServerOptions

from infra.embedded import stack
from infra.embedded.home import HOME_VARIABLE, Home, HomeError, free_port, open_home
from libs.common.subjects import SERVICES

# PostgreSQL's data directory takes seconds to make; the integration tests have one.
NO_POSTGRES = {"PORTCULLIS_DATABASE_URL": "postgresql://user:db-secret@db.example:5432/portcullis"}
NO_SERVERS = NO_POSTGRES | {
    "PORTCULLIS_NATS_URL": "nats://user:nats-secret@nats.example:4222,nats://second.example:4222",
    "PORTCULLIS_REDIS_URL": "redis://:redis-secret@redis.example:6379/0",
}


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return open_home({HOME_VARIABLE: str(tmp_path / "home with spaces")})


def plan(home: Home, environment: dict[str, str] | None = None, **scale: int) -> stack.Plan:
    return stack.plan(home, {"PORTCULLIS_EDGE_PORT": str(free_port()), **NO_POSTGRES, **(environment or {})}, scale)


def environments(planned: stack.Plan) -> dict[str, dict[str, str]]:
    return {program.name: dict(program.environment) for program in planned.programs}


def test_a_url_replaces_its_server(home: Home) -> None:
    assert [program.name for program in plan(home).programs if program.group == "servers"] == ["nats", "redis"]
    planned = plan(home, NO_SERVERS)
    assert [program.name for program in planned.programs] == list(SERVICES)
    assert environments(planned)["limiter"]["PORTCULLIS_REDIS_URL"] == NO_SERVERS["PORTCULLIS_REDIS_URL"]
    assert all(one["PORTCULLIS_NATS_URL"] == NO_SERVERS["PORTCULLIS_NATS_URL"] for one in environments(planned).values())


def test_a_server_has_the_environment_that_it_needs_unless_the_operator_sets_it(home: Home) -> None:
    assert environments(plan(home))["nats"] == {"GOGC": "25"}
    assert environments(plan(home, {"GOGC": "off", "HOME": "/root"}))["nats"] == {"GOGC": "off"}
    assert environments(plan(home))["redis"] == {}


@pytest.mark.parametrize(("drain", "seconds"), [("60", 65), ("0.5", 20), ("soon", 20), ("", 20)])
def test_whoever_may_take_longer_to_stop_is_killed_later(home: Home, drain: str, seconds: int) -> None:
    planned = plan(home, NO_SERVERS | {"PORTCULLIS_DRAIN_SECONDS": drain})
    assert stack.configuration(home, planned.programs).count(f"stopwaitsecs = {seconds}\n") == len(SERVICES)


def test_external_servers_are_named_without_their_credentials() -> None:
    named = " ".join(stack.external_hosts(NO_SERVERS))
    assert "nats.example:4222" in named
    assert "redis.example:6379" in named
    assert "db.example:5432" in named
    assert "secret" not in named


def test_each_service_has_only_the_secrets_that_it_needs(home: Home) -> None:
    engine = {"PORTCULLIS_ENGINE_URL": "http://engine.example", "PORTCULLIS_ENGINE_API_KEY": "engine-secret"}
    exchange = {"PORTCULLIS_KEY_PEPPER_PREVIOUS": "the pepper until now"}
    found = environments(plan(home, engine | exchange | {"PORTCULLIS_LOG_LEVEL": "WARNING"}))
    holders = {
        variable: {name for name, one in found.items() if variable in one}
        for variable in (*stack.ONLY_FOR, *engine, "PORTCULLIS_LOG_LEVEL")
    }
    assert holders == {
        "PORTCULLIS_DATABASE_URL": {"auth"},
        "PORTCULLIS_KEY_PEPPER": {"auth"},
        "PORTCULLIS_KEY_PEPPER_PREVIOUS": {"auth"},
        "PORTCULLIS_ADMIN_TOKEN": {"auth", "console"},
        "PORTCULLIS_NATS_ISSUER_SEED": {"auth"},
        "PORTCULLIS_REDIS_URL": {"limiter"},
        "PORTCULLIS_ENGINE_URL": {"detector_proxy"},
        "PORTCULLIS_ENGINE_API_KEY": {"detector_proxy"},
        "PORTCULLIS_LOG_LEVEL": set(SERVICES),
    }
    assert {name: found[name]["PORTCULLIS_NATS_USER"] for name in SERVICES} == {name: name for name in SERVICES}
    assert len({found[name]["PORTCULLIS_NATS_PASSWORD"] for name in SERVICES}) == len(SERVICES)


def test_secrets_stay_the_same_and_can_be_set_from_outside(home: Home) -> None:
    first, second = plan(home, NO_SERVERS), plan(home, NO_SERVERS | {"PORTCULLIS_ADMIN_TOKEN": "my own"})
    assert environments(first)["auth"]["PORTCULLIS_KEY_PEPPER"] == environments(second)["auth"]["PORTCULLIS_KEY_PEPPER"]
    assert environments(second)["auth"]["PORTCULLIS_ADMIN_TOKEN"] == "my own"


def test_the_pepper_is_exchanged_when_another_one_is_beside_it(home: Home) -> None:
    assert "PORTCULLIS_KEY_PEPPER_PREVIOUS" not in environments(plan(home, NO_SERVERS))["auth"]
    kept = home.path / "secrets" / "key-pepper"
    old = kept.read_text().strip()
    kept.rename(kept.with_name("key-pepper-previous"))
    auth = environments(plan(home, NO_SERVERS))["auth"]
    assert auth["PORTCULLIS_KEY_PEPPER_PREVIOUS"] == old != auth["PORTCULLIS_KEY_PEPPER"]


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"PORTCULLIS_EDGE_PORT": "http"}, "PORTCULLIS_EDGE_PORT=http is not a port"),
        ({"PORTCULLIS_EDGE_PORT": "65536"}, "PORTCULLIS_EDGE_PORT=65536 is not a port"),
        ({"PORTCULLIS_EDGE_HOST": "::1"}, "PORTCULLIS_EDGE_HOST"),
    ],
)
def test_a_wrong_setting_is_named(home: Home, environment: dict[str, str], said: str) -> None:
    with pytest.raises(stack.StackError, match=said):
        plan(home, environment)


@pytest.mark.parametrize("variable", ["PORTCULLIS_EDGE_PORT", "PORTCULLIS_NATS_PORT", "PORTCULLIS_REDIS_PORT"])
def test_a_busy_port_that_was_asked_for_is_refused_with_the_variable_to_set(home: Home, variable: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(stack.StackError, match=rf"port {port} .*{variable}"):
            plan(home, {variable: str(port)})


def test_scale_is_parsed_or_explained() -> None:
    assert stack.parse_scale(["edge=2", "fallback_model=3", "edge=4"]) == {"edge": 4, "fallback_model": 3}
    for wrong in ("edge", "edge=", "edge=0", "edge=-1", "edge=65", "edge=²", "postgres=2", "=2"):
        with pytest.raises(stack.StackError, match="--scale"):
            stack.parse_scale([wrong])


def test_stages_that_share_the_edges_process_have_all_that_they_need_there_and_nothing_else(home: Home) -> None:
    engine = {"PORTCULLIS_ENGINE_URL": "http://engine.example"}
    apart = environments(plan(home, engine))
    environment = {"PORTCULLIS_EDGE_PORT": str(free_port()), **NO_POSTGRES, **engine}
    planned = stack.plan(home, environment, {"edge": 2}, together=True)
    services = services_of(planned)
    assert [program.name for program in services] == ["edge", "fallback_model", "jobs", "console"]
    edge = services[0]
    assert edge.replicas == 2
    assert edge.command[-5:] == ("services", "edge", "auth", "limiter", "detector_proxy")
    assert len(edge.metrics_ports) == 2
    passwords = json.loads(edge.environment["PORTCULLIS_NATS_PASSWORDS"])
    assert passwords == {name: apart[name]["PORTCULLIS_NATS_PASSWORD"] for name in stack.TOGETHER}
    assert "PORTCULLIS_NATS_PASSWORD" not in edge.environment
    wanted = set().union(*(apart[name] for name in stack.TOGETHER)) - {"PORTCULLIS_NATS_USER", "PORTCULLIS_NATS_PASSWORD"}
    assert set(edge.environment) == wanted | {"PORTCULLIS_NATS_PASSWORDS"}
    for name in ("fallback_model", "jobs", "console"):
        assert environments(planned)[name].keys() == apart[name].keys()
    assert "secret" not in " ".join(edge.command)


def services_of(planned: stack.Plan) -> list[stack.Program]:
    return [program for program in planned.programs if program.group != "servers"]


@pytest.mark.parametrize(
    ("scale", "workers"), [({}, 0), ({"edge": 1}, 0), ({"edge": 2}, 1), ({"fallback_model": 1}, 1), ({"fallback_model": 2}, 2)]
)
def test_a_single_process_of_all_stages_has_the_model_too_unless_it_is_scaled(
    home: Home, scale: dict[str, int], workers: int
) -> None:
    environment = {"PORTCULLIS_EDGE_PORT": str(free_port()), **NO_POSTGRES}
    edge, *others = services_of(stack.plan(home, environment, scale, together=True))
    names = ("edge", "auth", "limiter", "detector_proxy", *(() if workers else ("fallback_model",)))
    assert edge.command[-len(names) - 1 :] == ("services", *names)
    assert json.loads(edge.environment["PORTCULLIS_NATS_PASSWORDS"]).keys() == set(names)
    assert sum(program.replicas for program in others if program.name == "fallback_model") == workers


@pytest.mark.parametrize("name", ["auth", "limiter", "detector_proxy"])
def test_what_shares_the_edges_process_cannot_be_scaled_by_itself(home: Home, name: str) -> None:
    with pytest.raises(stack.StackError, match=f"--scale {name}=2: .*scale edge instead"):
        stack.plan(home, NO_SERVERS, {name: 2}, together=True)


def test_there_can_be_one_console_only() -> None:
    assert stack.parse_scale(["console=1"]) == {"console": 1}
    with pytest.raises(stack.StackError, match="--scale console=2: there can be one console only"):
        stack.parse_scale(["console=2"])


def test_every_service_sends_its_traces_to_the_console_and_the_edge_finds_it(home: Home) -> None:
    found = environments(plan(home))
    url = f"http://127.0.0.1:{found['console']['PORTCULLIS_CONSOLE_PORT']}"
    assert {name: one.get("OTEL_EXPORTER_OTLP_ENDPOINT") for name, one in found.items() if name in SERVICES} == {
        name: None if name == "console" else url for name in SERVICES
    }
    assert found["edge"]["PORTCULLIS_CONSOLE_URL"] == url
    assert environments(plan(home))["console"]["PORTCULLIS_CONSOLE_PORT"] == url.rpartition(":")[2]


@pytest.mark.parametrize(
    "environment",
    [
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"},
        {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://collector:4318/v1/traces"},
        {"OTEL_SDK_DISABLED": "true"},
    ],
)
def test_an_operators_own_collector_is_left_alone(home: Home, environment: dict[str, str]) -> None:
    assert not any(name.startswith("OTEL_") for one in environments(plan(home, environment)).values() for name in one)


@pytest.mark.parametrize(
    ("environment", "is_open"),
    [
        ({}, "true"),
        ({"PORTCULLIS_EDGE_HOST": "localhost"}, "true"),
        ({"PORTCULLIS_CONSOLE_OPEN": "false"}, "false"),
        ({"PORTCULLIS_EDGE_HOST": "0.0.0.0"}, None),
        ({"PORTCULLIS_ALLOWED_HOSTS": "gateway.example,localhost"}, None),
        ({"PORTCULLIS_TRUSTED_PROXIES": "127.0.0.1"}, None),
        ({"PORTCULLIS_CORS_ORIGINS": "*"}, None),
    ],
)
def test_the_console_is_open_only_where_nobody_else_reaches_it(
    home: Home, environment: dict[str, str], is_open: str | None
) -> None:
    console = environments(plan(home, environment))["console"]
    assert console.get("PORTCULLIS_CONSOLE_OPEN") == is_open
    assert console["PORTCULLIS_CONSOLE_HOST"] == "127.0.0.1"
    assert console["PORTCULLIS_ADMIN_TOKEN"]


def test_no_two_processes_share_a_metrics_port(home: Home) -> None:
    planned = plan(home, {"PORTCULLIS_METRICS_PORT": "9100"}, edge=2, limiter=3)
    assert [port for program in planned.programs for port in program.metrics_ports] == list(range(9100, 9100 + 10))
    assert not any("PORTCULLIS_METRICS_PORT" in one for one in environments(planned).values())


def test_each_replica_has_a_metrics_port_that_the_home_remembers(home: Home) -> None:
    first, second = plan(home, NO_SERVERS, edge=2), plan(home, NO_SERVERS, edge=3)
    ports = {program.name: program.metrics_ports for program in second.programs}
    assert {name: len(own) for name, own in ports.items()} == {name: 3 if name == "edge" else 1 for name in SERVICES}
    assert len({port for own in ports.values() for port in own}) == len(SERVICES) + 2
    assert {program.name: program.metrics_ports for program in first.programs} == ports | {"edge": ports["edge"][:2]}


def test_prometheus_is_told_where_each_replica_serves_its_metrics(home: Home) -> None:
    planned = plan(home, {"PORTCULLIS_METRICS_PORT": "9100", "PORTCULLIS_METRICS_HOST": "10.0.0.1"}, edge=2)
    stack.write(home, planned)
    targets = json.loads(home.metrics_targets.read_text())
    assert targets[:3] == [
        {"targets": ["10.0.0.1:9100"], "labels": {"service": "edge", "replica": "0"}},
        {"targets": ["10.0.0.1:9101"], "labels": {"service": "edge", "replica": "1"}},
        {"targets": ["10.0.0.1:9102"], "labels": {"service": "auth", "replica": "0"}},
    ]
    assert {target["labels"]["service"] for target in targets} == set(SERVICES)


def read_by_supervisor(home: Home, planned: stack.Plan) -> dict[str, Any]:
    """The process groups that supervisor itself makes of our configuration, by name."""
    stack.write(home, planned)
    options = ServerOptions()
    options.realize(["--configuration", str(home.supervisor_configuration)])
    return {group.name: group for group in options.process_group_configs}


def test_supervisor_reads_the_configuration_as_it_is_meant(home: Home) -> None:
    planned = plan(home, edge=2, limiter=3)
    groups = read_by_supervisor(home, planned)
    assert {name: [process.name for process in group.process_configs] for name, group in groups.items()} == {
        "servers": ["nats_0", "redis_0"],
        "services": [
            "auth_0",
            "limiter_0",
            "limiter_1",
            "limiter_2",
            "detector_proxy_0",
            "fallback_model_0",
            "jobs_0",
            "console_0",
        ],
        "edge": ["edge_0", "edge_1"],
    }
    assert groups["servers"].priority < groups["services"].priority < groups["edge"].priority
    assert groups["edge"].socket_config.url == f"tcp://127.0.0.1:{planned.edge_port}"
    assert groups["edge"].socket_config.get_backlog() == stack.EDGE_BACKLOG
    for process in (process for group in groups.values() for process in group.process_configs):
        assert str(home.starts / process.name) in shlex.split(process.command)
        assert ("--patient" in shlex.split(process.command)) == (process.name == "nats_0")
        assert process.stdout_logfile == str(home.logs / f"{process.name}.log")
        # Started again for ever: with startsecs 0 supervisor never counts a start as failed.
        assert (process.autorestart is not False, process.startsecs) == (True, 0)
        assert process.stopwaitsecs > 15


def test_no_secret_is_in_the_configuration_or_on_a_command_line(home: Home) -> None:
    planned = plan(home)
    stack.write(home, planned)
    configuration = home.supervisor_configuration.read_text()
    secrets = [path.read_text().strip() for path in (home.path / "secrets").iterdir()]
    assert len(secrets) >= 9
    for secret in (*secrets, "db-secret"):
        assert secret not in configuration
        assert not any(secret in part for program in planned.programs for part in program.command)


def test_the_environments_are_private_files(home: Home) -> None:
    stack.write(home, plan(home))
    files = {path.stem: path for path in home.environments.iterdir()}
    assert set(files) == {"nats", "redis", *SERVICES}
    for path in (*files.values(), home.supervisor_configuration, home.path / "nats.conf", home.path / "redis.conf"):
        assert path.stat().st_mode & 0o777 == 0o600
    assert json.loads(files["auth"].read_text())[HOME_VARIABLE] == str(home.path)


@pytest.mark.parametrize("name", ["a #b", "a ;b", "100%"])
def test_a_path_that_supervisor_would_misread_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(HomeError, match="supervisor would interpret"):
        stack.configuration(Home(tmp_path / name), ())


def test_nothing_secret_is_shown_by_a_program_or_server(home: Home) -> None:
    shown = repr(plan(home))
    assert home.secret("redis") not in shown
    assert "db-secret" not in shown
