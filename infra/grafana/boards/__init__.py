"""The dashboards. Which question each answers is in docs/operations/README.md."""

from __future__ import annotations

from infra.grafana.boards import jobs, limits, model, overview, stage

BOARDS = {
    "overview": overview.dashboard,
    "stage": stage.dashboard,
    "model": model.dashboard,
    "limits": limits.dashboard,
    "jobs": jobs.dashboard,
}
