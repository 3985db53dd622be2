"""The Helm chart: what it renders is valid, agrees with the code in both directions, and wrong values are refused."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import certifi
import kubernetes_validate
import pytest
import yaml
from cloudcoil.models.keda.v1alpha1 import ScaledObject
from cloudcoil.models.prometheus_operator.v1 import PodMonitor
from jsonschema import Draft202012Validator

from infra.embedded.stack import ONLY_FOR, SINGLE
from libs.common import VERSION, trace_export
from libs.common.probes import LIVE_PATH, READY_PATH
from libs.common.settings import CommonSettings
from libs.common.subjects import PERMISSIONS, SERVICES, micro_name
from services.detector_proxy.adapters import FLUSH_SECONDS
from services.edge.settings import EdgeSettings
from services.jobs.settings import Settings as JobsSettings
from tests.contract import chart_env
from tests.contract.chart_env import CHART, NEVER, SCHEMA
from tests.contract.configuration_page import SOURCES, own
from tests.helm_tools import helm
from tests.metric_labels import LABELS
from tests.metrics_kit import TARGET_LABELS, all_series, uses
from tests.prometheus_tools import promtool

ROOT = CHART.parents[2]
PAGE = ROOT / "docs" / "operations" / "kubernetes.md"
RELEASE, NAMESPACE = "guard", "security"
NAME = "guard-portcullis"
BATCH = "fallback-model-batch"
COMPONENTS = {service.replace("_", "-"): service for service in SERVICES}

Manifest = dict[str, Any]

OPTIONAL_SECRETS = {
    "natsIssuerSeed": {"name": "issuer", "key": "seed"},
    "engineToken": {"name": "engine", "key": "token"},
    "keyPepperPrevious": {"name": "portcullis-auth-2", "key": "pepper"},
}
ENGINE = {"PORTCULLIS_ENGINE_KIND": "detect", "PORTCULLIS_ENGINE_URL": "http://engine.models:9000"}
VALUES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "everything": {
        "image": {"registry": "registry.example.com/security", "tag": "1.2.3", "pullSecrets": ["registry"]},
        "secrets": OPTIONAL_SECRETS,
        "nats": {
            "url": "tls://nats-0.nats:4222,tls://nats-1.nats:4222",
            "userSuffix": "-b",
            "ca": {"name": "nats-ca", "key": "ca.pem"},
        },
        "env": {"PORTCULLIS_LOG_LEVEL": "WARNING", "OTEL_SERVICE_NAMESPACE": "guard"},
        "tracing": {"endpoint": "http://collector.observability:4318"},
        "services": {
            "edge": {
                "hosts": ["guard.example.com"],
                "service": {"type": "LoadBalancer", "annotations": {"example.com/internal": "true"}},
                "env": {"PORTCULLIS_LOG_LEVEL": "INFO", "PORTCULLIS_TRUSTED_PROXIES": "10.0.0.0/8"},
            },
            "detector_proxy": {"env": ENGINE},
        },
        "batchPool": {"enabled": True, "env": {"PORTCULLIS_MODEL_BULK_BATCH_TOKENS": "512"}},
        "keda": {"enabled": True, "prometheus": {"matchers": 'job="portcullis"', "authenticationRef": "prometheus"}},
        "networkPolicy": {"edgeFrom": [{"namespaceSelector": {"matchLabels": {"name": "ingress"}}}]},
        "podMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "podAnnotations": {"example.com/owner": "security"},
        "nodeSelector": {"kubernetes.io/arch": "amd64"},
        "tolerations": [{"key": "dedicated", "operator": "Exists"}],
    },
    "little": {
        "secrets": {"adminToken": {"name": "", "key": "admin-token"}},
        "services": {
            "console": {"enabled": False},
            **{name: {"autoscaling": {"enabled": False}} for name in ("edge", "auth", "limiter", "detector_proxy")},
        },
        "batchPool": {"enabled": True, "replicas": 0},
        "priorityClasses": {"create": False, "interactive": {"name": "ours"}},
        "networkPolicy": {"enabled": False},
    },
}
BOTH_WAYS = "everything"
"""The values under which nothing of the chart is left out."""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return helm(tmp_path_factory.mktemp("helm"))


Run = Callable[[dict[str, Any]], subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def run(program: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    values_file = tmp_path_factory.mktemp("values") / "values.json"

    def template(values: dict[str, Any]) -> subprocess.CompletedProcess[str]:
        values_file.write_text(json.dumps(values))
        command: list[str | Path] = [program, "template", RELEASE, CHART, "--namespace", NAMESPACE, "--values", values_file]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    return template


@pytest.fixture(scope="module")
def rendered(run: Run) -> dict[str, list[Manifest]]:
    found = {}
    for name, values in VALUES.items():
        done = run(values)
        assert done.returncode == 0, done.stderr
        found[name] = [manifest for manifest in yaml.safe_load_all(done.stdout) if manifest]
    return found


@pytest.fixture(params=VALUES)
def manifests(request: pytest.FixtureRequest, rendered: dict[str, list[Manifest]]) -> list[Manifest]:
    return rendered[request.param]


@pytest.fixture
def everything(rendered: dict[str, list[Manifest]]) -> list[Manifest]:
    return rendered[BOTH_WAYS]


def of_kind(manifests: list[Manifest], *kinds: str) -> Iterator[Manifest]:
    return (manifest for manifest in manifests if manifest["kind"] in kinds)


def component_of(manifest: Manifest) -> str:
    return str(manifest["metadata"]["labels"]["app.kubernetes.io/component"])


def service_of(component: str) -> str:
    return "fallback_model" if component == BATCH else COMPONENTS[component]


def pods(manifests: list[Manifest], *kinds: str) -> dict[str, Manifest]:
    """The pod templates of Deployments (or of `kinds`) by component."""
    return {component_of(each): each["spec"]["template"] for each in of_kind(manifests, *(kinds or ("Deployment",)))}


def container(pod: Manifest) -> Manifest:
    (only,) = pod["spec"]["containers"]
    return dict(only)


def environment(pod: Manifest) -> dict[str, Manifest]:
    variables = container(pod)["env"]
    by_name = {variable["name"]: variable for variable in variables}
    assert len(by_name) == len(variables), "a variable is set twice"
    return by_name


def selects(selector: dict[str, str], manifests: list[Manifest]) -> set[str]:
    """The components whose pods a selector finds."""
    return {
        component
        for component, pod in pods(manifests, "Deployment", "Job").items()
        if selector.items() <= pod["metadata"]["labels"].items()
    }


# --- valid ---------------------------------------------------------------------------------------------------------------


def strict(schema: Any) -> Any:
    """A schema that refuses what it does not name, wherever it names something."""
    if isinstance(schema, dict):
        closed = {key: strict(value) for key, value in schema.items()}
        if "properties" in schema and "additionalProperties" not in schema:
            closed["additionalProperties"] = False
        return closed
    return [strict(each) for each in schema] if isinstance(schema, list) else schema


# Their models keep Python's names beside the API's; the schema has the API's.
CUSTOM = {
    ("keda.sh/v1alpha1", "ScaledObject"): Draft202012Validator(strict(ScaledObject.model_json_schema(by_alias=True))),
    ("monitoring.coreos.com/v1", "PodMonitor"): Draft202012Validator(strict(PodMonitor.model_json_schema(by_alias=True))),
}


def oldest_supported() -> str:
    constraint = yaml.safe_load((CHART / "Chart.yaml").read_text())["kubeVersion"]
    return str(constraint).removeprefix(">=").removesuffix(".0-0")


@pytest.mark.parametrize("kubernetes", ["oldest", "newest"])
def test_every_manifest_is_one_that_kubernetes_and_its_operators_take(manifests: list[Manifest], kubernetes: str) -> None:
    version = oldest_supported() if kubernetes == "oldest" else kubernetes_validate.latest_version()
    assert manifests
    for manifest in manifests:
        custom = CUSTOM.get((manifest["apiVersion"], manifest["kind"]))
        if custom is None:
            kubernetes_validate.validate(manifest, version, strict=True)
        else:
            custom.validate(manifest)


def test_names_are_short_enough_and_no_two_are_the_same(manifests: list[Manifest]) -> None:
    assert len({(each["kind"], each["metadata"]["name"]) for each in manifests}) == len(manifests)
    longest = max((each["metadata"]["name"] for each in of_kind(manifests, "Service")), key=len)
    # A release's name has 53 characters at the most, of which the chart keeps 34.
    assert len(longest) - len(NAME) + 34 <= 63


def test_helm_has_nothing_to_say_of_it(program: Path) -> None:
    done = subprocess.run([program, "lint", "--strict", "--quiet", CHART], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stdout + done.stderr


def with_value(path: str, value: Any) -> dict[str, Any]:
    """Values of which only this one is set."""
    for key in reversed(path.split(".")):
        value = {key: value}
    return dict(value)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("sevices", {}, "sevices"),
        ("services.edge.replicas", 0, "minimum"),
        ("services.edge.env.PORTCULLIS_EDGE_MAX_IN_FLIHGT", "9", "PORTCULLIS_EDGE_MAX_IN_FLIHGT"),
        ("services.edge.env.PORTCULLIS_EDGE_MAX_IN_FLIGHT", 1000000, "want string"),
        ("services.auth.env.PORTCULLIS_KEY_PEPPER", "not in a values file", "PORTCULLIS_KEY_PEPPER"),
        ("env.PORTCULLIS_REDIS_URL", "redis://:secret@redis", "PORTCULLIS_REDIS_URL"),
        ("env.PORTCULLIS_NATS_URL", "nats://elsewhere", "PORTCULLIS_NATS_URL"),
        ("nats.url", "nats://user:secret@nats:4222", "secrets.natsPasswords"),
        ("nats.url", "redis://nats:4222", "pattern"),
        ("secrets.redis.name", "", "/secrets/redis/name"),
        ("services.edge.hosts", ["https://guard.example.com"], "pattern"),
        ("keda.workers.busy", 60, "maximum"),
        ("services.edge.env.PORTCULLIS_REQUEST_TIMEOUT_SECONDS", "65", "set drainSeconds above it"),
        ("services.jobs.env.PORTCULLIS_JOBS_MESSAGE_TIMEOUT_SECONDS", "120", "set drainSeconds above it"),
        ("drainSeconds", 10, "minimum"),
    ],
)
def test_a_wrong_value_is_refused_with_a_word_about_it(run: Run, path: str, value: Any, said: str) -> None:
    done = run(with_value(path, value))
    assert done.returncode != 0
    assert said in done.stderr


def test_a_secret_is_not_repeated_in_a_refusal(run: Run) -> None:
    assert "topsecret" not in run(with_value("nats.url", "nats://user:topsecret@nats:4222")).stderr


# --- the code, in both directions ----------------------------------------------------------------------------------------


def test_every_service_has_its_parts(manifests: list[Manifest], request: pytest.FixtureRequest) -> None:
    running = set(pods(manifests))
    without_console = "little" in request.node.name
    expected = set(COMPONENTS) - ({"console"} if without_console else set())
    assert running - {BATCH} == expected
    for kind in ("ServiceAccount", "NetworkPolicy"):
        found = {component_of(each) for each in of_kind(manifests, kind)}
        assert found == (running | {"migrate"} if kind == "ServiceAccount" or not without_console else set()), kind
    assert {component_of(each) for each in of_kind(manifests, "PodDisruptionBudget")} == running - {*SINGLE, BATCH}
    assert {component_of(each) for each in of_kind(manifests, "Service")} == running


def test_images_are_called_like_the_services(rendered: dict[str, list[Manifest]]) -> None:
    for name, registry, tag in (("defaults", "", VERSION), ("everything", "registry.example.com/security/", "1.2.3")):
        for component, pod in pods(rendered[name]).items():
            assert container(pod)["image"] == f"{registry}{micro_name(service_of(component))}:{tag}"
        assert container(pods(rendered[name], "Job")["migrate"])["image"] == f"{registry}{micro_name('auth')}:{tag}"


def test_the_chart_has_the_version_of_the_code() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == VERSION


def test_variables_that_values_may_set_are_those_that_there_are() -> None:
    assert SCHEMA.read_text() == chart_env.render(), "run python -m tests.contract.chart_env"
    assert set(SERVICES) == chart_env.OWN.keys()
    known = {name for module in SOURCES.values() for name in chart_env.variables(own(module))}
    assert NEVER.keys() <= known


def test_each_pod_is_told_what_its_service_reads_and_nothing_else(everything: list[Manifest]) -> None:
    free = chart_env.free()
    for component, pod in pods(everything).items():
        service = service_of(component)
        known = chart_env.variables(own(SOURCES[service]))
        told = set(environment(pod))
        assert {name for name in told if not name.startswith("OTEL_")} <= known, component
        reserved = told - set(free[f"env_{service}"])
        expected = chart_env.set_by_the_chart(service)
        if component == "fallback-model":
            expected -= {"PORTCULLIS_MODEL_BULK_ONLY"}
        assert {name for name in reserved if not name.startswith("OTEL_")} == expected, component


def secrets_of(settings: type[CommonSettings]) -> set[str]:
    found = {name for name, field in settings.model_fields.items() if "SecretStr" in str(field.annotation)}
    assert found, settings
    return {f"PORTCULLIS_{name.upper()}" for name in found}


def test_secrets_are_named_and_go_to_whoever_needs_them(everything: list[Manifest]) -> None:
    for component, pod in pods(everything, "Deployment", "Job").items():
        service = "auth" if component == "migrate" else service_of(component)
        secret = secrets_of(own(SOURCES[service]))
        for name, variable in environment(pod).items():
            assert ("valueFrom" in variable) == (name in secret), name
            assert service in ONLY_FOR.get(name, SERVICES)
    held = {component: set(environment(pod)) for component, pod in pods(everything).items()}
    for name, services in ONLY_FOR.items():
        assert {service_of(component) for component, names in held.items() if name in names} == set(services)
    assert not list(of_kind(everything, "Secret", "ConfigMap"))


def test_each_pod_is_told_what_its_service_accepts(rendered: dict[str, list[Manifest]], monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"PORTCULLIS_DATABASE_URL": "postgresql://u:p@db/portcullis", "PORTCULLIS_REDIS_URL": "redis://:p@redis:6379/0"}
    for name in VALUES:
        for component, pod in pods(rendered[name]).items():
            for variable in environment(pod).values():
                secret = given.get(variable["name"], f"long-enough-a-secret-for-{variable['name']}")
                monkeypatch.setenv(variable["name"], variable.get("value", secret))
            if name == BOTH_WAYS:
                monkeypatch.setenv("PORTCULLIS_NATS_TLS_CA", certifi.where())  # where the volume is, in a pod
            settings = own(SOURCES[service_of(component)])()
            assert settings.metrics_host == "0.0.0.0"
            for variable in environment(pod).values():
                monkeypatch.delenv(variable["name"])


OLD_PEPPER = {"name": "portcullis-auth", "key": "key-pepper"}
NEW_PEPPER = {"name": "portcullis-auth-2", "key": "key-pepper"}


@pytest.mark.parametrize(
    ("secrets", "current", "previous"),
    [
        ({}, OLD_PEPPER, None),
        ({"keyPepperPrevious": {"name": "portcullis-auth-2"}}, OLD_PEPPER, NEW_PEPPER),
        (
            {"keyPepper": {"name": "portcullis-auth-2"}, "keyPepperPrevious": {"name": "portcullis-auth"}},
            NEW_PEPPER,
            OLD_PEPPER,
        ),
        ({"keyPepper": {"name": "portcullis-auth-2"}, "keyPepperPrevious": {"name": ""}}, NEW_PEPPER, None),
    ],
)
def test_the_pepper_is_exchanged_in_the_steps_of_the_manual(
    run: Run, secrets: dict[str, Any], current: dict[str, str], previous: dict[str, str] | None
) -> None:
    rendered = run({"secrets": secrets})
    assert rendered.returncode == 0, rendered.stderr
    told = environment(pods([each for each in yaml.safe_load_all(rendered.stdout) if each])["auth"])
    assert told["PORTCULLIS_KEY_PEPPER"]["valueFrom"]["secretKeyRef"] == current
    found = told.get("PORTCULLIS_KEY_PEPPER_PREVIOUS")
    assert (found["valueFrom"]["secretKeyRef"] if found is not None else None) == previous


@pytest.mark.parametrize(("values", "suffix"), [("defaults", ""), ("everything", "-b")])
def test_each_service_comes_to_nats_as_its_own_user(rendered: dict[str, list[Manifest]], values: str, suffix: str) -> None:
    for component, pod in pods(rendered[values]).items():
        told = environment(pod)
        user = told["PORTCULLIS_NATS_USER"]["value"]
        assert user == service_of(component) + suffix
        assert user.removesuffix(suffix) in PERMISSIONS
        assert told["PORTCULLIS_NATS_PASSWORD"]["valueFrom"]["secretKeyRef"] == {"name": "portcullis-nats", "key": user}


def test_own_variables_go_before_those_of_all(everything: list[Manifest]) -> None:
    levels = {component: environment(pod)["PORTCULLIS_LOG_LEVEL"]["value"] for component, pod in pods(everything).items()}
    assert levels.pop("edge") == "INFO"
    assert set(levels.values()) == {"WARNING"}


def test_ports_are_those_that_the_services_listen_on(manifests: list[Manifest]) -> None:
    listening = {"edge": "PORTCULLIS_EDGE_PORT", "console": "PORTCULLIS_CONSOLE_PORT"}
    for component, pod in pods(manifests).items():
        told = environment(pod)
        ports = {port["name"]: port["containerPort"] for port in container(pod)["ports"]}
        expected = {"metrics": int(told["PORTCULLIS_METRICS_PORT"]["value"])}
        if component in listening:
            expected["http"] = int(told[listening[component]]["value"])
        assert ports == expected
        for service in of_kind(manifests, "Service"):
            if component_of(service) == component:
                assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports.keys()
                assert selects(service["spec"]["selector"], manifests) == {component}
        for policy in of_kind(manifests, "NetworkPolicy"):
            if component_of(policy) == component:
                open_to = {port["port"] for rule in policy["spec"]["ingress"] for port in rule["ports"]}
                assert open_to == set(ports.values())


def test_the_console_is_where_the_edge_and_the_traces_go(rendered: dict[str, list[Manifest]]) -> None:
    (console,) = (each for each in of_kind(rendered["defaults"], "Service") if each["metadata"]["name"] == f"{NAME}-console")
    url = f"http://{console['metadata']['name']}:{console['spec']['ports'][0]['port']}"
    for component, pod in pods(rendered["defaults"]).items():
        told = environment(pod)
        assert ("OTEL_EXPORTER_OTLP_ENDPOINT" in told) == (component != "console")
        if component == "edge":
            assert told["PORTCULLIS_CONSOLE_URL"]["value"] == url
        if component != "console":
            assert told["OTEL_EXPORTER_OTLP_ENDPOINT"]["value"] == url
    for pod in pods(rendered["little"]).values():
        assert not {"PORTCULLIS_CONSOLE_URL", "OTEL_EXPORTER_OTLP_ENDPOINT"} & environment(pod).keys()


def test_probes_ask_the_process_itself(manifests: list[Manifest]) -> None:
    for pod in pods(manifests).values():
        paths = {}
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            asked = container(pod)[probe]["httpGet"]
            assert asked["port"] == "metrics"
            paths[probe] = asked["path"]
        assert paths == {"startupProbe": LIVE_PATH, "livenessProbe": LIVE_PATH, "readinessProbe": READY_PATH}


def test_a_pod_may_stop_for_longer_than_anything_that_it_has_in_hand(manifests: list[Manifest]) -> None:
    edge = EdgeSettings()
    assert json.loads(SCHEMA.read_text())["properties"]["drainSeconds"]["minimum"] > edge.request_timeout_seconds
    for component, pod in pods(manifests).items():
        drain = float(environment(pod)["PORTCULLIS_DRAIN_SECONDS"]["value"])
        assert drain > max(edge.request_timeout_seconds, JobsSettings().jobs_message_timeout_seconds)
        before = container(pod).get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        assert (before > 0) == (component == "edge")
        # What is in hand of the front, then what is in hand of the bus; then what is told at the end.
        longest = before + edge.edge_stop_grace_seconds + 2 * drain + FLUSH_SECONDS + trace_export.STOP_SECONDS
        assert pod["spec"]["terminationGracePeriodSeconds"] > longest


def test_workers_are_scaled_by_metrics_that_there_are(everything: list[Manifest]) -> None:
    series = all_series()
    found = list(of_kind(everything, "ScaledObject"))
    assert {component_of(each) for each in found} == {"fallback-model", BATCH}
    for scaled in found:
        for trigger in scaled["spec"]["triggers"]:
            asked = uses(trigger["metadata"]["query"])
            assert asked
            assert all(use.labels <= series[use.name] | TARGET_LABELS for use in asked), asked
            assert any("job" in use.labels for use in asked)  # the matchers that were given
            lanes = set(re.findall('lane="([^"]*)"', trigger["metadata"]["query"]))
            assert lanes <= set(LABELS["lane"].values)


def page_scrapes() -> Manifest:
    """The scrape configuration of the page, for a Prometheus without the operator."""
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return dict(yaml.safe_load(block))


def test_metrics_are_collected_under_the_labels_that_dashboards_go_by(everything: list[Manifest]) -> None:
    (monitor,) = of_kind(everything, "PodMonitor")
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert selects(monitor["spec"]["selector"]["matchLabels"], everything) >= set(pods(everything))
    (scrape,) = page_scrapes()["scrape_configs"]
    by_hand = [
        {"sourceLabels": each["source_labels"], "targetLabel": each.get("target_label")} for each in scrape["relabel_configs"]
    ]
    labels = [re.sub(r"\W", "_", label) for pod in pods(everything).values() for label in pod["metadata"]["labels"]]
    for rules in (endpoint["relabelings"], by_hand):
        assert {"service", "replica"} <= {rule.get("targetLabel") for rule in rules} <= {"service", "replica", "job", None}
        for source in (source for rule in rules for source in rule.get("sourceLabels", ())):
            assert source.removeprefix("__meta_kubernetes_pod_label_") in labels or "_label_" not in source, source
    for pod in pods(everything).values():
        assert pod["metadata"]["labels"]["portcullis/service"] in SERVICES
        assert endpoint["port"] in {port["name"] for port in container(pod)["ports"]}


def test_prometheus_takes_the_page_s_scrape_configuration(tmp_path: Path) -> None:
    scrapes = page_scrapes()
    # Debian builds its Prometheus without the discovery in Kubernetes; the rest is held to what it knows.
    assert scrapes["scrape_configs"][0].pop("kubernetes_sd_configs") == [{"role": "pod"}]
    path = tmp_path / "prometheus.yml"
    path.write_text(yaml.safe_dump(scrapes))
    done = subprocess.run([promtool(), "check", "config", path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_batch_pool_is_scaled_to_zero_and_gives_way(everything: list[Manifest]) -> None:
    scaled = {component_of(each): each["spec"] for each in of_kind(everything, "ScaledObject")}
    assert scaled[BATCH]["minReplicaCount"] == 0
    assert scaled["fallback-model"]["minReplicaCount"] >= 1
    classes = {each["metadata"]["name"]: each for each in of_kind(everything, "PriorityClass")}
    used = {component: classes[pod["spec"]["priorityClassName"]] for component, pod in pods(everything).items()}
    batch = used.pop(BATCH)
    assert batch["preemptionPolicy"] == "Never"
    assert all(batch["value"] < other["value"] for other in used.values())
    assert environment(pods(everything)[BATCH])["PORTCULLIS_MODEL_BULK_ONLY"]["value"] == "true"
    assert "PORTCULLIS_MODEL_BULK_ONLY" not in environment(pods(everything)["fallback-model"])


def test_pods_are_counted_by_one_only(manifests: list[Manifest]) -> None:
    deployments = {each["metadata"]["name"]: each for each in of_kind(manifests, "Deployment")}
    scalers = list(of_kind(manifests, "HorizontalPodAutoscaler", "ScaledObject"))
    targets = [each["spec"]["scaleTargetRef"]["name"] for each in scalers]
    assert len(targets) == len(set(targets))
    assert {name for name, each in deployments.items() if "replicas" not in each["spec"]} == set(targets)
    for hpa in of_kind(manifests, "HorizontalPodAutoscaler"):
        assert component_of(hpa) in ("edge", "auth", "limiter", "detector-proxy")
        (requested,) = {each["resource"]["name"] for each in hpa["spec"]["metrics"]}
        assert requested in container(pods(manifests)[component_of(hpa)])["resources"]["requests"]


def test_the_schema_is_changed_before_pods_are(everything: list[Manifest]) -> None:
    (job,) = of_kind(everything, "Job")
    assert set(job["metadata"]["annotations"]["helm.sh/hook"].split(",")) == {"pre-install", "pre-upgrade"}
    assert container(job["spec"]["template"])["args"] == ["migrate"]
    assert 'sys.argv[1:] == ["migrate"]' in (ROOT / "services" / "auth" / "__main__.py").read_text()
    # What it runs as, and may reach, is there before it.
    weight = int(job["metadata"]["annotations"]["helm.sh/hook-weight"])
    needed = [each for each in everything if component_of(each) == "migrate" and each is not job]
    assert {each["kind"] for each in needed} == {"ServiceAccount", "NetworkPolicy"}
    assert all(int(each["metadata"]["annotations"]["helm.sh/hook-weight"]) < weight for each in needed)


# --- least privilege -----------------------------------------------------------------------------------------------------


def test_pods_may_do_nothing_that_they_need_not(manifests: list[Manifest]) -> None:
    accounts = {each["metadata"]["name"]: each for each in of_kind(manifests, "ServiceAccount")}
    for pod in pods(manifests, "Deployment", "Job").values():
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert accounts[spec["serviceAccountName"]]["automountServiceAccountToken"] is False
        # Kubernetes would set PORTCULLIS_EDGE_PORT=tcp://… for a Service of that name, which the settings refuse.
        assert spec["enableServiceLinks"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        running = container(pod)
        assert running["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        for amount in ("requests", "limits"):
            assert running["resources"][amount].keys() == {"cpu", "memory"}


def test_each_policy_is_of_one_component_and_lets_out_what_it_needs(everything: list[Manifest]) -> None:
    out: dict[str, set[int]] = {}
    for policy in of_kind(everything, "NetworkPolicy"):
        component = component_of(policy)
        assert selects(policy["spec"]["podSelector"]["matchLabels"], everything) == {component}
        assert set(policy["spec"]["policyTypes"]) == {"Ingress", "Egress"}
        rules = policy["spec"]["egress"]
        assert ({} in rules) == (component == "detector-proxy")  # an engine may be anywhere, unless it is said where
        out[component] = {port["port"] for rule in rules for port in rule.get("ports", ())} - {53, 4222, 4318}
    assert out == {
        "edge": set(),
        "auth": {5432},
        "limiter": {6379, 26379},
        "detector-proxy": set(),
        "fallback-model": set(),
        BATCH: set(),
        "jobs": {80, 443},
        "console": set(),
        "migrate": {5432},
    }


# --- values --------------------------------------------------------------------------------------------------------------


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    else:
        yield path


def test_every_value_that_may_be_set_has_a_default() -> None:
    schema = json.loads(SCHEMA.read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())

    def compare(part: Manifest, given: Any, path: str) -> None:
        part = schema["$defs"][part["$ref"].rpartition("/")[2]] if "$ref" in part else part
        for name, inner in part.get("properties", {}).items():
            assert name in given or (path == "" and name == "global"), f"{path}.{name}"
            if name in given:
                compare(inner, given[name], f"{path}.{name}")

    compare(schema, deepcopy(values), "")


def test_the_page_names_values_that_there_are_and_leaves_none_out() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    named = {path for path in re.findall(r"`([a-z]\w*(?:\.\w+)*)`", PAGE.read_text()) if path.partition(".")[0] in values}
    assert {path.partition(".")[0] for path in named} == values.keys()
    for path in named:
        part = values
        for key in path.split("."):
            assert key in part, path
            part = part[key]
