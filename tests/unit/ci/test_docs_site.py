"""The documentation: no warning, nothing loaded from elsewhere, nothing left out, no link that leads nowhere."""

from __future__ import annotations

import ast
import html
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import click
import pytest
import yaml

import docs_reference
from netfence import flows
from netfence.api import service
from netfence.cli import cli
from netfence.config import KEYS, ControlPlane, Dns
from netfence.control import policyfile, queries
from netfence.dataplane import target
from netfence.dns import limits as dns_limits
from netfence.policy import limits as policy_limits
from netfence.policy.modes import Reason

ROOT = Path(__file__).resolve().parents[3]
DOCS = ROOT / "docs"
LEVELS = {"info", "warning", "error", "critical", "exception"}
LINK = re.compile(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]*))?\)")
# A browser follows these by itself; a link in the text waits for the reader.
LOADED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src"}
LINKED = {"canonical", "next", "prev", "alternate"}  # kinds of <link> that load nothing

# What each guide is there for, by its headings; what is called otherwise one day is called so here too.
CHAPTERS = {
    "quick-start.md": ("1. Get it", "3. Say what it may reach", "6. See it drop", "7. Watch it, and ask why"),
    "install.md": ("Debian package", "pip", "Container", "Upgrade", "Uninstall"),
    "concepts.md": ("The parts", "Modes", "Leases", "Start mode", "When the daemon dies"),
    "policy.md": (
        "The file",
        "From audit to allowlist",
        "Recipe: a CI runner",
        "Recipe: an AI agent in a Firecracker tap",
        "Recipe: a Docker container by its cgroup",
        "Recipe: a Kubernetes node",
    ),
    "recipes.md": ("A VM behind a tap", "A container, fenced by its cgroup", "A container, fenced by its veth"),
    "control-plane.md": ("An afternoon with the kit", "Without code", "Without the kit"),
    "operations.md": ("Under systemd", "Upgrade", "Crash", "Limits", "Why is something dropped?", "Stop for good"),
    "security-model.md": ("Who is who", "What is promised", "What always passes"),
}
UNDEFENDED = {
    "raw packets": "AF_PACKET and AF_XDP senders",
    "shared addresses": "can speak to every name served there",
    "grace of old connections": "TCP packets without SYN keep passing to an address whose lease ran out",
    "tunnels in DNS": "the labels below an allowed",
    "other ways out": "devices passed through to the workload",
    "root": "can detach, unpin or replace anything",
}
MEASURED = (  # chapters of performance.md
    "Where we are behind",
    "Packets",
    "XDP",
    "DNS",
    "Attach and change",
    "Start, restart, memory",
    "Watching and metrics",
    "Measured elsewhere",
)
NOT_BY_XDP = {
    "what leaves": "direction `host`",
    "no Ethernet header": "no Ethernet header",
    "a bond's members": "a member of a bond",
    "large MTU": "an MTU above some 3,500 bytes",
    "outer tag": "with the outer VLAN tag",
    "to be segmented": "a frame still to be segmented",
    "tags out of the data": "a tag kept out of the data",
}


