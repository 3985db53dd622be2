"""What Prometheus, Grafana, the collector and Tempo are given can be read and agrees with itself; alerts do what they say."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.grafana.__main__ import render
from infra.grafana.boards import BOARDS
from tests.metrics_kit import (
    DASHBOARDS,
    PROMETHEUS_OWN,
    ROOT,
    TARGET_LABELS,
    Query,
    alert_queries,
    all_series,
    dashboard_choices,
    dashboard_queries,
    rules,
    uses,
)
from tests.prometheus_tools import promtool

PROMETHEUS = ROOT / "infra" / "prometheus"
RUNBOOKS = ROOT / "docs" / "operations" / "runbooks.md"
QUERIES = [*dashboard_queries(), *alert_queries()]


def read(*path: str) -> Any:
    return yaml.safe_load(ROOT.joinpath("infra", *path).read_text())


# --- by promtool ---------------------------------------------------------------------------------------------------------


def run_promtool(*arguments: str | Path) -> None:
    done = subprocess.run([promtool(), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_takes_its_configuration_and_the_rules() -> None:
    run_promtool("check", "config", PROMETHEUS / "prometheus.yml")
    run_promtool("check", "rules", *(PROMETHEUS / "rules").glob("*.yml"))


def test_alerts_fire_when_they_should_and_only_then() -> None:
    run_promtool("test", "rules", *(PROMETHEUS / "tests").glob("*.yml"))


# --- alerts --------------------------------------------------------------------------------------------------------------


def test_each_alert_is_shown_to_fire_and_to_keep_quiet() -> None:
    fires: dict[str, set[bool]] = {}
    for path in (PROMETHEUS / "tests").glob("*.yml"):
        for test in yaml.safe_load(path.read_text())["tests"]:
            for case in test["alert_rule_test"]:
                fires.setdefault(case["alertname"], set()).add(bool(case["exp_alerts"]))
    assert fires == {rule["alert"]: {True, False} for rule in rules()}


def test_each_alert_has_a_severity_and_leads_to_its_section_of_the_runbooks() -> None:
    sections = dict(re.findall(r"^## (.+)\n((?:(?!^## ).*\n?)*)", RUNBOOKS.read_text(), re.MULTILINE))
    named = [rule["alert"] for rule in rules()]
    assert list(sections) == named
    for rule in rules():
        alert = rule["alert"]
        assert rule["labels"]["severity"] in ("page", "ticket", "info"), alert
        assert rule["annotations"]["runbook_url"] == f"docs/operations/runbooks.md#{alert.lower()}"
        for part in ("**Callers see**", "**Find the cause**", "**Do**"):
            assert part in sections[alert], f"{alert}: {part}"


@pytest.mark.parametrize("page", ["runbooks.md", "README.md"])
def test_pages_name_dashboards_panels_and_settings_that_there_are(page: str) -> None:
    text = RUNBOOKS.with_name(page).read_text()
    titles = {panel["title"] for board in boards() for panel in board["panels"]}
    names = titles | {title.partition(",")[0] for title in titles} | set(BOARDS) | {"Portcullis"}
    for board in boards():
        names |= {board["title"], board["title"].removeprefix("Portcullis: ")}
    for name in re.findall(r"(?<!\*)\*([^*]+)\*(?!\*)", text):
        assert " ".join(name.split()) in names, name
    for row in re.findall(r'row "([^"]+)"', text):
        assert row in titles, row
    settings = (ROOT / "docs" / "configuration.md").read_text()
    for variable in re.findall(r"PORTCULLIS_[A-Z_]+", text):
        assert f"`{variable}`" in settings, variable


# --- queries -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.where)
def test_each_query_names_metrics_that_there_are_with_labels_that_they_have(query: Query) -> None:
    series = all_series()
    found = uses(query.expression)
    assert found
    for use in found:
        labels = PROMETHEUS_OWN.get(use.name, series.get(use.name))
        assert labels is not None, f"nothing exports {use.name}"
        assert use.labels <= labels | TARGET_LABELS, f"{use.name} has no {use.labels - labels - TARGET_LABELS}"


def test_what_can_be_chosen_in_dashboards_are_labels_that_there_are() -> None:
    series = all_series() | PROMETHEUS_OWN
    choices = list(dashboard_choices())
    assert choices
    for where, selector, label in choices:
        (use,) = uses(selector)
        assert use.labels | {label} <= series[use.name] | TARGET_LABELS, where


def test_no_metric_of_ours_is_collected_for_nobody() -> None:
    used = {use.name for query in QUERIES for use in uses(query.expression)}
    unused = {name for name in all_series() if name.startswith("portcullis_")} - used
    shown = {re.sub(r"_(bucket|sum|count)$", "", name) for name in used}
    assert {name for name in unused if re.sub(r"_(bucket|sum|count)$", "", name) not in shown} == {"portcullis_build_info"}


# --- dashboards ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BOARDS)
def test_the_dashboards_are_up_to_date(name: str) -> None:
    assert (DASHBOARDS / f"{name}.json").read_text() == render(BOARDS[name]()), "run python -m infra.grafana"


def test_nothing_else_lies_among_the_dashboards() -> None:
    assert {path.stem for path in DASHBOARDS.iterdir()} == set(BOARDS)


def boards() -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in DASHBOARDS.glob("*.json")]


def test_dashboards_and_panels_have_numbers_of_their_own_and_do_not_overlap() -> None:
    assert len({board["uid"] for board in boards()}) == len(BOARDS)
    for board in boards():
        panels = board["panels"]
        assert len({panel["id"] for panel in panels}) == len(panels)
        taken: set[tuple[int, int]] = set()
        for panel in panels:
            at = panel["gridPos"]
            assert at["x"] + at["w"] <= 24
            cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
            assert not cells & taken, panel["title"]
            taken |= cells


def test_every_panel_asks_the_prometheus_that_was_chosen() -> None:
    for board in boards():
        for panel in board["panels"]:
            for target in panel.get("targets", ()):
                assert target["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, panel["title"]


# --- what is mounted -----------------------------------------------------------------------------------------------------


def sources() -> dict[str, dict[str, Any]]:
    """Grafana's data sources by their type."""
    provisioned = read("grafana", "provisioning", "datasources", "portcullis.yaml")["datasources"]
    return {source["type"]: source for source in provisioned}


