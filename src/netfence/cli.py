"""The click commands; with `command` and the other `cli_` modules the only place that prints.

Answers go to stdout, everything else to stderr as ``netfenced: <what>: <why>; <remedy>``. Exit status: 0 done, 1 the
operation failed, 2 bad usage, 3 no daemon reachable. Heavy imports (gRPC, rich, the daemon itself) happen in the
commands that need them: `--help`, `--version` and completion stay instant.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from netfence import __version__
from netfence.api.views import AttachSpec, DirectionWish, HookWish
from netfence.cli_explain import suggest, why
from netfence.cli_top import top
from netfence.cli_watch import watch
from netfence.command import (
    DEFAULT_SOCKET,
    FAILED,
    UNREACHABLE,
    CommandError,
    Commands,
    complain,
    complete_id,
    complete_interface,
    config_option,
    connected,
    examples,
    json_option,
    parse_metadata,
    show_json,
    show_rows,
)
from netfence.errors import InvalidError, NetfenceError
from netfence.text import printable


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=examples(
        """
netfenced start --policy policy.yaml       # run the daemon with a local policy
netfenced attach --interface veth0         # fence the workload behind veth0
netfenced list --all                       # show every attachment
eval "$(_NETFENCED_COMPLETE=bash_source netfenced)"    # completion in this shell (zsh_source, fish_source)
"""
    ),
)
@click.option(
    "--socket",
    "-s",
    default=DEFAULT_SOCKET,
    envvar="NETFENCE_SOCKET",
    show_default=True,
    show_envvar=True,
    type=click.Path(),
    help="Socket of the daemon's local API.",
)
@click.version_option(__version__, prog_name="netfenced", message="%(prog)s %(version)s")
def cli(socket: str) -> None:
    """Fence what VMs and containers may reach, by eBPF.

    Exit status: 0 done, 1 the operation failed, 2 bad usage, 3 the daemon cannot be reached.
    """
    del socket  # read from the context by the commands that connect


@cli.command(
    epilog=examples(
        """
netfenced start --policy /etc/netfence/policy.yaml
netfenced --socket /run/nf.sock start --config /etc/netfence/netfence.yaml
NETFENCE_LOG_LEVEL=debug netfenced start
"""
    )
)
@config_option
@click.option(
    "--policy",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Local policy file, used while no control plane is configured.",
)
@click.pass_context
def start(ctx: click.Context, config_path: Path | None, policy: Path | None) -> int:
    """Run the daemon in the foreground.

    SIGTERM ends it cleanly, SIGHUP reloads the policy file and TLS files. Filters stay in force when it stops, unless
    enforcement.on_shutdown says otherwise.
    """
    flags: dict[str, object] = {} if policy is None else {"policy_file": str(policy.absolute())}
    loaded = _load_config(ctx, config_path, flags)
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # gRPC writes past our log; what it tells at INFO is no use there
    from netfence.daemon import run  # noqa: PLC0415

    try:
        exit_status: int = run(loaded)
    except NetfenceError as error:
        raise CommandError(_lines(error)) from error
    return exit_status


@cli.command(
    epilog=examples(
        """
netfenced attach --interface veth0
netfenced attach -i tap7 --metadata tenant=acme,vm=7
netfenced attach --cgroup /sys/fs/cgroup/machine.slice/box1 --json
netfenced attach -i eth0 --direction host
"""
    )
)
@click.option("--interface", "-i", metavar="IF", shell_complete=complete_interface, help="Network interface to fence.")
@click.option("--cgroup", "-g", metavar="PATH", type=click.Path(), help="Cgroup (v2) directory to fence.")
@click.option(
    "--metadata",
    metavar="K=V[,K=V]",
    multiple=True,
    callback=parse_metadata,
    help="Facts for the control plane or the policy file's `match`; may be repeated.",
)
@click.option(
    "--hook",
    type=click.Choice(["auto", "tc", "xdp"]),
    default="auto",
    show_default=True,
    help="Program type for an interface; auto is tc. xdp drops floods earlier but slows what passes.",
)
@click.option(
    "--direction",
    type=click.Choice(["auto", "workload", "host"]),
    default="auto",
    show_default=True,
    help="Whether the interface leads to a workload or out of this host; auto tells by its kind.",
)
@json_option
def attach(
    interface: str | None,
    cgroup: str | None,
    metadata: dict[str, str],
    hook: HookWish,
    direction: DirectionWish,
    *,
    as_json: bool,
) -> None:
    """Fence an interface or a cgroup; print its id and DNS address.

    Returns when the first policy is in force. A failure leaves nothing behind.
    """
    if (interface is None) == (cgroup is None):
        raise click.UsageError("give exactly one of --interface and --cgroup", click.get_current_context())
    if cgroup is not None and (hook, direction) != ("auto", "auto"):
        raise click.UsageError("--hook and --direction are for interfaces", click.get_current_context())
    if cgroup is not None:
        cgroup = os.path.abspath(cgroup)  # noqa: PTH100 - resolves "..", which pathlib leaves; the daemon has another cwd
    with connected() as daemon:
        response = daemon.attach(AttachSpec(interface, cgroup, metadata, hook, direction))
    if as_json:
        show_json({"id": response.id, "dns_address": response.dns_address})
    else:
        click.echo(f"id: {response.id}\ndns address: {response.dns_address}")


@cli.command(epilog=examples("netfenced detach --id 6f1c2a9e"))
@click.option(
    "--id",
    "attachment_id",
    required=True,
    metavar="ID",
    shell_complete=complete_id,
    help="From attach; its first characters will do.",
)
@json_option
def detach(attachment_id: str, *, as_json: bool) -> None:
    """Take the fence off a target."""
    with connected() as daemon:
        attachment_id = daemon.whole_id(attachment_id)
        daemon.detach(attachment_id)
    if as_json:
        show_json({"detached": attachment_id})
    else:
        click.echo(f"detached {attachment_id}")


@cli.command(
    "list",
    epilog=examples(
        """
