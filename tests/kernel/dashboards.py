"""What the examples for Grafana and Prometheus ask for: their expressions, and the metrics that are named in them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

EXAMPLES = Path(__file__).parents[2] / "examples"
DASHBOARD = EXAMPLES / "grafana" / "netfence.json"
RULES = EXAMPLES / "prometheus" / "netfence.rules.yaml"
CONFIG = EXAMPLES / "prometheus" / "prometheus.yaml"

_METRIC = re.compile(r"\b(?:netfence|process)_[a-z_]+\b")


def dashboard() -> dict[str, Any]:
    """Read the dashboard."""
    return dict(json.loads(DASHBOARD.read_text(encoding="utf-8")))


def alerts() -> list[dict[str, Any]]:
    """Read the alert rules."""
    return [rule for group in yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"] for rule in group["rules"]]


def expressions() -> Iterator[str]:
    """Give every expression: panels, variables, alerts."""
    board = dashboard()
    for panel in board["panels"]:
        yield from (target["expr"] for target in panel.get("targets", ()))
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["query"]["query"]
    yield from (rule["expr"] for rule in alerts())


def named() -> set[str]:
    """Give the names of all metrics in the expressions."""
    return {name for expression in expressions() for name in _METRIC.findall(expression)}
