"""docs/configuration.md, made from the settings classes: `python -m tests.contract.configuration_page` writes it."""

from __future__ import annotations

import ast
import importlib
import inspect
import textwrap
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import SecretStr
from pydantic_core import PydanticUndefined

from libs.common.settings import CommonSettings

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"

SOURCES = {
    "Every service": "libs.common.settings",
    "edge": "services.edge.settings",
    "auth": "services.auth.settings",
    "limiter": "services.limiter.settings",
    "detector_proxy": "services.detector_proxy.settings",
    "fallback_model": "services.fallback_model.settings",
    "jobs": "services.jobs.settings",
    "console": "services.console.settings",
}

HEAD = """# Configuration

Everything is set in the environment. A wrong value ends the start with one line that says what to do. `./run up` passes what is
set in its own environment on to the services, a secret only to the service that needs it; what it makes up itself (passwords, the
admin token, free ports for the servers) is in its home, `.portcullis/` or `PORTCULLIS_HOME`.

Instead of being set in the environment, a variable may be a file called like it in lower case, in the folder that
`PORTCULLIS_SECRETS_DIR` names: `/run/secrets/portcullis_key_pepper`, as container engines mount secrets. What is set in the
environment goes before.

<!-- Made from the settings classes by `python -m tests.contract.configuration_page`; do not edit. -->

## `./run up`

| variable | default | |
|---|---|---|
| `PORTCULLIS_HOME` | `.portcullis` | Data, secrets, logs and tools of this stack. |
| `PORTCULLIS_EDGE_HOST`, `PORTCULLIS_EDGE_PORT` | `127.0.0.1`, `8000` | Where the gateway listens. |
| `PORTCULLIS_NATS_PORT`, `PORTCULLIS_REDIS_PORT`, `PORTCULLIS_POSTGRES_PORT` | free ones | Ports of the embedded servers. |
| `PORTCULLIS_CONSOLE_PORT` | a free one | Port of the console, which is reached through the gateway, at `/console`. |
| `PORTCULLIS_NATS_URL`, `PORTCULLIS_REDIS_URL`, `PORTCULLIS_DATABASE_URL` | | Your own server instead of the embedded one. |
| `PORTCULLIS_METRICS_PORT` | free ones | The first of a row of ports, one for each process in the order of the path. |
"""


def _docstrings(settings: type[CommonSettings]) -> dict[str, str]:
    """The string below each field, which every one must have."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(settings)))
    found: dict[str, str] = {}
    statements: list[ast.stmt] = tree.body[0].body  # type: ignore[attr-defined]  # a class statement
    for node, below in pairwise([*statements, ast.Pass()]):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            if not (isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)):
                raise TypeError(f"{settings.__name__}.{node.target.id} has no docstring below it")
            found[node.target.id] = " ".join(str(below.value.value).split())
    return found


def _default(value: Any) -> str:
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    if isinstance(value, Path):
        value = value.relative_to(PAGE.parents[1]) if value.is_relative_to(PAGE.parents[1]) else value
    return "" if value is None or value == "" else f"`{value}`"


def own(module_name: str) -> type[CommonSettings]:
    """The settings class that a module defines."""
    module = importlib.import_module(module_name)
    (settings,) = (
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, CommonSettings) and value.__module__ == module_name
    )
    return settings


def render() -> str:
    parts = [HEAD]
    for title, module_name in SOURCES.items():
        settings = own(module_name)
        described = _docstrings(settings)
        parts.append(f"\n## {title}\n\n| variable | default | |\n|---|---|---|\n")
        for name, field in settings.model_fields.items():
            if name not in settings.__annotations__:
                continue  # of every service
            text = described.get(name, "").replace("|", "\\|")
            parts.append(f"| `PORTCULLIS_{name.upper()}` | {_default(field.default)} | {text} |\n")
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(render())
