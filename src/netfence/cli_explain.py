"""`netfenced why` and `netfenced suggest`: what the fence does and why, and a policy out of what it saw.

Prints only; the daemon finds out and `api.explain_render` says how it looks.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import click

from netfence.command import CommandError, colour, complain, complete_id, connected, examples, json_option, show_json
from netfence.text import printable

_STYLES: Final[Mapping[str, Mapping[str, Any]]] = {
    "pass": {"fg": "green"},
    "drop": {"fg": "red", "bold": True},
    "would_drop": {"fg": "yellow"},
    "kind": {"dim": True},
    "remedy": {"bold": True},
}

_id_option = click.option(
    "--id",
    "attachment_id",
    required=True,
    metavar="ID",
    shell_complete=complete_id,
    help="From attach or list; its first characters will do.",
)


@click.command(
    epilog=examples(
        """
netfenced why --id 6f1c2a9e pypi.org
netfenced why --id 6f1c2a9e 192.0.2.7
netfenced why --id 6f1c2a9e pypi.org --json | jq -r '.remedies[]'
"""
    )
)
@_id_option
@click.argument("subject", metavar="NAME|ADDRESS")
@json_option
def why(attachment_id: str, subject: str, *, as_json: bool) -> None:
    """Tell what would happen now to a name or an address, and why.

    From the name over its rule, CNAMEs and addresses to leases, CIDR rules and the verdict, as the kernel would decide
    at this moment, and what to add to change it. Changes nothing and opens nothing. The exit status does not tell the
    verdict.
    """
    from netfence.api import explain_render  # noqa: PLC0415

    with connected() as daemon:
        answer = daemon.explain(daemon.whole_id(attachment_id), subject)
    if as_json:
        show_json(explain_render.explanation_document(answer))
        return
    for line in explain_render.explanation_lines(answer):
        click.echo("".join(click.style(text, **_STYLES.get(style, {})) for text, style in line), color=colour())


@click.command(
    epilog=examples(
        """
netfenced suggest --id 6f1c2a9e
netfenced suggest --id 6f1c2a9e --output suggested.yaml && netfenced policy check suggested.yaml
"""
    )
)
@_id_option
@click.option(
    "--output",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the policy file here, where nothing is yet.",
)
@json_option
def suggest(attachment_id: str, output: Path | None, *, as_json: bool) -> None:
    """Make a policy of what audit mode let through.

    The smallest allowlist that would have let it through: the rules in force, then names, then CIDRs for the rest, with
    comments on what went where. Read it before use: an audited workload can ask for whatever it likes.
    """
    with connected() as daemon:
        answer = daemon.suggest(daemon.whole_id(attachment_id))
    if output is not None:
        _write(output, answer.policy)
    if as_json:
        document = {"policy": answer.policy, "missed": answer.missed}
        show_json(document if output is None else {**document, "output": str(output)})
    elif output is not None:
        click.echo(f"{printable(str(output))}: written; look through it, then `netfenced policy check` it")
    else:
        click.echo("\n".join(map(printable, answer.policy.split("\n"))), nl=False)
    if answer.missed:
        complain(f"suggest: {answer.missed} packets went to more destinations than were recorded; see the comments")


def _write(output: Path, text: str) -> None:
    try:
        with output.open("x", encoding="utf-8") as file:  # never over a file that a daemon may be reading
            file.write(text)
    except FileExistsError:
        raise CommandError([f"suggest: write {output}: it exists already; name another file, or remove it"]) from None
    except OSError as error:
        raise CommandError([f"suggest: write {output}: {error.strerror}; name another file"]) from None
