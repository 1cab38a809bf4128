"""`netfenced watch`: decisions as they are made, a line each.

Owns what the command line filters beyond what the daemon does, and how loss is told. How a line looks is
`api.flow_render`'s.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Final

import click

from netfence.command import colour, complain, complete_id, connected, examples, until_interrupted

if TYPE_CHECKING:
    from netfence.api.client import DaemonClient
    from netfence.api.flow_render import Who
    from netfence.policy.prefix import Key

VERDICTS: Final = ("drop", "pass", "would_drop")
KINDS: Final = ("packet", "dns")
NUMBERS: Final = {"6": "tcp", "17": "udp", "1": "icmp", "58": "icmpv6"}

TELL_S: Final = 1.0
"""Between two lines about lost events."""

ASK_S: Final = 1.0
"""Between two questions about attachments that nobody knew the last time."""

STALE_S: Final = 30.0
"""How long what is known of attachments is believed: interfaces are renamed."""

_STYLES: Final[Mapping[str, Mapping[str, Any]]] = {
    "time": {"dim": True},
    "pass": {"fg": "green"},
    "drop": {"fg": "red", "bold": True},
    "would_drop": {"fg": "yellow"},
    "who": {"fg": "cyan"},
    "why": {"dim": True},
}


@dataclass(frozen=True, slots=True)
class Filter:
    """Which events are shown, of those that the daemon sends."""

    kind: str | None = None
    to: Key | None = None
    name: str | None = None
    protocol: str | None = None

    def shows(self, event: Any) -> bool:  # noqa: ANN401 - a FlowEvent, whose module stays at the edge
        """Tell whether an event is among them."""
        if self.kind is not None and event.kind != self.kind:
            return False
        if self.protocol is not None and event.protocol != self.protocol:
            return False
        if self.name is not None and not (event.domain and fnmatchcase(event.domain, self.name)):
            return False
        return self.to is None or (event.kind == "packet" and _inside(event.destination, self.to))


def _inside(place: str, prefix: Key) -> bool:
    """Tell whether ``address``, ``address:port`` or ``[address]:port`` lies in the prefix."""
    from netfence.policy.prefix import key_of, parse_address  # noqa: PLC0415 - it imports socket

    text = place
    if place.startswith("["):
        text = place[1:].partition("]")[0]
    elif place.count(":") == 1:
        text = place.partition(":")[0]
    try:
        address = parse_address(text)
    except ValueError:  # not known
        return False
    return len(address) == len(prefix) - 1 and key_of(address, prefix[-1]) == prefix


def _parse_to(_ctx: click.Context, _param: click.Parameter, value: str | None) -> Key | None:
    if value is None:
        return None
    from netfence.policy.prefix import parse_cidr  # noqa: PLC0415 - as in `_inside`

    try:
        return parse_cidr(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def _parse_name(_ctx: click.Context, _param: click.Parameter, value: str | None) -> str | None:
    if value is None:
        return None
    if not (name := value.lower().removesuffix(".")):
        raise click.BadParameter("it is empty; write a name, or a pattern like '*.example.com'")
    return name


def _parse_protocol(_ctx: click.Context, _param: click.Parameter, value: str | None) -> str | None:
    if value is None:
        return None
    word = value.lower()
    if word.isascii() and word.isdigit() and int(word) < 256:
        word = str(int(word))
        return NUMBERS.get(word, word)
    if word not in NUMBERS.values():
        known = ", ".join(NUMBERS.values())
        raise click.BadParameter(f"{value!r} is no protocol; use {known}, or an IP protocol's number")
    return word


@click.command(
    epilog=examples(
        """
