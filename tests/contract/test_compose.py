"""infra/compose.yaml and its override: valid by the specification, and in agreement with the code in both directions."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from pydantic import SecretStr
from pydantic.fields import FieldInfo

from infra.docker import health, secrets
from infra.embedded import servers, stack
from libs.common import VERSION, probes
from libs.common.settings import SECRETS_VARIABLE, CommonSettings, load
from libs.common.subjects import PERMISSIONS, SERVICES, micro_name
from tests.contract.configuration_page import SOURCES, own
from tests.metrics_kit import TARGET_LABELS
from tests.prometheus_tools import promtool

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
DOCKERFILE = (INFRA / "docker" / "Dockerfile").read_text()


def read(*path: str) -> Any:
    return yaml.safe_load(INFRA.joinpath(*path).read_text())


COMPOSE = read("compose.yaml")
CLUSTER = read("compose.cluster.yaml")
RUN = {name: service for name, service in COMPOSE["services"].items() if "build" in service}
"""The services of ours, and the tools made of their images."""


def environment(name: str) -> dict[str, str]:
    """What is set for a service, also where there is a cluster, without what is only passed through."""
    override = CLUSTER["services"].get(name, {}).get("environment", {})
    return {key: str(value) for key, value in (COMPOSE["services"][name]["environment"] | override).items() if value is not None}


def mounted(service: dict[str, Any]) -> dict[str, str]:
    """The secrets of a service: name of the file in its container to name of the secret."""
    each = service.get("secrets", ())
    return dict((secret, secret) if isinstance(secret, str) else (secret["target"], secret["source"]) for secret in each)


def is_secret(field: FieldInfo) -> bool:
    """Whether a setting is a `SecretStr`, required or not, bounded or not."""
    return SecretStr.__name__ in str(field.annotation)


def setting_of(service: str) -> str:
    """The service whose settings one of ours reads; a tool has those of the image that it is made of."""
    return str(COMPOSE["services"][service]["build"]["args"]["SERVICE"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Secrets as `./run secrets` makes them."""
    made = tmp_path_factory.mktemp("secrets") / "secrets"
    secrets.write(made)
    return made


def file_of(secret: str, file: dict[str, Any] = COMPOSE) -> str:
    return str(file["secrets"][secret]["file"]).rpartition("/")[2]


