"""What all commands of `netfenced` share: exit statuses, the form of errors, output, options, completion.

With `cli` and the `cli_` modules the only place that prints. Heavy imports (gRPC, rich) happen where they are needed:
`--help`, `--version` and bad usage stay instant.
"""

from __future__ import annotations

import io
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import click
from click.shell_completion import CompletionItem

from netfence.text import printable

if TYPE_CHECKING:
    from netfence.api.client import DaemonClient

DEFAULT_SOCKET: Final = "/var/run/netfence.sock"

FAILED: Final = 1
USAGE: Final = 2
UNREACHABLE: Final = 3
INTERRUPTED: Final = 130

COMPLETE_S: Final = 1.0
"""How long the tab key may wait for a daemon."""


class CommandError(Exception):
    """A command failed: the lines for stderr and the exit status."""

    def __init__(self, lines: Sequence[str], status: int = FAILED) -> None:
        self.lines = lines
        self.status = status
        super().__init__("\n".join(lines))


class Commands(click.Group):
    """The group with our form of errors and exit statuses in place of click's."""

    def main(  # type: ignore[override]  # ends the process whatever standalone_mode says
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        **extra: Any,  # noqa: ANN401 - click passes what it likes
    ) -> NoReturn:
        """Run a command and end the process with its exit status."""
        extra["standalone_mode"] = False
        try:
            status = super().main(args, prog_name, **extra)
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message(), err=True)
            status = USAGE
        except click.UsageError as error:
            path = error.ctx.command_path if error.ctx else "netfenced"
            what = path.removeprefix("netfenced").strip()
            complain(f"{what + ': ' if what else ''}{_sentence(error.format_message())}; see `{path} --help`")
            status = USAGE
        except click.ClickException as error:
            complain(error.format_message())
            status = error.exit_code
        except CommandError as error:
            for line in error.lines:
                complain(line)
            status = error.status
        except click.Abort:
            status = INTERRUPTED
        sys.exit(status if isinstance(status, int) else 0)


def examples(text: str) -> str:
    """Return an epilog of examples that click does not wrap."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in text.strip().splitlines())


def complain(line: str) -> None:
    """Print one line of error or warning."""
    click.echo(f"netfenced: {printable(line)}", err=True)


def _sentence(text: str) -> str:
    """Return click's message in our form: it begins small and ends without a full stop."""
    text = " ".join(text.split()).rstrip(".")
    return text[:1].lower() + text[1:]


def _quieten_grpc() -> None:
    """Keep gRPC from writing lines of its own to stderr; it asks when it is loaded."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")


def colour() -> bool | None:
    """Tell click whether to colour: never with NO_COLOR (no-color.org), else as it sees fit."""
    return False if os.environ.get("NO_COLOR") else None


@contextmanager
def connected() -> Iterator[DaemonClient]:
    """Give a connected client; its errors become ours."""
    _quieten_grpc()
    from netfence.api.client import DaemonClient, RefusedError, UnreachableError  # noqa: PLC0415

    path = Path(click.get_current_context().find_root().params["socket"])
    try:
        with DaemonClient(path) as client:
            yield client
    except RefusedError as error:
        raise CommandError([str(error)]) from None
    except UnreachableError as error:
        raise CommandError([str(error)], UNREACHABLE) from None


@contextmanager
def until_interrupted() -> Iterator[None]:
    """End quietly by Ctrl-C, and when nobody reads what we print any more."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # its encoding may lack what others call their targets
    try:
        yield
    except KeyboardInterrupt:
        pass
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's own flush at the end complains


def show_rows(rows: list[Sequence[str]], head: Sequence[str] | None = None) -> None:
    """Print rows as a table on a terminal, as plain columns elsewhere."""
    from netfence.api import render  # noqa: PLC0415

    if sys.stdout.isatty():
        from rich.console import Console  # noqa: PLC0415

        Console().print(render.table(rows, head))
    else:
        click.echo(render.columns(rows, head))


def show_json(document: object) -> None:
    """Print one JSON document."""
    from netfence.api.render import json_text  # noqa: PLC0415

    click.echo(json_text(document))


def complete_id(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Offer the ids of the running daemon, with their targets; nothing if it cannot be asked."""
    socket = ctx.find_root().params.get("socket") or DEFAULT_SOCKET
    _quieten_grpc()
    try:
        from netfence.api.client import DaemonClient  # noqa: PLC0415

        with DaemonClient(Path(socket), COMPLETE_S) as client:
            infos = list(client.list_all())
    except Exception:  # noqa: BLE001 - completion has nowhere to complain
        return []
    return [CompletionItem(info.id, help=info.target) for info in infos if info.id.startswith(incomplete)]


def complete_interface(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Offer this host's interfaces."""
    try:
        return sorted(name for name in os.listdir("/sys/class/net") if name.startswith(incomplete))  # noqa: PTH208
    except OSError:
        return []


def finite(_ctx: click.Context, _param: click.Parameter, value: float) -> float:
    """Refuse NaN, which passes every range."""
    if not math.isfinite(value):
        raise click.BadParameter(f"{value} is not a number in the range")
    return value


def parse_metadata(_ctx: click.Context, _param: click.Parameter, values: Sequence[str]) -> dict[str, str]:
    """Turn ``k=v[,k=v]`` options into one mapping; a bad one is bad usage."""
    from netfence.api.metadata import metadata_errors  # noqa: PLC0415

    metadata: dict[str, str] = {}
    for pair in (pair for value in values for pair in value.split(",")):
        key, equals, content = pair.partition("=")
        if not equals or not key:
            raise click.BadParameter(f"{pair!r} is not of the form key=value")
        if key in metadata:
            raise click.BadParameter(f"key {key!r} is given twice")
        metadata[key] = content
    if errors := metadata_errors(metadata):
        raise click.BadParameter("; ".join(errors))
    return metadata


json_option: Callable[[Callable[..., Any]], Callable[..., Any]] = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document."
)
config_option: Callable[[Callable[..., Any]], Callable[..., Any]] = click.option(
    "--config",
    "config_path",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Configuration file (YAML).",
)