netfenced watch                                      # everything, of all attachments
netfenced watch --id 6f1c2a9e --verdict drop         # what one workload is denied
netfenced watch --kind dns --name '*.example.com'
netfenced watch --to 10.0.0.0/8 --count 10
netfenced watch --json | jq -r 'select(.verdict == "drop") | .destination'
"""
    )
)
@click.option(
    "--id",
    "attachment_id",
    metavar="ID",
    shell_complete=complete_id,
    help="Only this attachment; the first characters of its id will do.",
)
@click.option(
    "--verdict", "verdicts", multiple=True, type=click.Choice(VERDICTS), help="Only these verdicts; may be repeated."
)
@click.option("--kind", type=click.Choice(KINDS), help="Only packets, or only DNS queries.")
@click.option("--to", metavar="CIDR", callback=_parse_to, help="Only packets to this address or prefix.")
@click.option("--name", metavar="GLOB", callback=_parse_name, help="Only queries for, or packets to, such names.")
@click.option("--protocol", metavar="PROTO", callback=_parse_protocol, help="Only tcp, udp, icmp, icmpv6, or a number.")
@click.option("--count", type=click.IntRange(min=1), help="End after so many.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document a line.")
def watch(
    attachment_id: str | None,
    verdicts: tuple[str, ...],
    count: int | None,
    *,
    as_json: bool,
    **wanted: Any,  # noqa: ANN401 - made of the options that `Filter` names
) -> int:
    """Show drops, would-drops and DNS decisions as they are made.

    Passed packets make no event. Events are lost where there are more than can be told; how many, is said. Ends with
    Ctrl-C, or when the attachment of --id leaves.
    """
    chosen = Filter(**wanted)
    _check(attachment_id, verdicts, chosen)
    with (
        until_interrupted(),
        connected() as daemon,
        daemon.watch(daemon.whole_id(attachment_id or ""), verdicts) as stream,
    ):
        show = _json_line if as_json else _line
        known = Known(daemon)
        loss = Loss(told=not as_json)
        shown = 0
        try:
            for event in stream:
                loss.add(event.lost)
                alone = event.kind == "lost"
                if alone and not as_json:
                    loss.tell()
                if not (as_json if alone else chosen.shows(event)):
                    continue
                if as_json:
                    event.lost = loss.taken()
                show(event, known.who(event.id))
                shown += not alone
                if shown == count:
                    break
            else:
                complain(f"watch: attachment {attachment_id} left")
        finally:  # Ctrl-C too: a flood is what people press it in
            loss.tell()
    return 0


def _check(attachment_id: str | None, verdicts: Sequence[str], chosen: Filter) -> None:
    """Refuse what can show nothing."""
    ctx = click.get_current_context()
    if attachment_id == "":
        raise click.UsageError("--id is empty; leave it out for all attachments", ctx)
    if chosen.kind == "packet" and set(verdicts) == {"pass"}:
        raise click.UsageError("passed packets make no event; leave out --verdict pass", ctx)
    if chosen.to is not None and (chosen.kind == "dns" or set(verdicts) == {"pass"}):
        raise click.UsageError("--to is about packets that did not pass; leave out --to", ctx)


class Known:
    """Targets and metadata of attachments: asked for when an unknown one appears."""

    def __init__(self, daemon: DaemonClient, clock: Callable[[], float] = time.monotonic) -> None:
        self._daemon, self._clock = daemon, clock
        self._who: dict[str, Who] = {}
        self._asked = float("-inf")

    def who(self, attachment_id: str) -> Who:
        """Tell what is known of an attachment."""
        from netfence.api.flow_render import Who  # noqa: PLC0415 - see `command`: gRPC is slow to import

        if not attachment_id:
            return Who()
        age_s = self._clock() - self._asked
        if age_s >= (STALE_S if attachment_id in self._who else ASK_S):
            self._asked = self._clock()
            self._who = {info.id: Who.of(info) for info in self._daemon.list_all()}
        return self._who.get(attachment_id) or Who()


class Loss:
    """How many events were lost since that was last told, on stderr if `told`."""

    def __init__(self, *, told: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._told, self._clock = told, clock
        self._count = 0
        self._next = float("-inf")

    def add(self, count: int) -> None:
        """Note a loss, and tell it if the last was told long enough ago."""
        self._count += count
        if self._clock() >= self._next:
            self.tell()

    def tell(self) -> None:
        """Tell what has not been told."""
        if self._told and self._count:
            many = "1 event was" if self._count == 1 else f"{self._count} events were"
            complain(f"watch: {many} lost: more happens than can be shown; narrow it with --id or --verdict")
            self._count = 0
            self._next = self._clock() + TELL_S

    def taken(self) -> int:
        """Return what was lost, which is told thereby."""
        count, self._count = self._count, 0
        return count


def _line(event: Any, who: Who) -> None:  # noqa: ANN401 - as in `Filter`
    from netfence.api.flow_render import flow_line  # noqa: PLC0415

    pieces = [click.style(text, **_STYLES.get(kind, {})) for text, kind in flow_line(event, who)]
    click.echo("  ".join(pieces), color=colour())


def _json_line(event: Any, who: Who) -> None:  # noqa: ANN401 - as in `Filter`
    from netfence.api.flow_render import flow_document  # noqa: PLC0415

    click.echo(json.dumps(flow_document(event, who)))
