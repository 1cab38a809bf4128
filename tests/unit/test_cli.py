"""The command line against a real server on a real socket, with a daemon that has no kernel."""

from __future__ import annotations

import itertools
import json
import os
import pty
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import click
import pytest
import structlog
from click.testing import CliRunner, Result
from tests.unit.api.fake import HASH, STATUS, VIEW, Background, FakeDaemon, background, many

from netfence import __version__
from netfence.cli import cli
from netfence.command import COMPLETE_S
from netfence.errors import ExistsError, InvalidError, UnavailableError

NETFENCED = Path(sys.executable).with_name("netfenced")


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Background]:
    # Its log would go to the stdout that the runner captures from this same process.
    with structlog.testing.capture_logs(), background(FakeDaemon(), tmp_path / "nf.sock") as made:
        yield made


def run(socket: Path | None, *args: str, env: dict[str, str] | None = None) -> Result:
    given = [] if socket is None else ["--socket", str(socket)]
    return CliRunner().invoke(cli, [*given, *args], env={"NETFENCE_SOCKET": None, **(env or {})}, prog_name="netfenced")


def said(result: Result, status: int) -> str:
    """Return stderr of a command that failed with that status, after checking its form."""
    assert result.exit_code == status, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert lines
    assert all(line.startswith("netfenced: ") for line in lines)
    assert "Traceback" not in result.stderr
    return result.stderr


# attach ---------------------------------------------------------------------------------------------------------------


def test_attach_prints_id_and_dns_address(daemon: Background) -> None:
    result = run(daemon.path, "attach", "-i", "veth0", "--metadata", "tenant=acme,vm=7", "--metadata", "note=a=b")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == "id: id-0\ndns address: 127.0.0.1:11000\n"
    (spec,) = daemon.port.specs
    assert (spec.interface, spec.cgroup, spec.hook, spec.direction) == ("veth0", None, "auto", "auto")
    assert spec.metadata == {"tenant": "acme", "vm": "7", "note": "a=b"}


def test_attach_json(daemon: Background) -> None:
    result = run(daemon.path, "attach", "-i", "eth0", "--hook", "tc", "--direction", "host", "--json")
    assert json.loads(result.stdout) == {"id": "id-0", "dns_address": "127.0.0.1:11000"}
    assert (daemon.port.specs[0].hook, daemon.port.specs[0].direction) == ("tc", "host")


