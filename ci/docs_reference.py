"""The pages of the documentation that are made of the product itself: commands, configuration, API, decisions.

Each function returns Markdown. `ci/docs_hooks.py` puts it into the page that has the line ``<!-- generated: NAME -->``;
what a command, a key or a message means is said where it is defined, and nowhere else. Headings begin at level 2.
"""

from __future__ import annotations

import functools
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import yaml
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor_pb2 import FieldDescriptorProto

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "ci"))

import gen_proto  # noqa: E402  # found through the line above
from netfence import cli, config  # noqa: E402

NETFENCE_YAML = ROOT / "src/netfence/netfence.yaml"
DECISIONS = ROOT / "docs/decisions"

# Commands -----------------------------------------------------------------------------------------------------------


def commands() -> str:
    """Describe `netfenced` and every command below it: usage, text, options, examples."""
    return "\n".join(_command(cli.cli, "netfenced", None))


def _command(command: click.Command, path: str, parent: click.Context | None) -> Iterator[str]:
    context = click.Context(command, parent, path.rpartition(" ")[2], **command.context_settings)
    usage = " ".join([path, *command.collect_usage_pieces(context)])
    yield from (f"## {path}", "", "```text", usage, "```", "", _paragraphs(command.help or ""), "")
    yield from _parameters(command, context)
    if command.epilog:
        lines = command.epilog.replace("\b", "").strip().splitlines()[1:]
        # What stands here is an example, not a session: tests/kernel/test_docs.py runs those of the guides.
        yield from ("Examples:", "", "```text", *(line.removeprefix("  ") for line in lines), "```", "")
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            if below is not None and not below.hidden:
                yield from _command(below, f"{path} {name}", context)


def _parameters(command: click.Command, context: click.Context) -> Iterator[str]:
    rows = []
    for parameter in command.get_params(context):
        if isinstance(parameter, click.Argument):
            rows.append((f"`{parameter.make_metavar(context)}`", "argument"))
        elif record := parameter.get_help_record(context):
            rows.append((f"`{record[0]}`", record[1]))
    if rows:
        yield from ("| option | |", "|---|---|", *(f"| {_cell(name)} | {_cell(text)} |" for name, text in rows), "")


def _paragraphs(text: str) -> str:
    """Return a docstring's paragraphs, each on one line."""
    return "\n\n".join(" ".join(part.split()) for part in text.replace("\b", "").split("\n\n"))


def _cell(text: str) -> str:
    """Return text as the cell of a table: between backticks Python-Markdown takes a bar as it stands."""
    parts = re.split("(`[^`]*`)", " ".join(text.split()))
    return "".join(part if part.startswith("`") else part.replace("|", "\\|") for part in parts)


# Configuration ------------------------------------------------------------------------------------------------------


def configuration() -> str:
    """Describe every key of the configuration by the comments of netfence.yaml, which a test holds to the model."""
    told = dict(_yaml_comments(NETFENCE_YAML.read_text()))
    defaults = yaml.safe_load(NETFENCE_YAML.read_text())
    lines = []
    for key in config.KEYS.leaves:
        section, _, name = key.rpartition(".")
        if name == _first_name(section):
            lines += [f"## {section}" if section else "## top level", ""]
        value: Any = functools.reduce(lambda tree, step: tree[step], key.split("."), defaults)
        shown = value if isinstance(value, str) else json.dumps(value)
        lines += [f"### {key}", "", told.get(key, "") or _shared(key, told), ""]
        lines += [f"Default: `{shown}`. Environment: `NETFENCE_{key.replace('.', '__').upper()}`.", ""]
    return "\n".join(lines)


def _first_name(section: str) -> str:
    """Name the first key that a section has itself, where its heading stands."""
    own = [key for key in config.KEYS.leaves if key.rpartition(".")[0] == section]
    return own[0].rpartition(".")[2]


def _shared(key: str, told: dict[str, str]) -> str:
    """Return what is said of the key before, where one comment is about two or three keys."""
    keys = [*config.KEYS.leaves]
    before = keys[: keys.index(key)]
    section = key.rpartition(".")[0]
    named = next((each for each in reversed(before) if each.rpartition(".")[0] == section and told.get(each)), "")
    return f"{told[named]} (Said of `{named}` and this key.)" if named else ""


def _yaml_comments(text: str) -> Iterator[tuple[str, str]]:
    """Yield dotted keys with the comment before them; "" where there is none."""
    section: list[str] = []
    comment: list[str] = []
    for line in text.splitlines():
        stripped = line.strip()
        depth = (len(line) - len(line.lstrip())) // 2
        if stripped.startswith("#"):
            comment.append(stripped.lstrip("# "))
        elif found := re.match(r"([a-z_]+):", stripped):
            section = [*section[:depth], found[1]]
            yield ".".join(section), " ".join(comment)
            comment = []
        else:
            comment = []


# API ----------------------------------------------------------------------------------------------------------------


