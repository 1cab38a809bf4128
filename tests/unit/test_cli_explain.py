"""`netfenced why` and `netfenced suggest` against a real server on a real socket, with a daemon that has no kernel."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from tests.unit.api.fake import Background
from tests.unit.test_cli import daemon, run, said

from netfence.api.messages import MAX_SUBJECT
from netfence.api.views import SuggestionView
from netfence.cli import cli
from netfence.errors import ExhaustedError, InvalidError, NotFoundError, PreconditionError

__all__ = ["daemon"]  # a fixture

HOSTILE = "# \x1b[2J\n\x07default: {mode: block_all}\n"


def test_why_shows_the_chain_and_is_0_whatever_the_verdict(daemon: Background) -> None:
    result = run(daemon.path, "why", "--id", "id-0", "PyPI.org")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines()[0] == "pypi.org: answered"
    assert "  192.0.2.2: drop (deny_rule)" in result.stdout.splitlines()
    assert "\x1b" not in result.stdout
    assert daemon.port.explained == [("id-0", "PyPI.org")]


def test_why_has_colours_on_a_terminal(daemon: Background) -> None:
    result = CliRunner().invoke(cli, ["--socket", str(daemon.path), "why", "--id", "id-0", "a.test"], color=True)
    assert "\x1b[32manswered\x1b[0m" in result.stdout
    assert "\x1b[31m\x1b[1mdrop\x1b[0m" in result.stdout
    env = {"NO_COLOR": "1"}
    plain = CliRunner().invoke(cli, ["-s", str(daemon.path), "why", "--id", "id-0", "a.test"], color=True, env=env)
    assert plain.stdout.splitlines()[0] == "pypi.org: answered"


def test_why_json(daemon: Background) -> None:
    result = run(daemon.path, "why", "--id", "id-0", "pypi.org", "--json")
    document = json.loads(result.stdout)
    assert (document["subject"], document["remedies"]) == ("pypi.org", ["remove deny 192.0.2.0/24"])


@pytest.mark.parametrize("command", [["why", "--id", "x", "a.test"], ["suggest", "--id", "x"]], ids=["why", "suggest"])
@pytest.mark.parametrize("kind", [NotFoundError, InvalidError, PreconditionError, ExhaustedError])
def test_refusals_are_told_as_the_daemon_words_them(daemon: Background, command: list[str], kind: type) -> None:
    daemon.port.failure = kind("why: no attachment x; see `netfenced list`")
    assert said(run(daemon.path, *command), 1) == "netfenced: why: no attachment x; see `netfenced list`\n"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["why", "--id", "", "a.test"], "explain: id is empty"),
        (["why", "--id", "x", ""], "explain: subject is empty"),
        (["why", "--id", "x", "a" * (MAX_SUBJECT + 1)], f"subject has {MAX_SUBJECT + 1} characters"),
        (["suggest", "--id", ""], "suggest: id is empty"),
    ],
)
def test_the_api_refuses_what_cannot_be_meant(daemon: Background, command: list[str], words: str) -> None:
    assert words in said(run(daemon.path, *command), 1)
    assert (daemon.port.explained, daemon.port.suggested) == ([], [])


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["why", "a.test"], "missing option '--id'"),
        (["why", "--id", "x"], "missing argument 'name|address'"),
        (["suggest"], "missing option '--id'"),
        (["suggest", "--id", "x", "--output", "/"], "is a directory"),
        (["suggest", "--id", "x", "--outputt", "f"], "did you mean"),
        (["sugest", "--id", "x"], "did you mean"),
    ],
)
def test_bad_usage(daemon: Background, args: list[str], words: str) -> None:
    result = run(daemon.path, *args)
    assert result.exit_code == 2
    assert words in result.stderr.lower()
    assert daemon.port.suggested == []


def test_suggest_prints_the_policy_and_complains_of_what_is_missing(daemon: Background) -> None:
    result = run(daemon.path, "suggest", "--id", "id-0")
    assert (result.exit_code, result.stdout) == (0, "default:\n  mode: block_all\n")
    assert "7 packets went to more destinations" in result.stderr
    daemon.port.suggestion = SuggestionView(HOSTILE, 0)
    shown = run(daemon.path, "suggest", "--id", "id-0")
    assert shown.stdout == "# \\x1b[2J\n\\x07default: {mode: block_all}\n"
    assert shown.stderr == ""


def test_suggest_json(daemon: Background) -> None:
    result = run(daemon.path, "suggest", "--id", "id-0", "--json")
    assert json.loads(result.stdout) == {"policy": "default:\n  mode: block_all\n", "missed": 7}


def test_suggest_writes_a_file_but_never_over_another(daemon: Background, tmp_path: Path) -> None:
    file = tmp_path / "suggested.yaml"
    result = run(daemon.path, "suggest", "--id", "id-0", "--output", str(file))
    assert (result.exit_code, file.read_text()) == (0, "default:\n  mode: block_all\n")
    assert str(file) in result.stdout
    file.write_text("mine")
    assert "exists already" in said(run(daemon.path, "suggest", "--id", "id-0", "--output", str(file)), 1)
    assert file.read_text() == "mine"
    nowhere = tmp_path / "no" / "file"
    assert "No such file" in said(run(daemon.path, "suggest", "--id", "id-0", "--output", str(nowhere)), 1)
    document = run(daemon.path, "suggest", "--id", "id-0", "--output", str(tmp_path / "b"), "--json")
    assert json.loads(document.stdout)["output"] == str(tmp_path / "b")


def test_no_daemon_is_3(tmp_path: Path) -> None:
    for command in (["why", "--id", "x", "a.test"], ["suggest", "--id", "x"]):
        assert "start the daemon" in said(run(tmp_path / "none", *command), 3)
