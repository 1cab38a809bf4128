"""The code blocks of a page of documentation, and what is to be done with each; pure.

A page is a script: its blocks are run from top to bottom in one shell.

| block | is |
|---|---|
| ```` ```bash ```` | commands; each must succeed |
| ```` ```console ```` | `$ command` lines, each with what it prints behind it, where something is shown |
| ```` ```yaml title="FILE" ```` | a file that is there from now on |
| ```` ```yaml ```` | a policy file or a configuration, which must be good |
| others | to read |

The line before a block may be a comment that says more: ``<!-- not run: WHY -->``;
``<!-- run: in the background, until COMMAND -->`` (a program that goes on, ready when the command succeeds; what it is
shown to print it tells of what the next block does);
``<!-- run: until it is so -->`` (again until it prints what is shown: something else takes effect meanwhile);
``<!-- NAME: written by ci/readme_session.py -->`` (run there).

In what a command prints, `…` stands for anything, a line `…` for any lines, and alone for a success; ids are whatever
they are, and a later command that names one means the real one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

FENCE = re.compile(r"^```(?P<info>.*)$")
INDENTED = re.compile(r"^(?:\s+```|\s*~~~)\s*(?P<language>\w*)")  # in a list or an admonition
COMMENT = re.compile(r"^<!-- (?P<text>.+) -->$")
TITLE = re.compile(r'title="(?P<title>[^"]+)"')
HEREDOC = re.compile(r"<<-?\s*'?(?P<word>\w+)'?")
ID = re.compile(r"\b[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b")
SHORT = 8  # characters of an id where there is no room for all

COMMANDS = ("bash", "console")
TO_READ = ("text", "python", "yaml", "ini", "json", "proto", "promql")
NOT_RUN = "not run: "
BACKGROUND = "run: in the background, until "
UNTIL = "run: until it is so"
ELSEWHERE = ": written by ci/readme_session.py"
PROMPT = "$ "


class BlockError(Exception):
    """A page has a block of which it cannot be told what to do with it."""


@dataclass(frozen=True, slots=True)
class Command:
    """A command and what it is shown to print; `shown` None: nothing is shown, and it must succeed."""

    line: int
    text: str
    shown: str | None = None


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block of a page, with the comment on the line before it."""

    line: int
    language: str
    title: str
    comment: str
    body: tuple[str, ...] = field(repr=False)

    @property
    def is_commands(self) -> bool:
        """Whether it is made of commands."""
        return self.language in COMMANDS

    @property
    def not_run(self) -> str:
        """Why it is not run; empty if it is."""
        return self.comment.removeprefix(NOT_RUN) if self.comment.startswith(NOT_RUN) else ""

    @property
    def elsewhere(self) -> bool:
        """Whether ci/readme_session.py runs it."""
        return self.comment.endswith(ELSEWHERE)

    @property
    def ready(self) -> str:
        """The command that succeeds when what runs in the background is ready; empty for others."""
        return self.comment.removeprefix(BACKGROUND) if self.comment.startswith(BACKGROUND) else ""

    @property
    def again(self) -> bool:
        """Whether its commands are run again until they print what is shown."""
        return self.comment == UNTIL

    def commands(self) -> list[Command]:
        """Return the commands in order."""
        lines = [*enumerate(self.body, start=self.line + 1)]
        if self.language == "bash":
            return [Command(self.line + 1, "\n".join(self.body))]
        return [*_session(lines)]


def _session(lines: list[tuple[int, str]]) -> Iterator[Command]:
    """Cut a session into commands: a prompt, continued lines and here-documents, then what is printed."""
    position = 0
    while position < len(lines):
        number, text = lines[position]
        if not text.startswith(PROMPT):
            raise BlockError(f"line {number}: a session begins with `{PROMPT}`: {text!r}")
        parts = [text.removeprefix(PROMPT)]
        position += 1
        while parts[-1].endswith("\\") and position < len(lines):
            parts.append(lines[position][1].removeprefix("> "))
            position += 1
        if found := HEREDOC.search(parts[-1]):
            while parts[-1] != found["word"]:
                parts.append(lines[position][1])
                position += 1
        shown = []
        while position < len(lines) and not lines[position][1].startswith(PROMPT):
            shown.append(lines[position][1])
            position += 1
        yield Command(number, "\n".join(parts), "\n".join(shown) if shown else None)


