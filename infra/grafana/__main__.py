"""Write the dashboards."""

from __future__ import annotations

import json
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from infra.grafana.boards import BOARDS

FOLDER = Path(__file__).with_name("dashboards")


def render(dashboard: Dashboard) -> str:
    return json.dumps(dashboard, cls=JSONEncoder, indent=1, sort_keys=True) + "\n"


def main() -> None:
    for name, make in BOARDS.items():
        (FOLDER / f"{name}.json").write_text(render(make()))


if __name__ == "__main__":
    main()