netfenced list
netfenced list --all --json | jq '.attachments[].id'
"""
    ),
)
@click.option("--all", "everything", is_flag=True, help="Show every attachment, not only the first page.")
@click.option(
    "--page-size", type=click.IntRange(1, 1000), default=100, show_default=True, help="Attachments in a page."
)
@json_option
def list_(*, everything: bool, page_size: int, as_json: bool) -> None:
    """Show attachments, oldest first; packets and queries as allowed/blocked."""
    from netfence.api import render  # noqa: PLC0415

    with connected() as daemon:
        page = daemon.list_page(page_size)
        infos, total, more = list(page.attachments), page.total_count, page.next_page_token
        while everything and more:
            page = daemon.list_page(page_size, more)
            infos += page.attachments
            total, more = page.total_count, page.next_page_token
    if as_json:
        documents = [render.attachment_document(info) for info in infos]
        show_json({"attachments": documents, "total_count": total, "complete": not more})
        return
    now = time.time()
    show_rows([render.attachment_row(info, now) for info in infos], render.ATTACHMENT_HEAD)
    if more:
        complain(f"list: {len(infos)} of {total} attachments shown; use --all for the rest")


@cli.command(
    epilog=examples(
        """
netfenced status
netfenced status --json | jq -r .control_plane_state
"""
    )
)
@json_option
def status(*, as_json: bool) -> None:
    """Show the daemon, its control plane, and what this kernel offers."""
    from netfence.api import render  # noqa: PLC0415

    with connected() as daemon:
        answer = daemon.status()
    if as_json:
        show_json(render.status_document(answer))
    else:
        show_rows(render.status_rows(answer))


@cli.command(
    epilog=examples(
        """
netfenced controlplane --policy policy.yaml
netfenced controlplane --policy policy.yaml --listen unix:/run/netfence-plane.sock
netfenced controlplane --policy policy.yaml --listen 0.0.0.0:7443 \\
    --tls-cert plane.pem --tls-key plane.key --tls-client-ca daemons.pem