def blocks(markdown: str) -> list[Block]:
    """Return the fenced blocks of a page. BlockError for one that is not understood."""
    found: list[Block] = []
    lines = markdown.splitlines()
    position = 0
    while position < len(lines):
        line = lines[position]
        if (inside := INDENTED.match(line)) and inside["language"] not in ("", *TO_READ):
            raise BlockError(f"line {position + 1}: an indented block hides from the tests: {line!r}")
        if not (fence := FENCE.match(line)):
            position += 1
            continue
        end = next((at for at in range(position + 1, len(lines)) if lines[at] == "```"), None)
        if end is None:
            raise BlockError(f"line {position + 1}: a block without an end")
        found.append(
            _block(position, fence["info"], lines[position - 1] if position else "", lines[position + 1 : end])
        )
        position = end + 1
    return found


def _block(position: int, info: str, before: str, body: list[str]) -> Block:
    language = info.split(" ", maxsplit=1)[0]
    title = TITLE.search(info)
    comment = COMMENT.match(before)
    block = Block(
        position + 1, language, title["title"] if title else "", comment["text"] if comment else "", tuple(body)
    )
    if language not in (*COMMANDS, *TO_READ):
        raise BlockError(f"line {block.line}: a block of {language or 'nothing'!r}; of commands: console or bash")
    if block.comment.startswith(("run", "not run")) and not (block.not_run.strip() or block.ready or block.again):
        raise BlockError(f"line {block.line}: {block.comment!r} says neither how to run it nor why not")
    if language == "text" and any(text.startswith((PROMPT, "# netfenced")) for text in body):
        raise BlockError(f"line {block.line}: commands in a block of text")
    return block


def pattern(shown: str, ids: dict[str, str]) -> re.Pattern[str]:
    """Make what is shown an expression; an id that is new becomes a group, one that is known the real one."""
    lines = []
    known = dict(ids)
    new: dict[str, str] = {}
    for line in shown.splitlines():
        if line.strip() == "…":
            lines.append(r"(?:.*\n)*?")
            continue
        lines.append(_line(line.rstrip(), known, new) + r"[ ]*\n")
    return re.compile("".join(lines) + r"\Z")


def _line(line: str, known: dict[str, str], new: dict[str, str]) -> str:
    short = {one[:SHORT]: real[:SHORT] for one, real in known.items()}
    parts = []
    for part in re.split(f"({ID.pattern}|{'|'.join(short) or ID.pattern})", line):
        if part in known or part in short:
            parts.append(re.escape(known.get(part) or short[part]))
        elif part in new:
            parts.append(f"(?P={new[part]})")
        elif ID.fullmatch(part):
            new[part] = group(part)
            parts.append(f"(?P<{new[part]}>{ID.pattern})")
        else:
            parts.append(_text(part))
    return "".join(parts)


# What differs between two runs that went alike.
_NUMBER = re.compile(
    r"…| {2,}|\b\d\d:\d\d:\d\d(?:\.\d\d)?\b|\b\d+/\d+\b|\b\d+(?:\.\d+)? ?(?:ms|s|m|min)\b|\(tcx\)|\(clsact\)"
)


def _text(part: str) -> str:
    made, last = "", 0
    for found in _NUMBER.finditer(part):
        made += re.escape(part[last : found.start()])
        made += _variable(found[0])
        last = found.end()
    return made + re.escape(part[last:])


def _variable(text: str) -> str:
    if text == "…":
        return ".*"
    if text.isspace():
        return " +"
    if text.startswith("("):
        return r"\((?:tcx|clsact)\)"
    if ":" in text:
        return r"[\d:.]+"
    if "/" in text:
        return r"\d+/\d+"
    return r"\d+(?:\.\d+)? ?" + text.lstrip("0123456789. ")


def group(doc_id: str) -> str:
    """Name the group of an id that a page shows."""
    return "id" + doc_id.replace("-", "")