def test_attach_makes_a_cgroup_path_absolute(
    daemon: Background, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(daemon.path, "attach", "--cgroup", "../box/./a").exit_code == 0
    assert daemon.port.specs[0].cgroup == str(tmp_path.parent / "box/a")


BAD_USAGE = {
    "no-command": ([], "missing command"),
    "unknown-command": (["fence"], "no such command"),
    "unknown-option": (["attach", "--nope"], "no such option"),
    "no-target": (["attach"], "exactly one of --interface and --cgroup"),
    "both-targets": (["attach", "-i", "v", "-g", "/c"], "exactly one of --interface and --cgroup"),
    "cgroup-hook": (["attach", "-g", "/c", "--hook", "tc"], "for interfaces"),
    "unknown-hook": (["attach", "-i", "v", "--hook", "nft"], "'auto', 'tc', 'xdp'"),
    "metadata-no-equals": (["attach", "-i", "v", "--metadata", "a=1,b"], "'b' is not of the form key=value"),
    "metadata-empty-key": (["attach", "-i", "v", "--metadata", "=1"], "'=1' is not of the form key=value"),
    "metadata-empty": (["attach", "-i", "v", "--metadata", ""], "'' is not of the form key=value"),
    "metadata-twice": (["attach", "-i", "v", "--metadata", "a=1", "--metadata", "a=2"], "key 'a' is given twice"),
    "metadata-long-key": (["attach", "-i", "v", "--metadata", "k" * 64 + "=1"], "64 bytes long; at most 63"),
    "metadata-control": (["attach", "-i", "v", "--metadata", "a=\x1b[2J"], "cannot be printed"),
    "metadata-many": (["attach", "-i", "v", "--metadata", ",".join(f"k{n}=" for n in range(65))], "at most 64"),
    "detach-no-id": (["detach"], "missing option '--id'"),
    "page-size": (["list", "--page-size", "0"], "1<=x<=1000"),
    "config-missing": (["start", "--config", "/nonexistent"], "does not exist"),
    "policy-missing": (["policy", "check", "/nonexistent"], "does not exist"),
}


@pytest.mark.parametrize(("args", "words"), BAD_USAGE.values(), ids=BAD_USAGE)
def test_bad_usage_is_2_and_asks_no_daemon(args: list[str], words: str, daemon: Background) -> None:
    result = run(daemon.path, *args)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert words.lower() in result.stderr.lower()
    if args:
        assert result.stderr.startswith(f"netfenced: {args[0] if args[0] != 'fence' else ''}")
        assert "--help`" in result.stderr
    assert "\x1b" not in result.stderr
    assert daemon.port.specs == []


def test_nothing_at_all_shows_the_help() -> None:
    result = run(None)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Usage: netfenced" in result.stderr
    assert "Examples:" in result.stderr


@pytest.mark.parametrize(
    "failure",
    [
        ExistsError("attach veth0: attached already as id-7; detach that first"),
        # UNAVAILABLE by the daemon's word is a failed operation, not an unreachable daemon
        UnavailableError("attach veth0: no control plane at 192.0.2.1:8443; start it or set policy_file"),
        InvalidError(["fault one", "fault two"]),
    ],
    ids=lambda failure: failure.code,
)
def test_a_refused_operation_is_1_with_the_daemons_words(failure: Exception, daemon: Background) -> None:
    daemon.port.failure = failure
    assert said(run(daemon.path, "attach", "-i", "veth0"), 1) == f"netfenced: {failure}\n"


def test_what_a_daemon_says_cannot_steer_the_terminal(daemon: Background) -> None:
    daemon.port.failure = ExistsError("attach x\x1b]0;owned\x07\nnetfenced: all is well")
    assert said(run(daemon.path, "attach", "-i", "x"), 1).count("\n") == 1


def test_a_defect_of_the_daemon_is_1(daemon: Background) -> None:
    daemon.port.failure = KeyError("secret")
    words = said(run(daemon.path, "attach", "-i", "veth0"), 1)
    assert "internal error" in words
    assert "secret" not in words


# no daemon ------------------------------------------------------------------------------------------------------------

CLIENT_COMMANDS = (["attach", "-i", "v"], ["detach", "--id", "x"], ["list"], ["list", "--json"], ["status"])


@pytest.mark.parametrize("args", CLIENT_COMMANDS, ids=" ".join)
def test_no_daemon_is_3(args: list[str], tmp_path: Path) -> None:
    words = said(run(tmp_path / "no.sock", *args), 3)
    assert str(tmp_path / "no.sock") in words
    assert "netfenced start" in words


def test_a_dead_daemons_socket_is_3(daemon: Background) -> None:
    dead = daemon.path.with_name("dead.sock")
    os.link(daemon.path, dead)  # keeps the name when the server goes
    daemon.run(daemon.server.close(0))
    assert "nobody listens" in said(run(dead, "status"), 3)


def test_what_is_no_socket_is_3(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said(run(tmp_path / "file", "status"), 3)


def test_a_path_that_no_socket_can_have_is_3(tmp_path: Path) -> None:
    assert "too long" in said(run(tmp_path / ("x" * 120), "status"), 3)


def test_a_daemon_that_goes_away_is_3(daemon: Background) -> None:
    async def held() -> None:
        import asyncio  # noqa: PLC0415 - the event belongs to the server's loop

        daemon.port.hold = asyncio.Event()

    daemon.run(held())
    command = subprocess.Popen(
        [NETFENCED, "-s", daemon.path, "attach", "-i", "veth0"], stderr=subprocess.PIPE, text=True
    )
    try:
        daemon.run(_wait(daemon))
        daemon.run(daemon.server.close(0))
        _, stderr = command.communicate(timeout=20)
    finally:
        command.kill()
        command.wait()
    assert command.returncode == 3
    assert stderr.startswith(f"netfenced: call the daemon on {daemon.path}: ")
    assert stderr.count("\n") == 1  # gRPC's own words stay out of it


async def _wait(daemon: Background) -> None:
    await daemon.port.attaching.wait()


def test_a_daemon_that_does_not_answer_is_3(daemon: Background, monkeypatch: pytest.MonkeyPatch) -> None:
    async def held() -> None:
        import asyncio  # noqa: PLC0415

        daemon.port.hold = asyncio.Event()

    daemon.run(held())
    monkeypatch.setattr("netfence.api.client.CHANGE_TIMEOUT_S", 0.2)
    assert "did not answer within 0.2 s" in said(run(daemon.path, "attach", "-i", "veth0"), 3)


def test_socket_comes_from_flag_over_environment(daemon: Background, tmp_path: Path) -> None:
    here, elsewhere = str(daemon.path), str(tmp_path / "elsewhere")
    assert run(None, "status", env={"NETFENCE_SOCKET": here}).exit_code == 0
    assert run(daemon.path, "status", env={"NETFENCE_SOCKET": elsewhere}).exit_code == 0
    assert run(tmp_path / "elsewhere", "status", env={"NETFENCE_SOCKET": here}).exit_code == 3


# detach, list, status -------------------------------------------------------------------------------------------------


def test_detach(daemon: Background) -> None:
    daemon.port.views = [VIEW]
    assert run(daemon.path, "detach", "--id", "id-0").exit_code == 0
    assert daemon.port.views == []
    assert "no such attachment" in said(run(daemon.path, "detach", "--id", "id-0"), 1)
    daemon.port.views = [VIEW]
    assert json.loads(run(daemon.path, "detach", "--id", "id-0", "--json").stdout) == {"detached": "id-0"}


def test_the_beginning_of_an_id_will_do_where_it_is_one_ids(daemon: Background) -> None:
    first, second = "6f1c2a9e-0000-4000-8000-000000000001", "6f1d0000-0000-4000-8000-000000000002"
    daemon.port.views = [replace(VIEW, id=first), replace(VIEW, id=second)]
    for doubtful in ("6f1", "6f1x", "6f1c2a9f"):
        assert "no such attachment" in said(run(daemon.path, "detach", "--id", doubtful), 1)
    assert len(daemon.port.views) == 2
    result = run(daemon.path, "detach", "--id", "6f1c")
    assert (result.exit_code, result.stdout) == (0, f"detached {first}\n")
    assert [view.id for view in daemon.port.views] == [second]
    daemon.port.views = [replace(VIEW, id="abcde"), replace(VIEW, id="abcdefg")]
    assert run(daemon.path, "detach", "--id", "abcde").exit_code == 0
    assert [view.id for view in daemon.port.views] == ["abcdefg"]
    daemon.port.views = [replace(VIEW, id=first), replace(VIEW, id=first[:-1] + "9")]
    assert "no such attachment" in said(run(daemon.path, "detach", "--id", "6f1c2a9e"), 1)
    assert len(daemon.port.views) == 2
    assert run(daemon.path, "why", "--id", first[:-1] + "9", "pypi.org").exit_code == 0
    daemon.port.views = [replace(VIEW, id=first)]
    assert run(daemon.path, "why", "--id", "6f1c2", "pypi.org").exit_code == 0
    assert daemon.port.explained[-1] == (first, "pypi.org")
    assert run(daemon.path, "suggest", "--id", "6f1c2").exit_code == 0
    assert daemon.port.suggested == [first]


def test_list_is_readable_when_piped(daemon: Background) -> None:
    cgroup = replace(
        VIEW, id="id-1", hook="cgroup", attach_mechanism="cgroup-link", target="/sys/fs/cgroup/" + "x" * 90
    )
    daemon.port.views = [replace(VIEW, attached_at=time.time() - 7300), cgroup]
    result = run(daemon.path, "list")
    assert result.exit_code == 0
    assert "\x1b" not in result.stdout
    head, *rows = [re.split(r"\s{2,}", line) for line in result.stdout.splitlines()]
    assert head == [
        *("ID", "TARGET", "HOOK", "MODE", "DNS MODE", "DNS ADDRESS", "PACKETS", "QUERIES", "AGE", "METADATA")
    ]
    by_id = {row[0]: row for row in rows}
    assert by_id["id-0"] == [
        *("id-0", "veth0", "tc workload (tcx)", "allowlist (audit)", "proxy", "127.0.0.1:11000"),
        *(f"{2**63 + 1}/2 (5 would drop)", "3/4", "2h", "tenant=acme"),
    ]
    assert by_id["id-1"][1] == cgroup.target
    assert by_id["id-1"][2] == "cgroup (cgroup-link)"


def test_list_json_is_stable(daemon: Background) -> None:
    daemon.port.views = [VIEW]
    result = run(daemon.path, "list", "--json")
    assert result.exit_code == 0
    attachment = {
        "id": "id-0",
        "target": "veth0",
        "type": "tc",
        "hook": "tc",
        "direction": "workload",
        "attach_mechanism": "tcx",
        "mode": "allowlist",
        "dns_mode": "proxy",
        "dns_address": "127.0.0.1:11000",
        "metadata": {"tenant": "acme"},
        "packets_allowed": 2**63 + 1,
        "packets_blocked": 2,
        "dns_queries_allowed": 3,
        "dns_queries_blocked": 4,
        "attached_at": "2023-11-14T22:13:20.250Z",
        "policy_version": "v7",
        "policy_hash": HASH,
        "audit": True,
        "packets_would_block": 5,
    }
    document = {"attachments": [attachment], "total_count": 1, "complete": True}
    assert json.loads(result.stdout) == document
    assert result.stdout == json.dumps(document, indent=2) + "\n"  # order of keys too
    assert run(daemon.path, "list", "--json").stdout == result.stdout


def test_list_json_of_nothing_is_still_one_document(daemon: Background) -> None:
    assert json.loads(run(daemon.path, "list", "--json").stdout) == {
        "attachments": [],
        "total_count": 0,
        "complete": True,
    }


def test_list_pages(daemon: Background) -> None:
    daemon.port.views = many(7)
    first = run(daemon.path, "list", "--page-size", "3")
    assert len(first.stdout.splitlines()) == 4
    assert first.stderr == "netfenced: list: 3 of 7 attachments shown; use --all for the rest\n"
    assert json.loads(run(daemon.path, "list", "--page-size", "3", "--json").stdout)["complete"] is False
    everything = run(daemon.path, "list", "--page-size", "3", "--all")
    assert len(everything.stdout.splitlines()) == 8
    assert everything.stderr == ""
    document = json.loads(run(daemon.path, "list", "--page-size", "3", "--all", "--json").stdout)
    assert [item["id"] for item in document["attachments"]] == [view.id for view in daemon.port.views]
    assert document["complete"] is True


def test_status(daemon: Background) -> None:
    daemon.port.views = [VIEW]
    result = run(daemon.path, "status")
    assert dict(re.split(r"\s{2,}", line, maxsplit=1) for line in result.stdout.splitlines()) == {
        "version": "0.1.0",
        "daemon id": "d-1",
        "hostname": "host",
        "control plane": "connected file:/etc/policy.yaml",
        "attachments": "1",
        "uptime": "1h",
        "kernel": "6.18.0",
        "feature ringbuf": "no: needs Linux 5.8",
        "feature tcx": "yes",
    }
    document = json.loads(run(daemon.path, "status", "--json").stdout)
    assert document == {
        "version": "0.1.0",
        "daemon_id": "d-1",
        "hostname": "host",
        "control_plane_state": "connected",
        "control_plane_address": "file:/etc/policy.yaml",
        "attachment_count": 1,
        "uptime_s": 3723.5,
        "kernel_release": "6.18.0",
        "features": STATUS.features,
    }


def _on_a_terminal(*args: str | Path) -> str:
    """Run a command on a pseudo-terminal and return what it showed."""
    master, slave = pty.openpty()
    with subprocess.Popen(
        [NETFENCED, *args], stdout=slave, env=os.environ | {"TERM": "xterm", "COLUMNS": "200"}
    ) as made:
        os.close(slave)
        shown = b""
        try:
            while part := os.read(master, 65536):
                shown += part
        except OSError:  # EIO: the other side is closed
            pass
        finally:
            os.close(master)
    assert made.returncode == 0
    return shown.decode()


def test_list_on_a_terminal_is_a_table_and_takes_no_markup_from_outside(daemon: Background) -> None:
    daemon.port.views = [replace(VIEW, metadata={"a": "[red]x[/red]"})]
    shown = _on_a_terminal("-s", daemon.path, "list")
    assert "\x1b[" in shown
    assert "[red]x[/red]" in shown
    assert "─" in shown


def test_status_on_a_terminal(daemon: Background) -> None:
    assert "6.18.0" in _on_a_terminal("-s", daemon.path, "status")


def test_a_reader_that_has_seen_enough_is_no_error(daemon: Background) -> None:
    daemon.port.views = many(1000)
    script = f"{NETFENCED} -s {daemon.path} list --all | head -1; true"
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, timeout=20)
    assert result.stdout.startswith("ID")
    assert result.stderr == ""


# policy check, config show, start -------------------------------------------------------------------------------------


def test_policy_check(tmp_path: Path) -> None:
    good = tmp_path / "good.yaml"
    good.write_text("attachments:\n  - {match: {interface: 'v*'}, mode: disabled}\ndefault: {mode: block_all}\n")
    result = run(None, "policy", "check", str(good))
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == f"{good}: ok, 1 rule and a default\n"
    document = json.loads(run(None, "policy", "check", str(good), "--json").stdout)
    assert document == {"file": str(good), "ok": True, "errors": [], "warnings": []}


def test_policy_check_tells_every_error_with_file_line_and_key(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("default:\n  mode: nope\n  allow_cidrs: ['10.0.0.0/33']\n")
    lines = said(run(None, "policy", "check", str(bad)), 1).splitlines()
    assert lines[0].startswith(f"netfenced: {bad}:2: default.mode: ")
    assert lines[1].startswith(f"netfenced: {bad}:3: default.allow_cidrs[0]: ")
    assert lines[2].startswith(f"netfenced: policy check {bad}: 2 errors; ")
    result = run(None, "policy", "check", str(bad), "--json")
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert document["ok"] is False
    assert [f"netfenced: {error}" for error in document["errors"]] == lines[:2]


def test_config_show_asks_the_daemon_for_what_is_in_force(daemon: Background, tmp_path: Path) -> None:
    told = {"log_level": ("debug", "/etc/netfence/netfence.yaml:3"), "metadata": ({"rack": "r1"}, "flag")}
    daemon.port.told = replace(STATUS, config=told)
    shown = run(daemon.path, "config", "show")
    document = json.loads(run(daemon.path, "config", "show", "--json").stdout)
    daemon.port.told = replace(STATUS, config={})
    assert (shown.exit_code, shown.stderr) == (0, "")
    assert [re.split(r"\s{2,}", line) for line in shown.stdout.splitlines()] == [
        ["KEY", "VALUE", "FROM"],
        ["log_level", "debug", "/etc/netfence/netfence.yaml:3"],
        ["metadata", '{"rack": "r1"}', "flag"],
    ]
    assert document == {key: {"value": value, "source": source} for key, (value, source) in told.items()}
    # One that is older than its command does not tell.
    assert "0.1.0 does not tell its configuration; give --config" in said(run(daemon.path, "config", "show"), 1)
    file = tmp_path / "netfence.yaml"
    file.write_text("log_level: error\n")
    shown = run(daemon.path, "config", "show", "--config", str(file))
    assert re.search(r"log_level +error +.*netfence.yaml", shown.stdout)


def test_config_show_without_a_daemon_is_what_one_would_take(tmp_path: Path) -> None:
    shown = run(tmp_path / "no.sock", "config", "show", env={"NETFENCE_LOG_LEVEL": "error"})
    assert shown.exit_code == 0
    assert shown.stderr == (
        "netfenced: config show: no daemon answers; shown is what `netfenced start` would take, without --config\n"
    )
    assert re.search(r"log_level +error +environment NETFENCE_LOG_LEVEL", shown.stdout)


def test_config_show_tells_where_each_value_came_from(tmp_path: Path) -> None:
    file = tmp_path / "netfence.yaml"
    file.write_text("log_level: debug\ndns: {port_min: 12000}\nmetadata: {rack: r1}\n")
    args = ("config", "show", "--config", str(file))
    env = {"NETFENCE_DNS__PORT_MAX": "13000"}
    document = json.loads(run(tmp_path / "s", *args, "--json", env=env).stdout)
    assert document["dns.listen_addr"] == {"value": "127.0.0.1", "source": "default"}
    assert document["dns.port_max"] == {"value": 13000, "source": "environment NETFENCE_DNS__PORT_MAX"}
    assert document["socket"] == {"value": str(tmp_path / "s"), "source": "flag"}
    assert document["metadata"]["value"] == {"rack": "r1"}
    for key in ("log_level", "dns.port_min", "metadata"):
        assert str(file) in document[key]["source"]
    rows = [re.split(r"\s{2,}", line) for line in run(None, *args, env=env).stdout.splitlines()]
    assert rows[0] == ["KEY", "VALUE", "FROM"]
    assert len(rows) == len(document) + 1
    assert ["dns.port_max", "13000", "environment NETFENCE_DNS__PORT_MAX"] in rows
    assert ["metadata", '{"rack": "r1"}', document["metadata"]["source"]] in rows


@pytest.mark.parametrize("command", [["config", "show"], ["start"]], ids=" ".join)
def test_a_bad_configuration_is_1_with_every_fault(command: list[str], tmp_path: Path) -> None:
    file = tmp_path / "netfence.yaml"
    file.write_text("log_level: loud\nnonsense: 1\n")
    lines = said(run(None, *command, "--config", str(file)), 1).splitlines()
    assert len(lines) == 2
    assert all(str(file) in line for line in lines)


# help, version, completion --------------------------------------------------------------------------------------------


def _commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from _commands(command, (*path, name))
        else:
            yield (*path, name)


def _leaves(group: click.Group) -> Iterator[click.Command]:
    for command in group.commands.values():
        if isinstance(command, click.Group):
            yield from _leaves(command)
        else:
            yield command


def _commands_in(lines: list[str]) -> Iterator[list[str]]:
    """Yield the arguments of each `netfenced` of a shell's lines."""
    for line in "\n".join(lines).replace("\\\n", "").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words = list(lexer)
        assert "netfenced" in line
        for operator, command in itertools.groupby(words, lambda word: word in {"|", "&&", ";", "&", "(", ")"}):
            argv = list(command)
            if not operator and argv[0] == "netfenced":
                yield argv[1:]


@pytest.mark.parametrize("path", [(), *_commands(cli)], ids=" ".join)
def test_help_has_examples_that_parse(path: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(None, *path, "--help")
    assert result.exit_code == 0
    _, _, examples = result.stdout.partition("Examples:\n")
    lines = [line.strip() for line in examples.splitlines() if line.strip()]
    assert lines
    if path:
        assert any(f"netfenced {' '.join(path)}" in line or f" {path[0]}" in line for line in lines)
    monkeypatch.chdir(tmp_path)
    for leaf in _leaves(cli):
        monkeypatch.setattr(leaf, "callback", lambda *_, **__: None)
    for words in _commands_in(lines):
        for number, word in enumerate(words):
            if word.endswith((".yaml", ".pem", ".key")):  # of the reader's machine
                words[number] = Path(word).name
                Path(words[number]).touch()
        done = CliRunner().invoke(cli, words)
        assert done.exit_code == 0, (words, done.stderr)


def test_every_command_of_this_stage_is_there() -> None:
    assert {" ".join(path) for path in _commands(cli)} == {
        *("start", "attach", "detach", "list", "status", "policy check", "config show", "controlplane"),
        *("why", "suggest", "watch", "top"),
    }


LONG_RUNNING = {"start"}  # serves, and logs as JSON where it is no terminal


@pytest.mark.parametrize("path", [path for path in _commands(cli) if path[0] not in LONG_RUNNING], ids=" ".join)
def test_every_command_has_json(path: tuple[str, ...]) -> None:
    command: click.Command = cli
    for name in path:
        assert isinstance(command, click.Group)
        command = command.commands[name]
    assert "--json" in {name for parameter in command.params for name in parameter.opts}


def test_version_and_start_up_are_quick(daemon: Background) -> None:
    def best_of(tries: int, *args: str | Path) -> float:
        times = []
        for _ in range(tries):
            begin = time.perf_counter()
            subprocess.run([NETFENCED, *args], check=True, capture_output=True, timeout=20)
            times.append(time.perf_counter() - begin)
        return min(times)

    result = subprocess.run([NETFENCED, "--version"], check=True, capture_output=True, text=True, timeout=20)
    assert result.stdout == f"netfenced {__version__}\n"
    assert best_of(5, "--version") < 0.3
    assert best_of(5, "-s", daemon.path, "attach", "-i", "veth0") < 0.4


@pytest.mark.parametrize("module", ["grpc", "rich", "structlog", "google.protobuf", "yaml", "pydantic", "asyncio"])
def test_help_imports_nothing_heavy(module: str) -> None:
    code = f"import sys, netfence.cli; sys.exit({module!r} in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=20)


def _complete(words: str, **env: str | Path) -> list[str]:
    count = len(words.split(" ")) - 1
    env_all = {**os.environ, "_NETFENCED_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(count)}
    result = subprocess.run(
        [NETFENCED], env={**env_all, **{k: str(v) for k, v in env.items()}}, capture_output=True, text=True, check=True,
        timeout=20,
    )  # fmt: skip
    return [line.partition(",")[2] for line in result.stdout.splitlines() if line]


def test_shell_completion(daemon: Background) -> None:
    daemon.port.views = many(2)
    assert _complete("netfenced att") == ["attach"]
    assert "lo" in _complete("netfenced attach -i l")
    for command in ("detach", "why", "suggest", "watch"):
        assert _complete(f"netfenced {command} --id id", NETFENCE_SOCKET=daemon.path) == ["id-0000", "id-0001"]
    assert _complete("netfenced detach --id id", NETFENCE_SOCKET="/nonexistent") == []


def test_the_tab_key_does_not_wait_for_a_daemon_that_hangs(tmp_path: Path) -> None:
    path = tmp_path / "hung.sock"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        begun = time.monotonic()
        assert _complete("netfenced detach --id id", NETFENCE_SOCKET=path) == []
        assert time.monotonic() - begun < 2 * COMPLETE_S + 2  # and what Python and gRPC take to start


def test_shell_completion_script() -> None:
    env = os.environ | {"_NETFENCED_COMPLETE": "bash_source"}
    result = subprocess.run([NETFENCED], env=env, capture_output=True, text=True, check=True, timeout=20)
    assert "complete" in result.stdout
