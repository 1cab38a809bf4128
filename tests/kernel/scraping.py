"""A daemon's metrics as Prometheus reads them: one GET, parsed, and refused where a series stands there twice."""

from __future__ import annotations

import collections
import http.client
from collections.abc import Callable, Mapping

import yaml
from prometheus_client.parser import text_string_to_metric_families

from harness.daemon import Netfenced
from harness.deadline import DEFAULT_TIMEOUT_S, wait_for

CONFIG = {"metrics": {"listen": "127.0.0.1:9100"}}
Labels = frozenset[tuple[str, str]]


class Scrape:
    """One page: the value of every series, and the families with their types."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.types: dict[str, str] = {}
        self._values: dict[str, dict[Labels, float]] = collections.defaultdict(dict)
        for family in text_string_to_metric_families(text):
            assert family.name not in self.types, f"{family.name} stands there twice"
            assert family.documentation, family.name
            self.types[family.name] = family.type
            for sample in family.samples:
                labels = frozenset(sample.labels.items())
                assert labels not in self._values[sample.name], f"{sample.name}{sample.labels} stands there twice"
                self._values[sample.name][labels] = sample.value

    @property
    def names(self) -> set[str]:
        """Names of series, suffixes included, and of families that have none at the moment."""
        empty = {line.split()[2] for line in self.text.splitlines() if line.startswith("# TYPE ")}
        return set(self._values) | empty

    def series(self, name: str, **labels: str) -> list[Mapping[str, str]]:
        """Give the labels of every series of that name that has these."""
        wanted = frozenset(labels.items())
        return [dict(found) for found in self._values.get(name, {}) if wanted <= found]

    def sum(self, name: str, **labels: str) -> float:
        """Add up all series of that name with these labels; 0 where there is none."""
        wanted = frozenset(labels.items())
        return sum(value for found, value in self._values.get(name, {}).items() if wanted <= found)


def place_of(daemon: Netfenced) -> tuple[str, int]:
    """Tell where a client on the daemon's host finds its metrics."""
    host, _, port = yaml.safe_load(daemon.config_file.read_text())["metrics"]["listen"].rpartition(":")
    return str(host).strip("[]"), int(port)


def get(daemon: Netfenced, path: str = "/metrics", method: str = "GET") -> tuple[int, Mapping[str, str], str]:
    """Ask on the daemon's host; return status, headers (names in lower case) and body."""
    with daemon.netns.inside():
        connection = http.client.HTTPConnection(*place_of(daemon), timeout=DEFAULT_TIMEOUT_S)
        connection.connect()
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        headers = {name.lower(): value for name, value in answer.getheaders()}
        return answer.status, headers, answer.read().decode()
    finally:
        connection.close()


def scrape(daemon: Netfenced) -> Scrape:
    """Have one page."""
    status, headers, body = get(daemon)
    assert status == 200
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    return Scrape(body)


def scrape_until(
    daemon: Netfenced, condition: Callable[[Scrape], object], what: str, timeout_s: float = DEFAULT_TIMEOUT_S
) -> Scrape:
    """Scrape until a page fulfils the condition (a page is handed out again for a moment); return that page."""

    def fulfilled() -> Scrape | None:
        page = scrape(daemon)
        return page if condition(page) else None

    found = wait_for(fulfilled, what, timeout_s)
    assert found is not None
    return found
