"""Grafana's dashboards, written by ``python -m scripts.dashboards``. A panel is one call: title, reading, PromQL."""