# --- by the specification ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["compose.yaml", "infra/compose.yaml", "infra/compose.cluster.yaml"])
def test_the_file_is_valid_by_the_schema_of_the_specification(path: str) -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(ROOT / path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_started_in_the_first_folder_is_the_same_project() -> None:
    top = yaml.safe_load((ROOT / "compose.yaml").read_text())
    assert top == {"name": COMPOSE["name"], "include": ["infra/compose.yaml"]}


# --- images --------------------------------------------------------------------------------------------------------------


def test_each_service_has_one_image_that_is_called_as_it_is_asked_about() -> None:
    images = {setting_of(name): service["image"] for name, service in RUN.items()}
    assert images == {name: f"{micro_name(name)}:${{PORTCULLIS_VERSION:-{VERSION}}}" for name in SERVICES}
    assert set(RUN) == {*SERVICES, "migrate"}
    assert all(setting_of(name) == name for name in SERVICES)
    assert setting_of("migrate") == "auth"


def test_the_version_of_everything_else_is_pinned() -> None:
    others = {name: service["image"] for name, service in COMPOSE["services"].items() if name not in RUN}
    for image in others.values():
        assert re.fullmatch(r"docker\.io/[a-z-]+/[a-z-]+:v?\d+\.\d+(\.\d+)?(-alpine)?", image), image
    assert others["nats"] == f"docker.io/library/nats:{servers.NATS_VERSION}-alpine"
    assert others["postgres"] == f"docker.io/library/postgres:{servers.POSTGRES_VERSION}"
    assert {service["image"] for service in CLUSTER["services"].values() if "image" in service} == {others["nats"]}


def test_the_image_is_built_with_what_run_installs_and_says_the_version_of_the_code() -> None:
    (uv,) = re.findall(r"^uv_version=(.+)$", (ROOT / "run").read_text(), re.MULTILINE)
    assert f"\nARG UV_VERSION={uv}\n" in DOCKERFILE
    assert f"\nARG VERSION={VERSION}\n" in DOCKERFILE


def test_the_health_check_asks_what_processes_answer() -> None:
    assert health.PATH == probes.READY_PATH
    assert f'"GET", "{health.PATH}"' in (ROOT / "services" / "edge" / "openapi.py").read_text()
    for name in SERVICES:
        test = COMPOSE["services"][name]["healthcheck"]["test"]
        # Healthy when a detection would be answered.
        asked = [environment(name)["PORTCULLIS_EDGE_PORT"]] if name == "edge" else []
        assert test == ["CMD", "python", "/app/health.py", *asked]
    assert 'HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 CMD ["python", "/app/health.py"]' in DOCKERFILE


# --- settings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUN)
def test_every_variable_and_secret_is_a_setting_of_that_service(name: str) -> None:
    settings = own(SOURCES[setting_of(name)])
    variables = {f"PORTCULLIS_{field.upper()}" for field in settings.model_fields}
    override = CLUSTER["services"].get(name, {}).get("environment", {})
    for variable in {*COMPOSE["services"][name]["environment"], *override} - {SECRETS_VARIABLE}:
        if not variable.startswith("OTEL_"):
            assert variable in variables, variable
    for target in mounted(COMPOSE["services"][name]):
        assert target.upper() in variables, target
        assert is_secret(settings.model_fields[target.removeprefix("portcullis_")]), target


@pytest.mark.parametrize("name", RUN)
def test_what_a_service_is_given_is_whole(name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would start: its settings are there, and say what is in the files."""
    for variable in list(_variables()):
        monkeypatch.delenv(variable)
    for variable, value in environment(name).items():
        monkeypatch.setenv(variable, value)
    secret_files = mounted(COMPOSE["services"][name])
    for target, source in secret_files.items():
        (tmp_path / target).write_text((folder / file_of(source)).read_text())
    assert environment(name)[SECRETS_VARIABLE] == "/run/secrets"
    monkeypatch.setenv(SECRETS_VARIABLE, str(tmp_path))
    settings: CommonSettings = load(own(SOURCES[setting_of(name)]))
    assert settings.nats_user == setting_of(name)
    assert settings.nats_password is not None
    assert settings.nats_password.get_secret_value() == (folder / f"nats-{setting_of(name)}").read_text().strip()


def _variables() -> Iterator[str]:
    return (variable for variable in os.environ if variable.startswith(("PORTCULLIS_", "OTEL_")))


@pytest.mark.parametrize("name", SERVICES)
def test_every_secret_setting_is_given_as_a_file_or_passed_through(name: str) -> None:
    wanted = {f"PORTCULLIS_{field.upper()}" for field, info in own(SOURCES[name]).model_fields.items() if is_secret(info)}
    wanted.remove("PORTCULLIS_NATS_PASSWORDS")  # of several services in one process, which there are not here
    service = COMPOSE["services"][name]
    passed = {variable for variable, value in service["environment"].items() if value is None}
    assert wanted <= {target.upper() for target in mounted(service)} | passed
    assert not wanted & {variable for variable, value in service["environment"].items() if value is not None}


def test_a_secret_goes_to_nobody_who_needs_it_not() -> None:
    for variable, who in stack.ONLY_FOR.items():
        assert {setting_of(name) for name in RUN if variable.lower() in mounted(RUN[name])} == set(who), variable
        assert not [name for name in RUN if variable in RUN[name]["environment"]]
    engine = {name for name in RUN for variable in RUN[name]["environment"] if variable.startswith(stack.ENGINE_PREFIX)}
    assert engine == {"detector_proxy"}


def test_each_service_has_time_to_finish() -> None:
    for name, service in RUN.items():
        longest = 2 * CommonSettings().drain_seconds + stack.STOP_RESERVE_SECONDS
        assert int(service["stop_grace_period"].removesuffix("s")) >= longest, name


# --- secrets and NATS ----------------------------------------------------------------------------------------------------


def test_the_secrets_that_are_used_are_those_that_are_made(folder: Path) -> None:
    named = {file_of(secret, file) for file in (COMPOSE, CLUSTER) for secret in file["secrets"]}
    # What an operator uses; what is in the configurations that are mounted.
    assert {path.name for path in folder.iterdir()} - named == {"nats-operator", "nats-routes"}
    assert named <= {path.name for path in folder.iterdir()}
    for file in (COMPOSE, CLUSTER):
        used = {source for service in file["services"].values() for source in mounted(service).values()}
        assert used | ({"nats.conf"} if file is CLUSTER else set()) == set(file["secrets"])


def test_secrets_are_made_once_and_only_their_owner_gets_at_them(folder: Path) -> None:
    before = {path.name: path.read_text() for path in folder.iterdir()}
    secrets.write(folder)
    assert {path.name: path.read_text() for path in folder.iterdir()} == before
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    # An engine mounts them into containers whose users are others.
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o444}
    assert before.pop("key-pepper-previous").strip() == ""
    passwords = [text for name, text in before.items() if not name.endswith((".conf", "-url"))]
    assert len(set(passwords)) == len(passwords)
    assert min(len(text.strip()) for text in passwords) >= 32


def test_the_pepper_is_exchanged_as_the_manual_says(tmp_path: Path) -> None:
    secrets.write(tmp_path)
    old = (tmp_path / "key-pepper").read_text()
    (tmp_path / "key-pepper").rename(tmp_path / "key-pepper-previous")
    secrets.write(tmp_path)
    assert (tmp_path / "key-pepper-previous").read_text() == old != (tmp_path / "key-pepper").read_text()
    (tmp_path / "key-pepper-previous").unlink()
    secrets.write(tmp_path)
    assert (tmp_path / "key-pepper-previous").read_text().strip() == ""


def test_the_folder_is_named_where_compose_looks_and_what_else_is_there_stays(tmp_path: Path) -> None:
    path = tmp_path / ".env"
    path.write_text("PORTCULLIS_EDGE_PORT=8001\nPORTCULLIS_SECRETS=/old\n")
    secrets.name_folder(Path("/new"), path)
    assert path.read_text() == "PORTCULLIS_EDGE_PORT=8001\nPORTCULLIS_SECRETS=/new\n"
    assert set(secrets.ENVIRONMENT_FILES) == {ROOT / ".env", INFRA / ".env"}
    required = {secret["file"].partition("/")[0] for secret in COMPOSE["secrets"].values()}
    assert all(file.startswith(f"${{{secrets.FOLDER_VARIABLE}") for file in required)
    assert any("./run secrets" in secret["file"] for secret in COMPOSE["secrets"].values())


@pytest.mark.parametrize("file", ["nats.conf", "nats-cluster-1.conf", "nats-cluster-2.conf", "nats-cluster-3.conf"])
def test_nats_lets_each_service_do_what_the_code_says(file: str, folder: Path) -> None:
    configuration = json.loads((folder / file).read_text())
    users = {user["user"]: user for user in configuration["accounts"]["PORTCULLIS"]["users"]}
    assert set(users) == {*SERVICES, stack.OPERATOR}
    for name, user in users.items():
        assert user["password"] == (folder / f"nats-{name}").read_text().strip()
    for name in SERVICES:
        allowed = PERMISSIONS[name]
        assert users[name]["permissions"] == {"publish": list(allowed.publish), "subscribe": list(allowed.subscribe)}
    command = [str(Path(sys.executable).with_name("nats-server")), "-t", "-c", str(folder / file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_cluster_s_servers_are_those_of_the_configurations(folder: Path) -> None:
    nodes = [name for name, service in {**COMPOSE["services"], **CLUSTER["services"]}.items() if "nats" in name]
    assert sorted(nodes) == sorted(secrets.CLUSTER)
    for number, name in enumerate(secrets.CLUSTER, 1):
        configuration = json.loads((folder / f"nats-cluster-{number}.conf").read_text())
        assert configuration["server_name"] == name
        routes = [urlsplit(route) for route in configuration["cluster"]["routes"]]
        assert [(route.hostname, route.port) for route in routes] == [
            (node, int(configuration["cluster"]["listen"].rpartition(":")[2])) for node in secrets.CLUSTER
        ]
        (source,) = mounted({**COMPOSE["services"].get(name, {}), **CLUSTER["services"][name]}).values()
        assert file_of(source, CLUSTER) == f"nats-cluster-{number}.conf"
    for name in SERVICES:
        override = CLUSTER["services"][name]
        urls = [urlsplit(url) for url in override["environment"]["PORTCULLIS_NATS_URL"].split(",")]
        assert [(url.hostname, url.port) for url in urls] == [(node, secrets.NATS_PORT) for node in secrets.CLUSTER]
        assert override["environment"]["PORTCULLIS_STREAM_REPLICAS"] == str(len(secrets.CLUSTER))
        assert set(override["depends_on"]) == set(secrets.CLUSTER[1:])


# --- addresses -----------------------------------------------------------------------------------------------------------


def addresses(folder: Path) -> Iterator[tuple[str, str, int]]:
    """Who asks which host at which port."""
    for name, service in COMPOSE["services"].items():
        for value in map(str, service.get("environment", {}).values()):
            if re.match(r"[a-z]+://", value):
                yield name, str(urlsplit(value).hostname), int(urlsplit(value).port or 0)
        for source in mounted(service).values():
            if source.endswith("-url"):
                url = urlsplit((folder / file_of(source)).read_text().strip())
                yield name, str(url.hostname), int(url.port or 0)
    for exporter in [*read("otel", "collector.yaml")["exporters"].values(), *read("otel", "console.yaml")["exporters"].values()]:
        url = urlsplit(exporter["endpoint"])
        yield "collector", str(url.hostname), int(url.port or 0)
    for source in read("grafana", "provisioning", "datasources", "portcullis.yaml")["datasources"]:
        url = urlsplit(source["url"])
        yield "grafana", str(url.hostname), int(url.port or 0)
    for names in read("prometheus", "compose.yml")["scrape_configs"][0]["dns_sd_configs"]:
        for name in names["names"]:
            yield "prometheus", name, names["port"]


def listening(folder: Path) -> dict[str, set[int]]:
    """Where everything listens, by its own configuration."""
    tempo, collector = read("tempo", "tempo.yaml"), read("otel", "collector.yaml")
    otlp = [tempo["distributor"]["receivers"]["otlp"]["protocols"], collector["receivers"]["otlp"]["protocols"]]
    of_tempo, of_collector = ({int(each["endpoint"].rpartition(":")[2]) for each in protocols.values()} for protocols in otlp)
    found = {name: {int(environment(name)["PORTCULLIS_METRICS_PORT"])} for name in SERVICES}
    found["edge"].add(int(environment("edge")["PORTCULLIS_EDGE_PORT"]))
    found["console"].add(int(environment("console")["PORTCULLIS_CONSOLE_PORT"]))
    return {
        **found,
        "nats": {json.loads((folder / "nats.conf").read_text())["port"]},
        "redis": {int(re.findall(r"^port (\d+)$", (folder / "redis.conf").read_text(), re.MULTILINE)[0])},
        "postgres": {secrets.POSTGRES_PORT},  # its image's
        "tempo": of_tempo | {tempo["server"]["http_listen_port"]},
        "collector": of_collector,
        "prometheus": {9090},  # its image's
    }


def test_whoever_is_asked_listens_there_and_can_be_reached(folder: Path) -> None:
    networks = {name: set(service["networks"]) for name, service in COMPOSE["services"].items()}
    asked = list(addresses(folder))
    assert {host for _, host, _ in asked} == set(listening(folder))
    for who, host, port in asked:
        assert port in listening(folder)[host], (who, host, port)
        assert networks[who] & networks[host], (who, host)


def test_passwords_in_addresses_are_those_that_the_servers_ask_for(folder: Path) -> None:
    database = urlsplit((folder / "database-url").read_text().strip())
    made = COMPOSE["services"]["postgres"]["environment"]
    assert (database.username, database.path) == (made["POSTGRES_USER"], f"/{made['POSTGRES_DB']}")
    assert database.password == (folder / "postgres-password").read_text().strip()
    redis = urlsplit((folder / "redis-url").read_text().strip())
    assert redis.password == (folder / "redis-password").read_text().strip()
    assert f"\nrequirepass {redis.password}\n" in (folder / "redis.conf").read_text()
    for name in ("postgres", "redis", "nats", "grafana"):
        used = set(re.findall(r"/run/secrets/([\w.-]+)", json.dumps(COMPOSE["services"][name])))
        assert used == set(mounted(COMPOSE["services"][name])), name


def test_the_image_serves_its_metrics_where_they_are_looked_for() -> None:
    (port,) = {environment(name)["PORTCULLIS_METRICS_PORT"] for name in SERVICES}
    assert f"PORTCULLIS_METRICS_PORT={port}\n" in DOCKERFILE
    assert f"\nEXPOSE {port}\n" in DOCKERFILE
    assert {environment(name)["PORTCULLIS_METRICS_HOST"] for name in SERVICES} == {"0.0.0.0"}


def test_only_the_edge_and_what_people_look_at_can_be_reached_from_outside() -> None:
    published = {name: service["ports"] for name, service in COMPOSE["services"].items() if "ports" in service}
    assert set(published) == {"edge", "prometheus", "grafana"}
    for name, (port,) in published.items():
        assert port.startswith(("127.0.0.1:", "${PORTCULLIS_EDGE_ADDRESS:-127.0.0.1}:")), name
    assert published["edge"][0].endswith(f":{environment('edge')['PORTCULLIS_EDGE_PORT']}")
    open_networks = {name for name, network in COMPOSE["networks"].items() if not (network or {}).get("internal")}
    assert open_networks == {"public", "outside"}
    assert {name for name, service in COMPOSE["services"].items() if "public" in service["networks"]} == set(published)
    assert {name for name in RUN if "outside" in RUN[name]["networks"]} == {"detector_proxy", "jobs"}


def test_whatever_can_be_scaled_has_neither_a_name_nor_a_port_of_its_own() -> None:
    for name in SERVICES:
        service = COMPOSE["services"][name]
        assert "container_name" not in service
        assert "hostname" not in service
        assert ("ports" in service) == (name == "edge"), name
        assert "volumes" not in service, name


# --- how it runs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUN)
def test_a_service_can_write_nothing_and_become_nobody(name: str) -> None:
    service = COMPOSE["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "user" not in service
    assert re.search(r"^USER 10001:10001$", DOCKERFILE.rpartition("\nFROM ")[2], re.MULTILINE)


@pytest.mark.parametrize("file", [COMPOSE, CLUSTER], ids=["one", "cluster"])
def test_whoever_is_waited_for_says_that_it_is_well(file: dict[str, Any]) -> None:
    for name, service in file["services"].items():
        for other, how in service.get("depends_on", {}).items():
            assert how == {"condition": "service_healthy"}, (name, other)
            assert "test" in {**CLUSTER["services"], **COMPOSE["services"]}[other]["healthcheck"], (name, other)


def test_servers_come_before_services_and_the_edge_comes_last() -> None:
    for name in RUN:
        depends = set(COMPOSE["services"][name]["depends_on"])
        assert ("nats" in depends) == (name != "migrate"), name
        assert ("postgres" in depends) == (setting_of(name) == "auth"), name
        assert ("redis" in depends) == (name == "limiter"), name
    assert set(SERVICES) - {"edge"} <= set(COMPOSE["services"]["edge"]["depends_on"])


def test_everything_that_is_mounted_is_there() -> None:
    volumes = [
        (name, volume.split(":")) for name, service in COMPOSE["services"].items() for volume in service.get("volumes", ())
    ]
    for _, (source, *_) in volumes:
        if source.startswith("."):
            assert (INFRA / source).exists(), source
        else:
            assert source in COMPOSE["volumes"], source
    named = {source for _, (source, *_) in volumes if not source.startswith(".")}
    assert named == set(COMPOSE["volumes"])
    for name, option in (("prometheus", "--config.file="), ("tempo", "-config.file="), ("collector", "--config=")):
        configurations = [part.removeprefix(option) for part in COMPOSE["services"][name]["command"] if part.startswith(option)]
        assert configurations
        for path in configurations:
            assert any(_below(path, target, INFRA / source) for who, (source, target, *_) in volumes if who == name), path


def _below(path: str, target: str, source: Path) -> bool:
    """Whether a path in the container is a file of what is mounted at `target`."""
    if path == target:
        return source.is_file()
    return path.startswith(f"{target}/") and (source / path.removeprefix(f"{target}/")).is_file()


# --- Prometheus and the collector ----------------------------------------------------------------------------------------


def test_prometheus_finds_every_replica_and_otherwise_does_as_elsewhere() -> None:
    here, elsewhere = read("prometheus", "compose.yml"), read("prometheus", "prometheus.yml")
    (job,), (other,) = here.pop("scrape_configs"), elsewhere.pop("scrape_configs")
    assert here == elsewhere
    (found,) = job.pop("dns_sd_configs")
    assert (found["names"], found["type"]) == (list(SERVICES), "A")
    relabelled = {rule["target_label"]: rule["source_labels"] for rule in job.pop("relabel_configs")}
    assert relabelled == {"service": ["__meta_dns_name"], "replica": ["__address__"]}
    assert set(relabelled) == TARGET_LABELS - {"instance", "job"}
    del other["file_sd_configs"]
    assert job == other


def test_prometheus_takes_the_configuration() -> None:
    done = subprocess.run([promtool(), "check", "config", INFRA / "prometheus" / "compose.yml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_collector_sends_to_the_console_beside_tempo() -> None:
    first, second = read("otel", "collector.yaml"), read("otel", "console.yaml")
    exporters = second["service"]["pipelines"]["traces"]["exporters"]
    assert exporters == [*first["service"]["pipelines"]["traces"]["exporters"], *second["exporters"]]
    (console,) = second["exporters"].values()
    assert console["endpoint"] == environment("edge")["PORTCULLIS_CONSOLE_URL"]
    for name in set(SERVICES) - {"console"}:
        assert urlsplit(environment(name)["OTEL_EXPORTER_OTLP_ENDPOINT"]).hostname == "collector"
    assert environment("console")["OTEL_SDK_DISABLED"] == "true"
