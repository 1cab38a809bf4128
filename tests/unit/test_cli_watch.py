"""`netfenced watch` against a real server on a real socket, with a daemon that has no kernel."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import click
import pytest
import structlog
from click.testing import Result
from tests.unit.api.fake import VIEW, Background, FakeDaemon, background
from tests.unit.api.test_watch import FLOW
from tests.unit.test_cli import NETFENCED, run, said

from netfence.api.views import FlowView
from netfence.cli_watch import Filter, Known, Loss, watch
from netfence.errors import UnavailableError
from netfence.policy.prefix import parse_cidr

PACKET = replace(FLOW, lost=0)
QUERY = replace(PACKET, kind="dns", verdict="pass", reason="allow_rule", destination="AAAA", domain="pypi.org")


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Background]:
    # Its log would go to the stdout that the runner captures from this same process.
    with structlog.testing.capture_logs(), background(FakeDaemon([VIEW]), tmp_path / "nf.sock") as made:
        yield made


@contextmanager
def telling(daemon: Background, *views: FlowView, end: bool = True) -> Iterator[None]:
    """Tell what is decided when a command watches."""
    thread = threading.Thread(target=lambda: daemon.run(daemon.port.tell(*views, end=end)))
    thread.start()
    yield
    thread.join()


def watched(daemon: Background, views: Sequence[FlowView], *args: str) -> Result:
    with telling(daemon, *views):
        return run(daemon.path, "watch", *args)


def documents(result: Result) -> list[dict[str, object]]:
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


# what is shown --------------------------------------------------------------------------------------------------------


def test_a_line_for_each_event_with_target_and_metadata(daemon: Background) -> None:
    result = watched(daemon, [PACKET, QUERY], "--id", "id-0")
    assert result.exit_code == 0
    assert result.stderr == "netfenced: watch: attachment id-0 left\n"
    packet, query = result.stdout.splitlines()
    who = "id-0 veth0 tenant=acme"
    assert packet.endswith(
        f"drop        {who}  udp 10.0.0.2:4000 -> 203.0.113.9:53 (x.test)  deny_rule (deny 203.0.113.0/24)"
    )
    assert query.endswith(
        f"pass        {who}  dns AAAA pypi.org from 10.0.0.2:4000/udp  allow_rule (deny 203.0.113.0/24)"
    )
    assert "\x1b" not in result.stdout


def test_json_is_one_document_a_line(daemon: Background) -> None:
    result = watched(daemon, [PACKET, QUERY], "--json")
    packet, query = documents(result)
    assert (packet["id"], packet["target"], packet["metadata"]) == ("id-0", "veth0", {"tenant": "acme"})
    assert (packet["destination"], packet["qtype"], query["qtype"]) == ("203.0.113.9:53", "", "AAAA")


def test_count_ends_it(daemon: Background) -> None:
    with telling(daemon, PACKET, QUERY, PACKET, end=False):
        result = run(daemon.path, "watch", "--count", "2")
    assert (result.exit_code, result.stderr, len(result.stdout.splitlines())) == (0, "", 2)


def test_an_attachment_that_left_is_shown_by_its_id_alone(daemon: Background) -> None:
    result = watched(daemon, [replace(PACKET, id="gone")])
    assert "  drop        gone  udp " in result.stdout


def test_what_others_called_things_cannot_steer_the_terminal(daemon: Background) -> None:
    daemon.port.views = [replace(VIEW, target="a\x1b[2J", metadata={"k": "v\nnetfenced: all is well"})]
    result = watched(daemon, [replace(QUERY, domain="x\x1b]0;owned\x07.test")])
    assert len(result.stdout.splitlines()) == 1
    assert result.stdout[:-1].isprintable()


def test_colours_on_a_terminal_alone(daemon: Background) -> None:
    def on_a_terminal(**env: str) -> str:
        ours, theirs = pty.openpty()
        with telling(daemon, PACKET):
            done = subprocess.run(
                [NETFENCED, "-s", daemon.path, "watch", "--count", "1"],
                stdout=theirs,
                env={**os.environ, "TERM": "xterm", **env},
                check=False,
                timeout=30,
            )
        os.close(theirs)
        text = os.read(ours, 65536).decode()
        os.close(ours)
        assert done.returncode == 0
        return text

    assert "\x1b[31m\x1b[1mdrop" in on_a_terminal()
    assert "\x1b" not in on_a_terminal(NO_COLOR="1")


# what was lost --------------------------------------------------------------------------------------------------------


def test_loss_is_told_beside_the_lines(daemon: Background) -> None:
    result = watched(daemon, [PACKET, replace(PACKET, lost=41), replace(PACKET, lost=1)], "--kind", "packet")
    assert len(result.stdout.splitlines()) == 3
    told = [line for line in result.stderr.splitlines() if "lost" in line]
    assert told == [
        "netfenced: watch: 41 events were lost: more happens than can be shown; narrow it with --id or --verdict",
        "netfenced: watch: 1 event was lost: more happens than can be shown; narrow it with --id or --verdict",
    ]


def test_loss_that_is_told_by_itself_is_no_event(daemon: Background) -> None:
    alone = FlowView(time=PACKET.time, id="", kind="lost", verdict="", reason="", lost=7)
    result = watched(daemon, [PACKET, alone, PACKET], "--count", "2", "--to", "203.0.113.0/24")
    assert len(result.stdout.splitlines()) == 2
    assert "7 events were lost" in result.stderr
    result = watched(daemon, [PACKET, alone, PACKET], "--json", "--count", "2", "--kind", "packet")
    assert [(one["kind"], one["lost"]) for one in documents(result)] == [("packet", 0), ("lost", 7), ("packet", 0)]


def test_loss_before_events_that_are_not_shown_is_told_with_the_next_that_is(daemon: Background) -> None:
    result = watched(
        daemon, [replace(PACKET, lost=5), replace(PACKET, lost=2), QUERY, QUERY], "--json", "--kind", "dns"
    )
    assert [document["lost"] for document in documents(result)] == [7, 0]
    assert "lost" not in result.stderr


def test_loss_is_told_no_more_than_once_a_second(capsys: pytest.CaptureFixture[str]) -> None:
    now = 10.0
    loss = Loss(told=True, clock=lambda: now)
    for _ in range(5):
        loss.add(2)
    now = 11.5
    loss.add(0)
    loss.tell()
    assert [line.split()[2] for line in capsys.readouterr().err.splitlines()] == ["2", "8"]


# filters --------------------------------------------------------------------------------------------------------------


def test_id_and_verdicts_are_the_daemons_to_filter(daemon: Background) -> None:
    daemon.port.views = [VIEW, replace(VIEW, id="id-1")]
    views = [PACKET, replace(PACKET, id="id-1"), replace(PACKET, verdict="would_drop"), QUERY]
    result = watched(daemon, views, "--id", "id-0", "--verdict", "drop", "--verdict", "pass", "--json")
    assert [(one["id"], one["verdict"]) for one in documents(result)] == [("id-0", "drop"), ("id-0", "pass")]


V6 = replace(PACKET, destination="[2001:db8::1]:53", domain="")
BARE6, BARE4 = replace(V6, destination="2001:db8::2"), replace(PACKET, destination="203.0.113.20", protocol="icmp")
UNREAD = replace(PACKET, destination="", source="", protocol="", domain="")
EVENTS = {"packet": PACKET, "query": QUERY, "v6": V6, "bare6": BARE6, "bare4": BARE4, "unread": UNREAD}


@pytest.mark.parametrize(
    ("args", "shown"),
    [
        (["--kind", "dns"], ["query"]),
        (["--kind", "packet", "--protocol", "ICMP"], ["bare4"]),
        (["--protocol", "1"], ["bare4"]),
        (["--to", "203.0.113.8/30"], ["packet"]),
        (["--to", "203.0.113.20"], ["bare4"]),
        (["--to", "2001:db8::/32"], ["v6", "bare6"]),
        (["--to", "::/0"], ["v6", "bare6"]),
        (["--name", "*.TEST"], ["packet", "bare4"]),
        (["--name", "pypi.org."], ["query"]),
        (["--name", "pypi"], []),
    ],
    ids=" ".join,
)
def test_filters(daemon: Background, args: list[str], shown: list[str]) -> None:
    result = watched(daemon, list(EVENTS.values()), "--json", *args)
    names = {(view.kind, view.destination, view.domain): name for name, view in EVENTS.items()}
    found = documents(result)
    assert [names[one["kind"], one["qtype"] or one["destination"], one["domain"]] for one in found] == shown  # type: ignore[index]


BAD_USAGE = {
    "verdict": (["--verdict", "nope"], "'drop', 'pass', 'would_drop'"),
    "kind": (["--kind", "tcp"], "'packet', 'dns'"),
    "to": (["--to", "10.0.0"], "short forms are not supported"),
    "to-length": (["--to", "10.0.0.0/33"], "prefix length must be"),
    "to-name": (["--to", "a.org"], "is not a CIDR or address"),
    "protocol": (["--protocol", "ip\x1b"], "is no protocol; use tcp, udp, icmp, icmpv6, or an IP protocol's number"),
    "protocol-number": (["--protocol", "256"], "is no protocol"),
    "name-empty": (["--name", "."], "it is empty"),
    "id-empty": (["--id", ""], "leave it out for all attachments"),
    "count": (["--count", "0"], "x>=1"),
    "passed-packets": (["--kind", "packet", "--verdict", "pass"], "passed packets make no event"),
    "to-of-queries": (["--kind", "dns", "--to", "10.0.0.0/8"], "--to is about packets that did not pass"),
    "to-of-passes": (["--verdict", "pass", "--to", "10.0.0.0/8"], "--to is about packets that did not pass"),
    "argument": (["veth0"], "unexpected extra argument"),
}


@pytest.mark.parametrize("name", BAD_USAGE)
def test_bad_usage_is_2(name: str, tmp_path: Path) -> None:
    args, words = BAD_USAGE[name]
    text = said(run(tmp_path / "no.sock", "watch", *args), 2)
    assert words in text
    assert "`netfenced watch --help`" in text
    assert text.count("\n") == 1


def test_places_that_are_no_addresses_are_in_no_prefix() -> None:
    wanted = Filter(to=parse_cidr("0.0.0.0/0"))

    class Event:
        kind, destination = "packet", "a:b:c"

    assert not wanted.shows(Event())


# attachments ----------------------------------------------------------------------------------------------------------


def test_attachments_are_asked_for_when_an_unknown_one_appears_but_not_at_every_event() -> None:
    now, asked = 0.0, 0

    class Client:
        def list_all(self) -> list[object]:
            nonlocal asked
            asked += 1
            from netfence.api.messages import attachment_message  # noqa: PLC0415

            return [attachment_message(VIEW)]

    known = Known(Client(), clock=lambda: now)  # type: ignore[arg-type]
    assert [known.who("id-0").target, known.who("id-0").target, known.who("gone").target] == ["veth0", "veth0", ""]
    assert asked == 1
    now = 1.5
    assert (known.who("id-0").target, asked) == ("veth0", 1)
    assert (known.who("gone").target, asked) == ("", 2)
    now = 100.0
    known.who("id-0")
    assert asked == 3


# how it ends ----------------------------------------------------------------------------------------------------------


def test_an_unknown_id_is_1(daemon: Background) -> None:
    text = said(run(daemon.path, "watch", "--id", "nope\x1b"), 1)
    assert text == "netfenced: watch: no attachment nope\\x1b; see `netfenced list`\n"


@pytest.mark.parametrize("how", ["stops", "dies"])
def test_a_daemon_that_goes_is_3(daemon: Background, how: str) -> None:
    command = subprocess.Popen([NETFENCED, "-s", daemon.path, "watch"], stderr=subprocess.PIPE, text=True)
    try:
        daemon.run(daemon.port.tell())
        if how == "stops":
            failure = UnavailableError("watch: the daemon is stopping")
            daemon.run(_end(daemon, failure))
        else:
            daemon.run(daemon.server.close(0))
        _, stderr = command.communicate(timeout=20)
    finally:
        command.kill()
        command.wait()
    assert command.returncode == 3
    said_ = "watch: the daemon is stopping" if how == "stops" else f"call the daemon on {daemon.path}: "
    assert stderr.startswith(f"netfenced: {said_}")
    assert stderr.count("\n") == 1


async def _end(daemon: Background, failure: UnavailableError) -> None:
    for watcher in daemon.port.watchers:
        watcher.end(failure)


def until_ctrl_c(daemon: Background, *views: FlowView, args: tuple[str, ...] = ()) -> tuple[int, str, str]:
    """Interrupt `watch` when it has shown all `views`; return its status, and what it printed besides."""
    command = subprocess.Popen(
        [NETFENCED, "-s", daemon.path, "watch", *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        daemon.run(daemon.port.tell(*views))
        assert command.stdout is not None
        for _ in views:
            assert command.stdout.readline()
        command.send_signal(signal.SIGINT)
        stdout, stderr = command.communicate(timeout=20)
    finally:
        command.kill()
        command.wait()
    return command.returncode, stdout, stderr


@pytest.mark.parametrize("json_", [False, True], ids=["lines", "json"])
def test_ctrl_c_ends_it_quietly(daemon: Background, *, json_: bool) -> None:
    assert until_ctrl_c(daemon, PACKET, args=("--json",) if json_ else ()) == (0, "", "")


def test_ctrl_c_tells_what_was_lost_and_not_yet_told(daemon: Background) -> None:
    _, _, stderr = until_ctrl_c(daemon, replace(PACKET, lost=3), replace(PACKET, lost=4), PACKET)
    assert [int(line.split()[2]) for line in stderr.splitlines()] == [3, 4]


def test_a_pipe_that_nobody_reads_any_more_ends_it_quietly(daemon: Background) -> None:
    command = subprocess.Popen(
        [NETFENCED, "-s", daemon.path, "watch"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        daemon.run(daemon.port.tell(PACKET))
        assert command.stdout is not None
        assert command.stdout.readline()
        command.stdout.close()
        for _ in range(200):  # what is written after the close ends it
            if daemon.port.watchers:
                daemon.run(daemon.port.tell(PACKET))
            with suppress(subprocess.TimeoutExpired):
                command.wait(0.1)
                break
        assert command.stderr is not None
        stderr = command.stderr.read()
        command.stderr.close()
    finally:
        command.kill()
        command.wait()
    assert (command.returncode, stderr) == (0, "")


def test_no_daemon_is_3(tmp_path: Path) -> None:
    assert "netfenced start" in said(run(tmp_path / "no.sock", "watch"), 3)


def test_help_is_there_without_grpc() -> None:
    code = (
        "import sys; from netfence.cli import cli\ntry: cli(['watch', '--help'])\nfinally: print('grpc' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=30)
    assert done.stdout.endswith("False\n"), done.stdout + done.stderr
    assert isinstance(watch, click.Command)
