"""Grafana's dashboards, made from a few lines each: `python -m infra.grafana` writes them to `dashboards/`."""
