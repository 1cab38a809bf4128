"""The examples for Grafana and Prometheus load, and ask for what there is (a kernel test asks a daemon)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from dashboards import CONFIG, RULES, alerts, dashboard, expressions, named
from netfence.metrics import FAMILIES

LABELS = {label for family in FAMILIES for label in family.labels} | {"instance", "job", "le", "upstream"}
SUFFIXES = {"histogram": ("_bucket", "_sum", "_count")}
NAMES = {
    family.name + suffix
    for family in FAMILIES
    for suffix in SUFFIXES.get(family.kind, (family.exposed.removeprefix(family.name),))
}


def test_the_dashboard_is_one_that_grafana_imports() -> None:
    board = dashboard()
    assert (board["uid"], board["title"]) == ("netfence", "Netfence")
    assert board["schemaVersion"] >= 36  # Grafana 9: panels name a data source by type and uid
    assert {"time", "refresh", "templating", "panels", "tags", "annotations", "version"} <= set(board)
    assert "id" not in board  # of another Grafana's data base: an import would replace what has that id here
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))


def test_grafanas_own_model_knows_every_setting() -> None:
    """Grafana ignores what it does not know: a misspelt option would be lost without a word."""
    register_default_plugins()
    board = dashboard()
    read = json.loads(JSONEncoder(sort_keys=True, indent=1).encode(Dashboard.from_json(board)))
    assert set(_lost(board, read)) == {f"/templating/list/{number}/definition" for number in (1, 2, 3)}  # of its editor


def _lost(wanted: Any, found: Any, path: str = "") -> Iterator[str]:
    """Yield where `found` lacks, or has otherwise, what is in `wanted`."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        for key, value in wanted.items():
            yield from _lost(value, found[key], f"{path}/{key}") if key in found else [f"{path}/{key}"]
    elif isinstance(wanted, list) and isinstance(found, list) and len(wanted) == len(found):
        for number, (left, right) in enumerate(zip(wanted, found, strict=True)):
            yield from _lost(left, right, f"{path}/{number}")
    elif wanted != found:
        yield path


def test_every_panel_asks_the_chosen_data_source() -> None:
    board = dashboard()
    (variable,) = [one for one in board["templating"]["list"] if one["type"] == "datasource"]
    assert (variable["name"], variable["query"]) == ("datasource", "prometheus")
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    assert len(panels) > 20
    for panel in panels:
        assert panel["datasource"] == chosen, panel["title"]
        assert panel["targets"], panel["title"]
        assert [target["datasource"] for target in panel["targets"]] == [chosen] * len(panel["targets"])
        refs = [target["refId"] for target in panel["targets"]]
        assert len(refs) == len(set(refs)), panel["title"]
        assert {"defaults", "overrides"} == set(panel["fieldConfig"])
    for one in board["templating"]["list"]:
        assert one["type"] == "datasource" or one["datasource"] == chosen


def test_panels_do_not_overlap() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in dashboard()["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert taken.setdefault((x, y), panel["title"]) == panel["title"], (panel["title"], taken[x, y])


def test_variables_that_are_used_are_there() -> None:
    names = {one["name"] for one in dashboard()["templating"]["list"]}
    used = {name for expression in expressions() for name in re.findall(r"\$([a-z]+)", expression)}
    assert used == names - {"datasource"}


def test_every_metric_that_is_asked_for_exists() -> None:
    asked = named() - {"process_cpu_seconds_total", "process_resident_memory_bytes", "process_open_fds"}
    assert asked <= NAMES | {family.exposed for family in FAMILIES}
    assert len(asked) > 25


@pytest.mark.parametrize("expression", sorted(set(expressions())))
def test_every_label_that_is_asked_for_exists(expression: str) -> None:
    asked = set(re.findall(r'([a-z_]+)(?:=~?|!=)"', expression))
    for grouping in re.findall(r"(?:by|on|group_left) \(([^)]*)\)", expression):
        asked |= {label.strip() for label in grouping.split(",")}
    assert asked <= LABELS


def test_alerts_say_what_is_in_danger() -> None:
    rules = alerts()
    assert len({rule["alert"] for rule in rules}) == len(rules) > 5
    for rule in rules:
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert set(rule["annotations"]) == {"summary", "description"}
        assert "$labels.instance" in rule["annotations"]["summary"]


def test_the_scrape_configuration_loads_the_rules() -> None:
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    assert config["rule_files"] == [RULES.name]
    (job,) = config["scrape_configs"]
    assert job["job_name"] == "netfence"
    assert any('job="netfence"' in rule["expr"] for rule in alerts())
