"""ci/gen_man.py tells everything of the command line, and two readers of manual pages have nothing against it."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import gen_man
from netfence.cli import cli
from netfence.command import FAILED, UNREACHABLE, USAGE
from netfence.config import KEYS


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("man") / "netfenced.8"
    file.write_text("\n".join(gen_man.page()) + "\n")
    return file


@pytest.fixture(scope="module")
def shown(page: Path) -> str:
    """Give what `man` shows, without what it writes bold with, on lines that need no break."""
    command = ["groff", "-ww", "-man", "-Tutf8", "-Kutf8", "-P-bcou", "-rLL=500n", str(page)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.replace("\N{HYPHEN}", "-")


def leaves(group: click.Group, path: str) -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from leaves(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


def test_it_is_of_section_8(shown: str) -> None:
    assert shown.split(maxsplit=1)[0] == "NETFENCED(8)"


def test_mandoc_finds_nothing(page: Path) -> None:
    done = subprocess.run(["mandoc", "-T", "lint", str(page)], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("", 0)


def test_every_command_with_its_options_and_examples(shown: str) -> None:
    found = list(leaves(cli, "netfenced"))
    assert len(found) > 5
    sections = dict(
        re.findall(r"^   (netfenced [a-z][^\[\n]*?)(?: [\[A-Z].*)?\n((?:\n|    .*\n)+)", shown, re.MULTILINE)
    )
    assert set(sections) == {path for path, _ in found}
    for path, command in found:
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert set(re.findall(r"--?[\w-]+", sections[path])) >= set(parameter.opts), path
        for line in gen_man.example_lines(command.epilog).splitlines():
            assert line in sections[path], path


def test_statuses_files_and_keys(shown: str) -> None:
    statuses = shown.partition("EXIT STATUS")[2].partition("CONFIGURATION")[0]
    assert [int(number) for number in re.findall(r"^       (\d+) ", statuses, re.MULTILINE)] == [
        0,
        FAILED,
        USAGE,
        UNREACHABLE,
    ]
    for path in KEYS.leaves:
        assert re.search(rf"^ +{path.rpartition('.')[2]}:", shown, re.MULTILINE), path
    assert "       NETFENCE_SOCKET\n" in shown


@pytest.mark.parametrize(
    ("text", "roff"),
    [
        (".so /etc/passwd", r"\&.so /etc/passwd"),
        ("one\n'two", "one\n\\&'two"),
        (r"back\slash", r"back\eslash"),
        ("--help", r"\-\-help"),
    ],
)
def test_nothing_of_a_text_is_a_request(text: str, roff: str) -> None:
    assert gen_man.escaped(text) == roff


def test_a_line_that_begins_with_a_dot_after_it_was_broken_is_no_request() -> None:
    word = "x" * (gen_man.LINE - 5)
    assert list(gen_man.prose(f"{word} .gitignore")) == [word, r"\&.gitignore"]
