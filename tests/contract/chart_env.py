"""Which variables the chart's values may set: `python -m tests.contract.chart_env` writes them into its values.schema.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from libs.common.settings import CommonSettings
from libs.common.subjects import SERVICES
from tests.contract.configuration_page import SOURCES, own

CHART = Path(__file__).parents[2] / "infra" / "helm" / "portcullis"
SCHEMA = CHART / "values.schema.json"

EVERY_SERVICE = frozenset(
    f"PORTCULLIS_{name}"
    for name in (
        *("NATS_URL", "NATS_USER", "NATS_PASSWORD", "NATS_TLS_CA"),
        *("METRICS_HOST", "METRICS_PORT", "DRAIN_SECONDS"),
    )
)
"""What the chart sets itself, from values and Secrets of their own."""
OWN = {
    "edge": ("EDGE_HOST", "EDGE_PORT", "ALLOWED_HOSTS", "CONSOLE_URL"),
    "auth": ("DATABASE_URL", "KEY_PEPPER", "KEY_PEPPER_PREVIOUS", "ADMIN_TOKEN", "NATS_ISSUER_SEED"),
    "limiter": ("REDIS_URL",),
    "detector_proxy": ("ENGINE_TOKEN",),
    "fallback_model": ("MODEL_BULK_ONLY",),
    "jobs": (),
    "console": ("CONSOLE_HOST", "CONSOLE_PORT", "ADMIN_TOKEN"),
}
NEVER = {
    "PORTCULLIS_EDGE_SOCKET_FD": "nothing hands a socket on to a container",
    "PORTCULLIS_NATS_PASSWORDS": "each container holds one service, which has a Secret of its own",
    "PORTCULLIS_CONSOLE_OPEN": "the console listens beyond loopback here, which goes with the admin token only",
}
"""What makes no sense in a container, and why."""
TRACING = "^OTEL_[A-Z_]+$"


def variables(settings: type[CommonSettings]) -> set[str]:
    return {f"PORTCULLIS_{name.upper()}" for name in settings.model_fields}


def set_by_the_chart(service: str) -> set[str]:
    return set(EVERY_SERVICE) | {f"PORTCULLIS_{name}" for name in OWN[service]}


def free() -> dict[str, list[str]]:
    """What `env` of the values may set, and `services.<name>.env`."""
    found = {"env": variables(CommonSettings) - EVERY_SERVICE - NEVER.keys()}
    for service in SERVICES:
        found[f"env_{service}"] = variables(own(SOURCES[service])) - set_by_the_chart(service) - NEVER.keys()
    return {name: sorted(names) for name, names in found.items()}


def render() -> str:
    schema: dict[str, Any] = json.loads(SCHEMA.read_text())
    for name, names in free().items():
        schema["$defs"][name] = {
            "type": "object",
            "propertyNames": {"anyOf": [{"enum": names}, {"pattern": TRACING}]},
            "additionalProperties": {"type": "string"},
        }
    return json.dumps(schema, indent=2) + "\n"


if __name__ == "__main__":
    SCHEMA.write_text(render())