def test_exemplars_lead_to_the_tempo_that_is_provisioned() -> None:
    prometheus, tempo = sources()["prometheus"], sources()["tempo"]
    assert prometheus["jsonData"]["exemplarTraceIdDestinations"] == [{"name": "trace_id", "datasourceUid": tempo["uid"]}]
    (query,) = tempo["jsonData"]["tracesToMetrics"]["queries"]
    assert tempo["jsonData"]["tracesToMetrics"]["datasourceUid"] == prometheus["uid"]
    assert {use.name for use in uses(query["query"].replace("$$__rate_interval", "1m"))} <= set(all_series())


def test_the_collector_passes_traces_on_to_tempo() -> None:
    collector, tempo = read("otel", "collector.yaml"), read("tempo", "tempo.yaml")
    pipeline = collector["service"]["pipelines"]["traces"]
    for kind in ("receivers", "processors", "exporters"):
        assert pipeline[kind]
        assert set(pipeline[kind]) == set(collector[kind])
    assert pipeline["processors"] == ["memory_limiter", "batch"]
    port = tempo["distributor"]["receivers"]["otlp"]["protocols"]["http"]["endpoint"].rpartition(":")[2]
    assert collector["exporters"]["otlphttp"]["endpoint"] == f"http://tempo:{port}"
    assert sources()["tempo"]["url"] == f"http://tempo:{tempo['server']['http_listen_port']}"
