"""Every command of the documentation is run, or says why not; every YAML block is what the product accepts."""

from __future__ import annotations

import re
import shlex
import time
from pathlib import Path

import pytest
import yaml

import readme_session
from docs_blocks import ID, Block, BlockError, Command, blocks, group, pattern
from docs_shell import DocsShell
from harness.daemon import START_TIMEOUT_S
from netfence.config import KEYS, load
from netfence.control.policyfile import load_policy_file

pytestmark = pytest.mark.userspace

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), README])
AGAIN_TIMEOUT_S = 30.0
# What is left with nothing attached serves the next page (harness.warm), which then compiles nothing.
DETACH_ALL = """
pgrep netfenced >/dev/null && for id in $(netfenced list --all | awk 'NR > 1 {print $1}'); do
  netfenced detach --id "$id"
done
pkill netfenced
while pgrep netfenced >/dev/null; do sleep 0.1; done"""


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def to_run(page: Path) -> list[Block]:
    """List the blocks that are run, files among them."""
    return [
        block
        for block in blocks(page.read_text())
        if (block.is_commands and not block.not_run and not block.elsewhere) or (block.title and not block.not_run)
    ]


# The README's sessions are run by ci/readme_session.py, and its quick start is the guide's: tests compare them.
WITH_COMMANDS = [
    page for page in PAGES if page != README and re.search(r"^```(bash|console)", page.read_text(), re.MULTILINE)
]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_block_is_understood(page: Path) -> None:
    for block in blocks(page.read_text()):
        if block.elsewhere:
            session = block.comment.partition(":")[0]
            assert session in readme_session.SESSIONS, f"{name(page)}:{block.line}: nobody runs {session!r}"
        elif block.is_commands:
            assert block.not_run or block.commands(), f"{name(page)}:{block.line}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_yaml_is_what_the_product_accepts(page: Path, tmp_path: Path) -> None:
    for block in blocks(page.read_text()):
        if block.language != "yaml" or block.not_run:
            continue
        file = tmp_path / f"line-{block.line}.yaml"
        file.write_text("\n".join(block.body) + "\n")
        keys = set(yaml.safe_load(file.read_text()))
        if keys <= {"attachments", "default"}:
            load_policy_file(file)
        else:
            assert keys & {key.partition(".")[0] for key in (*KEYS.leaves, *KEYS.sections)}, f"{page.name}:{block.line}"
            load(file, {}, {})


@pytest.mark.timeout(240)
@pytest.mark.parametrize("page", WITH_COMMANDS, ids=name)
def test_the_page_does_what_it_shows(page: Path, tmp_path: Path) -> None:
    blocks = to_run(page)
    if not any(block.is_commands for block in blocks):
        return  # each says why not
    with DocsShell(tmp_path) as shell:
        ids: dict[str, str] = {}
        talking: Command | None = None
        for block in blocks:
            try:
                if block.title:
                    write(shell, block)
                elif block.ready:
                    (command,) = block.commands()
                    start(shell, command, block.ready)
                    talking = command if command.shown else talking
                else:
                    run_block(shell, block, ids, talking)
                    talking = None
            except (AssertionError, TimeoutError) as error:
                _, logs = shell.run("tail -n 20 background-*.log")
                raise AssertionError(f"{name(page)}:{block.line}: {error}\n{logs}") from error
        shell.run(DETACH_ALL)


def write(shell: DocsShell, block: Block) -> None:
    """Write the file that a block shows."""
    content = "\n".join(block.body)
    file = shlex.quote(block.title)
    status, said = shell.run(f"mkdir -p $(dirname {file}) && cat >{file} <<'END-OF-FILE'\n{content}\nEND-OF-FILE\n")
    assert status == 0, said


def start(shell: DocsShell, command: Command, ready: str) -> None:
    """Start what goes on, and wait until it is ready."""
    shell.run(f"{command.text} >{log_of(command)} 2>&1 &")
    until = time.monotonic() + 2 * START_TIMEOUT_S  # the first compiles
    while shell.run(ready)[0] != 0:
        assert shell.run("kill -0 $!")[0] == 0, f"{command.text!r} has ended"
        assert time.monotonic() < until, f"{command.text!r} is not ready: {shell.run(ready)[1]}"


def log_of(command: Command) -> str:
    return f"background-{command.line}.log"


def run_block(shell: DocsShell, block: Block, ids: dict[str, str], talking: Command | None) -> None:
    """Run a block once; again until it prints what is shown, where it says so, or until `talking` has told of it."""
    until = time.monotonic() + AGAIN_TIMEOUT_S
    for command in block.commands():
        while problem := run(shell, command, ids):
            assert block.again, problem
            assert time.monotonic() < until, problem
    while talking and (problem := unheard(shell, talking, ids)):
        assert time.monotonic() < until, problem
        for command in block.commands():
            run(shell, command, ids)