@functools.cache
def _files() -> dict[str, descriptor_pb2.FileDescriptorProto]:
    """Compile the proto files and return their descriptors with comments, by file name."""
    names = [path.relative_to(gen_proto.PROTO).as_posix() for path in sorted(gen_proto.PROTO.rglob("*.proto"))]
    with tempfile.TemporaryDirectory() as scratch:
        _, descriptors = gen_proto.generate(names, Path(scratch))
    return {Path(file.name).name: file for file in descriptors}


def _declared(file: descriptor_pb2.FileDescriptorProto) -> set[str]:
    """Name the messages and enumerations of a file."""
    return {message.name for message in file.message_type} | {enum.name for enum in file.enum_type}


PAGE_OF = {"daemon.proto": "api.md", "control.proto": "control-api.md", "types.proto": "api.md"}


def api(*names: str) -> str:
    """Describe services, messages and enumerations of proto files by their comments."""
    return "\n".join(line for name in names for line in _Page(name).lines())


class _Page:
    """One proto file as Markdown."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._file = _files()[name]
        self._comments = {
            tuple(place.path): " ".join((place.leading_comments or place.trailing_comments).split())
            for place in self._file.source_code_info.location
        }
        self._paths = {full: path for path, full in gen_proto.elements(self._file)}

    def lines(self) -> Iterator[str]:
        for service in self._file.service:
            yield from (f"## service {service.name}", "", self._said(service.name), "")
            for method in service.method:
                given, got = self._type(method.input_type), self._type(method.output_type)
                given, got = (
                    f"stream of {kind}" if many else kind
                    for kind, many in ((given, method.client_streaming), (got, method.server_streaming))
                )
                yield from (f"### {service.name}.{method.name}", "", f"{given} → {got}", "")
                yield from (self._said(f"{service.name}.{method.name}"), "")
        for message in self._file.message_type:
            yield from (f"## {message.name}", "", self._said(message.name), "")
            if message.field:
                yield from ("| no. | field | type | |", "|---|---|---|---|", *self._fields(message), "")
        for enum in self._file.enum_type:
            yield from (f"## {enum.name}", "", self._said(enum.name), "", "| no. | value | |", "|---|---|---|")
            yield from (
                f"| {value.number} | `{value.name}` | {_cell(self._said(f'{enum.name}.{value.name}'))} |"
                for value in enum.value
            )
            yield ""

    def _said(self, full_name: str) -> str:
        # Angle brackets and stars of a comment are text; indented blocks and references do not occur.
        return self._comments[self._paths[full_name]].replace("<", "&lt;").replace("*", "\\*")

    def _fields(self, message: descriptor_pb2.DescriptorProto) -> Iterator[str]:
        for field in message.field:
            said = self._said(f"{message.name}.{field.name}")
            if field.HasField("oneof_index") and not field.proto3_optional:
                said = f"({message.oneof_decl[field.oneof_index].name}) {said}"
            yield f"| {field.number} | `{field.name}` | {self._field_type(message, field)} | {_cell(said)} |"

    def _field_type(self, message: descriptor_pb2.DescriptorProto, field: FieldDescriptorProto) -> str:
        entry = field.type_name.rpartition(".")[2]
        for nested in message.nested_type:
            if nested.name == entry and nested.options.map_entry:
                key, value = nested.field
                return f"map of {self._plain(key)} to {self._plain(value)}"
        many = "repeated " if field.label == FieldDescriptorProto.LABEL_REPEATED else ""
        return many + self._plain(field)

    def _plain(self, field: FieldDescriptorProto) -> str:
        if field.type_name:
            return self._type(field.type_name)
        return FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()

    def _type(self, type_name: str) -> str:
        """Return a type's name, as a link where it is ours."""
        package, name = type_name.lstrip(".").rsplit(".", 1)
        if package != self._file.package:
            return f"`{package}.{name}`"
        home = next(file for file, found in _files().items() if name in _declared(found))
        page = "" if PAGE_OF[home] == PAGE_OF[self._name] else PAGE_OF[home]
        return f"[{name}]({page}#{name.lower()})"


# Decisions ----------------------------------------------------------------------------------------------------------


def decisions() -> str:
    """List the decisions with their titles."""
    lines = ["| | |", "|---|---|"]
    for path in sorted(DECISIONS.glob("0*.md")):
        number = path.name[:4]
        title = path.read_text().partition("\n")[0].lstrip("# ").removeprefix(f"{number}: ")
        if number != "0000":
            lines.append(f"| {number} | [{_cell(title)}]({path.name}) |")
    return "\n".join(lines)


GENERATED: dict[str, Callable[[], str]] = {
    "commands": commands,
    "configuration": configuration,
    "local API": lambda: api("daemon.proto", "types.proto"),
    "control-plane API": lambda: api("control.proto"),
    "decisions": decisions,
}


def fill(markdown: str) -> str:
    """Return a page with what is generated in the place of its ``<!-- generated: NAME -->`` lines."""
    return re.sub(r"^<!-- generated: (.+) -->$", lambda found: GENERATED[found[1]](), markdown, flags=re.MULTILINE)


def main(arguments: Sequence[str]) -> int:
    """Print what is generated under the names given; all names without one."""
    for name in arguments or GENERATED:
        print(GENERATED[name]())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
