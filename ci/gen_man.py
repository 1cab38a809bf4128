#!/usr/bin/env python3
"""Write netfenced(8), the manual page, from the command line itself and the reference configuration.

    .venv/bin/python ci/gen_man.py > netfenced.8

Nothing of a command is told here: help, options, defaults and examples are click's, the exit statuses stand in the help
of the whole, keys and their meanings in src/netfence/netfence.yaml. What no program knows (files, what outlives the
daemon) is below. The date is that of SOURCE_DATE_EPOCH, else today's. packaging/build-deb runs this.
"""

from __future__ import annotations

import inspect
import os
import re
import textwrap
import time
from collections.abc import Iterator
from importlib import resources

import click

from netfence import __version__
from netfence.cli import cli
from netfence.config import Config

NAME = "netfenced"
LINE = 79  # of the source, in characters: what mandoc -Tlint likes
FILES = {
    "/etc/netfence/netfence.yaml": "Configuration, where the service looks for it; see CONFIGURATION.",
    str(Config().socket): "Local API (`socket`); for root alone unless `socket_group` is set.",
    str(Config().data_dir): "State (`data_dir`): attachments, policies, open addresses.",
    str(Config().bpffs_dir): "Pins of programs, maps and links (`bpffs_dir`): what is in force.",
}
NOTES = f"""
Fences outlive the daemon, however it ends: packets are judged by the kernel, rules and open addresses expire by its
clock. Only DNS queries are not answered meanwhile. The next daemon takes over what it finds. A reboot ends all fences;
the daemon puts them back on what is there again.

So removing a package or program of netfence takes no fence off. Detach before, or stop the daemon with
enforcement.on_shutdown set to `detach`. By hand: `rm -r {Config().bpffs_dir}/links`, and before Linux 6.6 also
`tc qdisc del dev INTERFACE clsact`.
"""


def escaped(text: str) -> str:
    """Make a text plain to roff: its backslashes, hyphens that can be copied, no requests."""
    return guarded(text.replace("\\", "\\e").replace("-", "\\-"))


def guarded(text: str) -> str:
    """Keep lines from being taken for requests."""
    return re.sub(r"^([.'])", r"\\&\1", text, flags=re.MULTILINE)


def prose(text: str) -> Iterator[str]:
    """Give the lines of paragraphs, `quoted` words in bold; what click must not wrap (after a BS) stays as it is."""
    for number, paragraph in enumerate(re.split(r"\n\s*\n", inspect.cleandoc(text).strip())):
        yield from [".PP"] if number else []
        if paragraph.startswith("\b"):
            yield from literal(paragraph.removeprefix("\b").strip("\n"))
            continue
        words = re.sub(r"`([^`]*)`", r"\\fB\1\\fR", escaped(" ".join(paragraph.split())))
        lines = textwrap.wrap(words, LINE, break_long_words=False, break_on_hyphens=False)
        yield from (guarded(line) for line in lines)


def literal(text: str) -> Iterator[str]:
    """Give lines that are shown as they are."""
    yield from (".EX", escaped(textwrap.dedent(text)), ".EE")


def definition(term: str, told: str) -> Iterator[str]:
    """Give a term and, indented, what it is."""
    yield from (".TP", f"\\fB{escaped(term)}\\fR", *prose(told))


def options(command: click.Command, context: click.Context) -> Iterator[str]:
    """Give a command's options as its --help has them, without --help itself."""
    for parameter in command.params:
        record = parameter.get_help_record(context)
        if record is not None:
            yield from definition(*record)


def commands(group: click.Group, parent: click.Context) -> Iterator[tuple[click.Command, click.Context]]:
    """Give every command that does something, in the order of --help, with its context."""
    for name in group.list_commands(parent):
        command = group.commands[name]
        context = click.Context(command, info_name=name, parent=parent)
        if isinstance(command, click.Group):
            yield from commands(command, context)
        elif not command.hidden:
            yield command, context


def example_lines(epilog: str | None) -> str:
    """Return the examples of an epilog (netfence.command.examples) without their heading."""
    return textwrap.dedent((epilog or "").partition("Examples:\n")[2])


def page() -> Iterator[str]:
    """Give the lines of the page."""
    root = click.Context(cli, info_name=NAME)
    told, _, statuses = inspect.cleandoc(cli.help or "").partition("Exit status:")
    seconds = int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))
    date = time.strftime("%Y-%m-%d", time.gmtime(seconds))
    yield f'.TH {NAME.upper()} 8 "{date}" "netfence {__version__}" "System Administration"'
    summary = told.partition("\n")[0].rstrip(".")
    yield from (".SH NAME", f"{NAME} \\- {escaped(summary[:1].lower() + summary[1:])}")
    yield from (".SH SYNOPSIS", f"\\fB{NAME}\\fR [\\fIOPTIONS\\fR] \\fICOMMAND\\fR [\\fIARGUMENTS\\fR]")
    yield from (".SH DESCRIPTION", *prose(told), ".SH OPTIONS", *options(cli, root))
    yield ".SH COMMANDS"
    for command, context in commands(cli, root):
        usage = " ".join(command.collect_usage_pieces(context))
        yield from (f'.SS "{escaped(context.command_path)} {escaped(usage)}"', *prose(command.help or ""))
        yield from options(command, context)
        if lines := example_lines(command.epilog):
            yield from (".PP", "Examples:", ".PP", *literal(lines))
    yield ".SH EXIT STATUS"
    for number, meaning in re.findall(r"(\d+) ([^,.]+)", statuses):
        yield from definition(number, f"{meaning}.")
    yield from (".SH CONFIGURATION", "Every key with its default:", ".PP")
    yield from literal((resources.files("netfence") / "netfence.yaml").read_text(encoding="utf-8"))
    yield ".SH ENVIRONMENT"
    for parameter in cli.params:
        if isinstance(parameter, click.Option) and isinstance(parameter.envvar, str):
            yield from definition(parameter.envvar, f"{parameter.help} The same as {parameter.opts[0]}.")
    yield from definition("NETFENCE_KEY, NETFENCE_SECTION__KEY", "Keys of the configuration, over those of the file.")
    yield ".SH FILES"
    for path, what in FILES.items():
        yield from definition(path, what)
    yield from (".SH NOTES", *prose(NOTES), ".SH EXAMPLES", *literal(example_lines(cli.epilog)))
    yield from (".SH SEE ALSO", "\\fBsystemd.service\\fR(5), \\fBtc\\fR(8), \\fBbpf\\fR(2)")


if __name__ == "__main__":
    print("\n".join(page()))