netfenced controlplane --policy policy.yaml --json | jq -c .policy_file
"""
    )
)
@click.option(
    "--policy",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Policy file, in the format of the daemon's local one.",
)
@click.option(
    "--listen",
    metavar="ADDR",
    default="127.0.0.1:7443",
    show_default=True,
    help="host:port, [IPv6]:port or unix:/path.",
)
@click.option(
    "--tls-cert", type=click.Path(path_type=Path), help="Certificate chain (PEM); read again when it changes."
)
@click.option("--tls-key", type=click.Path(path_type=Path), help="Its key (PEM).")
@click.option(
    "--tls-client-ca", type=click.Path(path_type=Path), help="Daemons must show a certificate of this CA (PEM)."
)
@click.option("--token-file", type=click.Path(path_type=Path), help="Bearer tokens that daemons may use, one a line.")
@click.option("--insecure", is_flag=True, help="Allow plaintext on an address that other hosts reach.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document a line when something changed.")
def controlplane(policy: Path, listen: str, *, insecure: bool, as_json: bool, **files: Path | None) -> int:
    """Run a control plane that gives a fleet of daemons the policies of a file.

    The file is read again when it changes, and on SIGHUP, which also sends again what a daemon refused; one with
    errors changes nothing. On a terminal a page shows the daemons and their attachments. SIGTERM ends it; the daemons
    keep the policies that they have.
    """
    cert, key, client_ca = (files[name] for name in ("tls_cert", "tls_key", "tls_client_ca"))
    if (cert is None) != (key is None):
        raise click.UsageError("--tls-cert and --tls-key are given together or not at all", click.get_current_context())
    if client_ca is not None and cert is None:
        raise click.UsageError("--tls-client-ca needs --tls-cert and --tls-key", click.get_current_context())
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # gRPC writes past our log, on the page too
    from netfence.controlplane.command import Options, run  # noqa: PLC0415
    from netfence.controlplane.tls import ServerTls  # noqa: PLC0415

    tls = None if cert is None or key is None else ServerTls(cert, key, client_ca)
    try:
        exit_status: int = run(Options(policy, listen, tls, files["token_file"], insecure, as_json))
    except NetfenceError as error:
        raise CommandError(_lines(error)) from None
    return exit_status


@cli.group()
def policy() -> None:
    """Work on local policy files."""


@policy.command(epilog=examples("netfenced policy check /etc/netfence/policy.yaml"))
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@json_option
def check(file: Path, *, as_json: bool) -> int:
    """Validate a policy file: every error with file, line and key. Needs no daemon."""
    from netfence.control.policyfile import load_policy_file  # noqa: PLC0415

    try:
        loaded = load_policy_file(file)
    except InvalidError as error:
        if as_json:
            show_json({"file": str(file), "ok": False, "errors": list(error.errors), "warnings": []})
            return FAILED
        count = len(error.errors)
        what = "1 error" if count == 1 else f"{count} errors"
        raise CommandError([*error.errors, f"policy check {file}: {what}; the daemon would refuse this file"]) from None
    if as_json:
        show_json({"file": str(file), "ok": True, "errors": [], "warnings": list(loaded.warnings)})
        return 0
    for warning in loaded.warnings:
        complain(f"warning: {warning}")
    default = "a default" if loaded.default else "no default (block_all)"
    count = len(loaded.rules)
    click.echo(f"{file}: ok, {count} {'rule' if count == 1 else 'rules'} and {default}")
    return 0


@cli.group()
def config() -> None:
    """Look at the configuration."""


@config.command(
    epilog=examples(
        """
netfenced config show
netfenced config show --config /etc/netfence/netfence.yaml --json
"""
    )
)
@config_option
@json_option
@click.pass_context
def show(ctx: click.Context, config_path: Path | None, *, as_json: bool) -> None:
    """Show the configuration in force and where each value came from.

    As the running daemon has it. With --config, or where no daemon answers: as a daemon started here would.
    """
    values = None if config_path else _configuration_in_force()
    if values is None:
        values = _load_config(ctx, config_path, {}).told()
    if as_json:
        show_json({key: {"value": value, "source": source} for key, (value, source) in sorted(values.items())})
    else:
        rows = [[key, _plain(value), source] for key, (value, source) in sorted(values.items())]
        show_rows([[printable(cell) for cell in row] for row in rows], ("key", "value", "from"))


def _configuration_in_force() -> dict[str, tuple[object, str]] | None:
    """Ask the daemon; None, and a word on stderr, where none answers."""
    try:
        with connected() as daemon:
            answer = daemon.status()
    except CommandError as error:
        if error.status != UNREACHABLE:
            raise
        complain("config show: no daemon answers; shown is what `netfenced start` would take, without --config")
        return None
    if not answer.config:
        raise CommandError([f"config show: netfenced {answer.version} does not tell its configuration; give --config"])
    return {key: (json.loads(answer.config[key].json), answer.config[key].source) for key in answer.config}


def _plain(value: object) -> str:
    """Return a configuration value as YAML would read it, on one line; JSON is the part of YAML that fits."""
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def _load_config(ctx: click.Context, path: Path | None, flags: dict[str, object]) -> Any:  # noqa: ANN401
    from netfence.config import load  # noqa: PLC0415

    root = ctx.find_root()
    # The environment's NETFENCE_SOCKET is config's own business; only a flag has to be passed on.
    if root.get_parameter_source("socket") is ParameterSource.COMMANDLINE:
        flags = flags | {"socket": os.path.abspath(root.params["socket"])}  # noqa: PTH100
    try:
        return load(path, os.environ, flags)
    except NetfenceError as error:
        raise CommandError(_lines(error)) from None


def _lines(error: NetfenceError) -> list[str]:
    """Return an error's lines: one for each fault."""
    return list(error.errors) if isinstance(error, InvalidError) else [str(error)]


cli.add_command(why)
cli.add_command(suggest)
cli.add_command(watch)
cli.add_command(top)


def main() -> None:
    """Entry point of `netfenced`."""
    cli.main(prog_name="netfenced")