def constant(name: str) -> int:
    """Read a limit of the BPF programs."""
    ((value,),) = (re.findall(rf"#define NF_{name} (\d+)\b", (ROOT / "bpf/layout.h").read_text()),)
    return int(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site as nox does."""
    directory = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(directory)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return directory


class Loads(HTMLParser):
    """Collects what a page makes a browser load."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "link" and given.get("rel") in LINKED:
            return
        if address := given.get(LOADED.get(tag, ""), ""):
            self.addresses.append(address)


def test_the_site_asks_nobody_for_anything(site: Path) -> None:
    pages = [*site.rglob("*.html")]
    assert len(pages) > 20
    for page in pages:
        loads = Loads()
        loads.feed(page.read_text())
        assert loads.addresses
        assert [each for each in loads.addresses if urlsplit(each).netloc] == [], page.name
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*['\"]?(https?:)?//", sheet.read_text()), sheet.name


def text_of(page: Path) -> str:
    """Return a page's text without its tags."""
    return html.unescape(re.sub(r"<[^>]+>", "", page.read_text()))


def commands(command: click.Command, path: str) -> Iterator[tuple[str, click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        for name, below in command.commands.items():
            yield from commands(below, f"{path} {name}")


def test_every_command_and_option_is_in_the_reference(site: Path) -> None:
    page = (site / "reference/cli.html").read_text()
    told = [*commands(cli, "netfenced")]
    assert len(told) > 10
    for path, command in told:
        start = page.find(f'id="{path.replace(" ", "-")}"')
        assert start >= 0, path
        section = page[start:].partition("<h2")[0]
        for parameter in command.params:
            names = (
                parameter.opts
                if isinstance(parameter, click.Option)
                else [parameter.make_metavar(click.Context(command))]
            )
            missing = [name for name in names if html.escape(name) not in section]
            assert not missing, f"{path}: {missing}"


def test_every_key_is_in_the_reference(site: Path) -> None:
    page = (site / "reference/configuration.html").read_text()
    for key in KEYS.leaves:
        start = page.find(f'id="{key.replace(".", "")}"')
        assert start >= 0, key
        said = re.sub(r"<[^>]+>", "", page[start:].partition("<h3")[0].partition("</h3>")[2])
        assert len(said.partition("Default:")[0].split()) > 1, f"{key}: nothing is said of it"
        assert f"NETFENCE_{key.replace('.', '__').upper()}" in said


@pytest.mark.parametrize(("page", "proto"), [("api", "daemon"), ("api", "types"), ("control-api", "control")])
def test_every_element_of_the_contract_is_in_the_reference(site: Path, page: str, proto: str) -> None:
    text = text_of(site / f"reference/{page}.html")
    source = (ROOT / f"proto/netfence/v1/{proto}.proto").read_text()
    names = re.findall(r"^\s*(?:message|enum|service|rpc) (\w+)|^\s+[\w<>, .]*?(\w+) = \d+;", source, re.MULTILINE)
    assert len(names) > 15
    for name in {one or other for one, other in names}:
        assert re.search(rf"\b{name}\b", text), name


def logged() -> Iterator[tuple[str, str]]:
    """Yield file and event of everything that the daemon logs by a word that stands there."""
    for path in (ROOT / "src/netfence").rglob("*.py"):
        if "controlplane" in path.parts:  # the kit: another process, of whoever uses it
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LEVELS):
                continue
            if node.args and isinstance(node.args[0], ast.Constant) and node.keywords:
                yield path.name, str(node.args[0].value)


def test_every_log_event_is_in_the_reference() -> None:
    events = [*logged()]
    assert len(events) > 60
    page = (DOCS / "reference/log-events.md").read_text()
    missing = {f"{file}: {event}" for file, event in events if f"`{event}`" not in page}
    assert not missing, f"write them into docs/reference/log-events.md: {sorted(missing)}"


def test_every_reason_and_sentence_is_in_the_semantics() -> None:
    page = (DOCS / "reference/semantics.md").read_text()
    assert [reason.name for reason in Reason if f"`{reason.name.lower()}`" not in page] == []
    assert re.findall(r"^\*\*(\d+)\.", page, re.MULTILINE) == [str(number) for number in range(1, 28)]


def test_every_decision_is_in_the_index(site: Path) -> None:
    page = (site / "decisions/index.html").read_text()
    files = [path.stem for path in (DOCS / "decisions").glob("0*.md")]
    assert len(files) > 10
    assert [name for name in files if f"{name}.html" not in page] == []


def chapter(page: str, title: str) -> str:
    """Return what stands under a heading, up to the next of its level; empty where there is none of that name."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)
    return found[1] if found else ""


@pytest.mark.parametrize(("page", "title"), [(page, title) for page, titles in CHAPTERS.items() for title in titles])
def test_the_guides_tell_what_they_are_there_for(page: str, title: str) -> None:
    assert len(chapter(page, title).split()) > 25


@pytest.mark.parametrize("words", UNDEFENDED.values(), ids=UNDEFENDED)
def test_what_is_not_defended_is_said(words: str) -> None:
    text = chapter("security-model.md", "What is not promised, and what to do about it")
    points = re.split(r"^- \*\*", text, flags=re.MULTILINE)
    said = [point for point in points if words.lower() in " ".join(point.split()).lower()]
    assert len(said) == 1
    assert len(said[0].split()) > 15


@pytest.mark.parametrize("title", MEASURED)
def test_performance_is_told_in_figures(title: str) -> None:
    rows = re.findall(r"^\|[^|]+\|.*\d.*\|$", chapter("performance.md", title), re.MULTILINE)
    assert rows


@pytest.mark.parametrize("peer", ["dnsmasq", "unbound"])
def test_where_we_are_behind_is_said(peer: str) -> None:
    text = chapter("performance.md", "Where we are behind")
    assert peer in text
    behind = {row.split("|")[1].strip() for row in text.splitlines() if re.search(r"^\|.*\*\*\d\.\d+\*\*", row)}
    states = ("cached", "uncached", "refused")
    assert {f"{protocol}, {state}" for protocol in ("UDP", "TCP") for state in states} <= behind


@pytest.mark.parametrize("words", NOT_BY_XDP.values(), ids=NOT_BY_XDP)
def test_what_xdp_cannot_have_is_said(words: str) -> None:
    rows = re.findall(r"^\| (.+) \| (.+) \|$", chapter("performance.md", "What XDP cannot have"), re.MULTILINE)
    assert len([said for row in rows if words in (said := " ".join(row))]) == 1


def test_every_kind_that_xdp_is_refused_for_is_said() -> None:
    said = chapter("performance.md", "What XDP cannot have").lower()
    refused = {*target._KIND_DIRECTION, "bridge", "macvlan", "ifb"} - target._XDP_KINDS
    assert {"netkit", "macvtap"} < refused
    assert [kind for kind in sorted(refused) if kind not in said] == []


LIMITS = {  # the first words of a row in operations.md → figures that it must have, in the order of the row
    "attachments": [policy_limits.MAX_ATTACHMENTS],
    "DNS ports": [],
    "CIDR rules of one attachment": [policy_limits.MAX_CIDR_RULES],
    "domain rules of one attachment": [policy_limits.MAX_DOMAIN_RULES],
    "CIDRs with a TTL inside one another": [policy_limits.MAX_TTL_NESTING],
    "leases of one attachment": [Dns().max_leases],
    "leases of all": [Dns().max_leases_total],
    "queries a second": [],
    "queries waiting": [dns_limits.MAX_OUTSTANDING],
    "questions to upstreams": [dns_limits.MAX_FLIGHTS, dns_limits.MAX_FREE_FLIGHTS],
    "questions to the control plane": [queries.MAX_QUERIES, queries.MAX_FREE],
    "TCP connections to a DNS server": [dns_limits.MAX_TCP_CONNECTIONS],
    "connections begun from outside": [constant("INBOUND_PER_SLOT"), constant("INBOUND")],
    "destinations remembered in audit mode": [constant("SEEN_PER_SLOT"), constant("SEEN")],
    "streams of `watch` and `top`": [flows.MAX_WATCHERS],
    "calls of the API": [service.MAX_CALLS],
    "message of the control plane": [ControlPlane().max_message_size >> 20],
    "policy file": [policyfile.MAX_FILE_BYTES >> 20],
}


def test_the_limits_are_those_of_the_code() -> None:
    text = (DOCS / "operations.md").read_text(encoding="utf-8").partition("\n## Limits\n")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == len(LIMITS)
    for start, figures in LIMITS.items():
        ((_, limit, _),) = (row for row in rows if row[0].startswith(start))
        told = [int(figure.replace(",", "")) for figure in re.findall(r"(?<![\w.])\d[\d,]*", limit)]
        assert told[: len(figures)] == figures, start
    assert f"`dns.port_min` to `dns.port_max`, {Dns().port_min} to {Dns().port_max}: " in text


def test_the_build_lets_no_warning_pass() -> None:
    """Also where mkdocs is called without --strict; of these faults it would not even warn by itself."""
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert settings["strict"] is True
    kinds = settings["validation"]
    assert {level for faults in kinds.values() for level in faults.values()} == {"warn"}
    assert set(kinds["nav"]) >= {"omitted_files", "not_found"}
    assert set(kinds["links"]) >= {"not_found", "anchors", "unrecognized_links"}


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as a forge and mkdocs make them."""
    titles = re.findall(r"^#+ (.+)$", docs_reference.fill(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower().replace("`", "")).strip().replace(" ", "-") for title in titles}


def pages() -> list[Path]:
    return [*sorted(DOCS.rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]


@pytest.mark.parametrize("page", pages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for address, anchor in LINK.findall(text):
        target = (page.parent / unquote(address)).resolve() if address else page
        assert target.exists(), address
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{address}#{anchor}"