def unheard(shell: DocsShell, talking: Command, ids: dict[str, str]) -> str:
    """Return what is wrong with what a program in the background has said so far, empty if nothing is."""
    _, said = shell.run(f"cat {log_of(talking)}")
    if pattern(f"…\n{talking.shown}\n…", ids).match(said + "\n"):
        return ""
    return f"{talking.text!r} (line {talking.line}) is shown to print\n{talking.shown}\nand printed\n{said}"


def run(shell: DocsShell, command: Command, ids: dict[str, str]) -> str:
    """Run a command; return what is wrong with what it did, empty if nothing is."""
    status, said = shell.run(ID.sub(lambda found: ids.get(found[0], found[0]), command.text))
    if command.shown is None or command.shown == "…":
        return f"{command.text!r} (line {command.line}) ended with {status}:\n{said}" if status else ""
    found = pattern(command.shown, ids).match(said.rstrip("\n") + "\n")
    if found is None:
        return f"{command.text!r} (line {command.line}) is shown to print\n{command.shown}\nand printed\n{said}"
    ids |= {each: found[group(each)] for each in ID.findall(command.shown) if each not in ids}
    return ""


def steps(markdown: str) -> set[tuple[str, str | None]]:
    """List the commands of a page with what they print, and the files with what is in them."""
    found: set[tuple[str, str | None]] = set()
    for block in blocks(markdown):
        if block.not_run or block.elsewhere:
            continue
        if block.title:
            found.add((block.title, "\n".join(block.body)))
        elif block.is_commands:
            found |= {(command.text, command.shown) for command in block.commands()}
    return found


def test_the_readmes_commands_are_the_guides() -> None:
    short = steps(README.read_text())
    assert len(short) > 8
    assert short <= steps((ROOT / "docs/quick-start.md").read_text())


SHOWN = """\
id: 385da4c5-ed73-46b1-b971-662fe1fa39fc
…
dns address: …:53
list: 385da4c5-ed73-46b1-b971-662fe1fa39fc  10/1  4s"""
SAID = """\
id: 11111111-2222-3333-4444-555555555555
one
two
dns address: 127.0.0.1:53
list: 11111111-2222-3333-4444-555555555555      7/0  12s
"""


def test_what_is_shown_may_differ_in_ids_and_numbers_and_not_in_words() -> None:
    assert pattern(SHOWN, {}).match(SAID)
    assert not pattern(SHOWN, {}).match(SAID.replace(":53", ":54"))
    assert not pattern(SHOWN, {}).match(SAID.replace("list: 1", "list: 2"))
    assert not pattern(SHOWN, {}).match(SAID + "one more line\n")
    known = {"385da4c5-ed73-46b1-b971-662fe1fa39fc": "99999999-2222-3333-4444-555555555555"}
    assert not pattern(SHOWN, known).match(SAID)
    assert pattern("drop 385da4c5 vm0", known).match("drop 99999999 vm0\n")


def test_a_command_that_fails_is_seen(tmp_path: Path) -> None:
    with DocsShell(tmp_path) as shell:
        assert shell.run("false\ntrue")[0] == 1
        assert shell.run("false || true\nname=value")[0] == 0
        assert shell.run("echo $name") == (0, "value\n")


@pytest.mark.parametrize(
    "page",
    [
        "```\nnetfenced list\n```",
        "```sh\nnetfenced list\n```",
        "```text\n$ netfenced list\n```",
        "- item\n  ```bash\n  netfenced list\n  ```",
        "<!-- not run: -->\n```bash\nnetfenced list\n```",
        "<!-- run: some day -->\n```bash\nnetfenced list\n```",
        "```bash\nnetfenced list\n",
    ],
)
def test_no_command_hides(page: str) -> None:
    with pytest.raises(BlockError):
        blocks(page)


def test_a_session_is_cut_at_its_prompts() -> None:
    (block,) = blocks("```console\n$ cat >f <<'EOF'\n$ no prompt\nEOF\n$ a \\\n    b\nprinted\n$ c\n```")
    texts = [(command.text, command.shown) for command in block.commands()]
    assert texts == [("cat >f <<'EOF'\n$ no prompt\nEOF", None), ("a \\\n    b", "printed"), ("c", None)]


def test_every_reason_not_to_run_is_a_reason() -> None:
    for page in PAGES:
        for block in blocks(page.read_text()):
            assert not block.not_run or re.search(r"\w+ \w+", block.not_run), f"{name(page)}:{block.line}"
            for test in re.findall(r"[\w/.]+\.py", block.not_run):
                assert list(ROOT.glob(f"**/{test}" if "/" not in test else test)), f"{name(page)}:{block.line}: {test}"
