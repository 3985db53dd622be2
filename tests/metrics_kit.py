"""Which metrics there are: as the code declares them, as dashboards and alerts ask for them, as a running stack exports them."""

from __future__ import annotations

import functools
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import promql_parser
import yaml
from prometheus_client import REGISTRY
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from libs.common.subjects import SERVICES

ROOT = Path(__file__).parents[1]
DASHBOARDS = ROOT / "infra" / "grafana" / "dashboards"
RULES = ROOT / "infra" / "prometheus" / "rules"
VARIABLES = {"$__rate_interval": "1m", "$__range": "1h", "$service": ".*", "$replica": ".*", "$subject": ".*"}
"""Grafana's, and what they stand for where all is chosen."""
EVERY_SERVICE = "every service"

SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
TARGET_LABELS = frozenset({"service", "replica", "instance", "job"})
"""What the scrape configuration adds to every series."""
PROMETHEUS_OWN = {"up": frozenset[str](), "ALERTS": frozenset({"alertname", "alertstate", "severity"})}
"""What Prometheus makes itself, and the labels of it beside those of the target."""


@dataclass(frozen=True, slots=True)
class Family:
    """One metric. `name`: as in `# TYPE`, without the suffixes of its series."""

    name: str
    kind: str
    labels: tuple[str, ...]
    help: str

    @property
    def shown_name(self) -> str:
        return self.name + ("_total" if self.kind == "counter" else "")

    @property
    def series(self) -> dict[str, frozenset[str]]:
        """The names of its series, and their labels."""
        own = frozenset(self.labels)
        return {self.name + suffix: own | {"le"} if suffix == "_bucket" else own for suffix in SUFFIXES.get(self.kind, ("",))}


# --- declared ------------------------------------------------------------------------------------------------------------


@functools.cache
def declared() -> dict[str, tuple[Family, ...]]:
    """The metrics of every service, and of each, as a process has them that has just started."""
    done = subprocess.run([sys.executable, "-m", "tests.metrics_kit"], cwd=ROOT, capture_output=True, text=True, check=True)
    found: dict[str, list[dict[str, Any]]] = json.loads(done.stdout)
    return {owner: tuple(Family(**{**each, "labels": tuple(each["labels"])}) for each in own) for owner, own in found.items()}


def of_service(service: str) -> dict[str, Family]:
    return {family.name: family for owner in (EVERY_SERVICE, service) for family in declared()[owner]}


def all_series() -> dict[str, frozenset[str]]:
    return {name: labels for own in declared().values() for family in own for name, labels in family.series.items()}


def _registered() -> dict[str, Family]:
    found = {}
    for collector in list(REGISTRY._collector_to_names):
        own = tuple(collector._labelnames) if isinstance(collector, MetricWrapperBase) else None
        for metric in collector.collect():
            labels = own if own is not None else tuple(sorted({label for each in metric.samples for label in each.labels}))
            found[metric.name] = Family(metric.name, metric.type, labels, metric.documentation)
    return found


def _dump() -> None:
    importlib.import_module("libs.common.service")
    seen = _registered()
    owners: dict[str, list[Family]] = {EVERY_SERVICE: list(seen.values())}
    for service in SERVICES:
        importlib.import_module(f"services.{service}.app")
        now = _registered()
        owners[service] = [family for name, family in now.items() if name not in seen]
        seen = now
    print(json.dumps({owner: [asdict(family) for family in own] for owner, own in owners.items()}))


# --- asked for -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Query:
    """PromQL as Prometheus gets it, and where it stands."""

    where: str
    expression: str


def dashboard_queries() -> Iterator[Query]:
    """Every query of a panel, with Grafana's variables replaced."""
    for path in sorted(DASHBOARDS.glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel.get("targets", ()):
                yield Query(f"{path.name}: {panel['title']}", _plain(target["expr"]))


def dashboard_choices() -> Iterator[tuple[str, str, str]]:
    """Where, the selector and the label of each `label_values(selector, label)`."""
    for path in sorted(DASHBOARDS.glob("*.json")):
        for variable in json.loads(path.read_text())["templating"]["list"]:
            if variable["type"] == "query":
                matched = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"])
                assert matched is not None, variable["query"]
                yield f"{path.name}: {variable['name']}", _plain(matched[1]), matched[2]


def rules() -> Iterator[dict[str, Any]]:
    for path in sorted(RULES.glob("*.yml")):
        for group in yaml.safe_load(path.read_text())["groups"]:
            yield from group["rules"]


def alert_queries() -> Iterator[Query]:
    for rule in rules():
        yield Query(rule["alert"], rule["expr"])


def _plain(expression: str) -> str:
    for variable, value in VARIABLES.items():
        expression = expression.replace(variable, value)
    assert "$" not in expression, expression
    return expression


@dataclass(slots=True)
class Use:
    """A series that a query selects, and the labels that it needs to have."""

    name: str
    labels: set[str]


def uses(expression: str) -> list[Use]:
    """What an expression selects. Labels that it groups or joins by count for everything below."""
    found: list[Use] = []
    _walk(promql_parser.parse(expression), frozenset(), found)
    return found


def _walk(node: Any, wanted: frozenset[str], found: list[Use]) -> None:
    match node:
        case promql_parser.VectorSelector():
            assert node.name is not None, "a selector without a metric's name"
            found.append(Use(node.name, set(wanted) | {matcher.name for matcher in node.matchers.matchers}))
        case promql_parser.MatrixSelector():
            _walk(node.vector_selector, wanted, found)
        case promql_parser.AggregateExpr():
            by = node.modifier
            if by is not None:
                assert by.type == promql_parser.AggModifierType.By, "group by what is kept"
                wanted |= frozenset(by.labels)
            _walk(node.expr, wanted, found)
        case promql_parser.BinaryExpr():
            for side in (node.lhs, node.rhs):
                _walk(side, wanted, found)
        case promql_parser.Call():
            # What has no labels has none to group by.
            for argument in node.args:
                _walk(argument, frozenset() if node.func.name == "scalar" else wanted, found)
        case promql_parser.ParenExpr() | promql_parser.SubqueryExpr() | promql_parser.UnaryExpr():
            _walk(node.expr, wanted, found)
        case promql_parser.NumberLiteral() | promql_parser.StringLiteral():
            pass
        case _:
            raise TypeError(type(node))


# --- exported ------------------------------------------------------------------------------------------------------------


def parsed(text: str) -> dict[str, Metric]:
    """By the family's name."""
    return {family.name: family for family in text_string_to_metric_families(text)}


if __name__ == "__main__":
    _dump()
