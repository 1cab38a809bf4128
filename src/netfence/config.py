"""The daemon's configuration: every key, its default, and which source a value came from.

Keys and defaults are those of `netfence.yaml` beside this file (a test compares them); what a value may be is in
`config_values`, how sources are read in `config_sources`. Durations are seconds, sizes bytes. Flags win over the
environment over the file over the default. To add a key: a field here, a line there.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from netfence import config_values as read
from netfence.config_sources import Given, Keys, from_environ, from_file, from_flags
from netfence.errors import InvalidError
from netfence.policy.limits import MAX_ERROR_TEXT, MAX_UPSTREAMS
from netfence.policy.prefix import Key, address_text, parse_address, parse_cidr
from netfence.policy.upstream import DNS_PORT, upstream_text

RESOLV_CONF: Final = Path("/etc/resolv.conf")
HOUR_S: Final = 3600.0
DAY_S: Final = 86_400.0
PORT: Final = read.integer(1, 65_535)
LEASES: Final = read.integer(1, 1 << 24)
CIDRS: Final = read.list_of(read.cidr, 1024)
DOMAINS: Final = read.list_of(read.domain, 64)
URLS: Final = read.list_of(read.url, read.MAX_URLS)

OptionalPath = Annotated[Path | None, BeforeValidator(read.optional(read.absolute_path))]
OptionalText = Annotated[str | None, BeforeValidator(read.optional(read.identifier))]
Flag = Annotated[bool, BeforeValidator(read.boolean)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Dns(_Section):
    """`dns`: the DNS servers of the attachments and the leases that their answers open."""

    listen_addr: Annotated[str, BeforeValidator(read.listen_addr)] = "127.0.0.1"
    port_min: Annotated[int, BeforeValidator(PORT)] = 11_000
    port_max: Annotated[int, BeforeValidator(PORT)] = 15_999
    upstreams: Annotated[tuple[str, ...] | None, BeforeValidator(read.upstreams)] = None
    timeout: Annotated[float, BeforeValidator(read.duration(0.01, 60))] = 2.0
    attempts: Annotated[int, BeforeValidator(read.integer(1, 10))] = 2
    reject_rcode: Annotated[Literal["refused", "nxdomain"], BeforeValidator(read.choice("refused", "nxdomain"))] = (
        "refused"
    )
    min_lease: Annotated[float, BeforeValidator(read.duration(0))] = 300.0
    lease_grace: Annotated[float, BeforeValidator(read.duration(0))] = 60.0
    max_lease: Annotated[float, BeforeValidator(read.duration(1))] = DAY_S
    established_idle: Annotated[float, BeforeValidator(read.duration(0))] = 2 * HOUR_S
    established_max: Annotated[float, BeforeValidator(read.duration(0))] = DAY_S
    max_leases: Annotated[int, BeforeValidator(LEASES)] = 16_384
    max_leases_total: Annotated[int, BeforeValidator(LEASES)] = 262_144
    allow_private: Annotated[tuple[str, ...], BeforeValidator(CIDRS)] = ()
    search_domains: Annotated[tuple[str, ...], BeforeValidator(DOMAINS)] = ()
    max_qps: Annotated[int, BeforeValidator(read.integer(0, 1_000_000))] = 0

    @property
    def allow_private_keys(self) -> tuple[Key, ...]:
        """`allow_private` as keys of `netfence.policy`."""
        return tuple(map(parse_cidr, self.allow_private))


class Tls(_Section):
    """`control_plane.tls`: files in PEM; `ca` alone is TLS, `cert` and `key` make it mutual."""

    ca: OptionalPath = None
    cert: OptionalPath = None
    key: OptionalPath = None
    server_name: OptionalText = None


class ControlPlane(_Section):
    """`control_plane`: the remote control plane. An empty `url` means there is none."""

    url: Annotated[tuple[str, ...], BeforeValidator(URLS)] = ()
    subscribe_ack_timeout: Annotated[float, BeforeValidator(read.duration(0, HOUR_S))] = 5.0
    heartbeat_interval: Annotated[float, BeforeValidator(read.duration(0.1, DAY_S))] = 30.0
    query_timeout: Annotated[float, BeforeValidator(read.duration(0.01, 60))] = 2.0
    tls: Tls = Tls()
    token_file: OptionalPath = None
    insecure: Flag = False
    max_stale: Annotated[float, BeforeValidator(read.duration(0))] = 0.0
    stale_action: Annotated[Literal["keep", "block_all"], BeforeValidator(read.choice("keep", "block_all"))] = "keep"
    max_message_size: Annotated[int, BeforeValidator(read.size(64 << 10, (2 << 30) - 1))] = 64 << 20


class Enforcement(_Section):
    """`enforcement`: what holds for every attachment."""

    start_mode: Annotated[Literal["block_all", "disabled"], BeforeValidator(read.choice("block_all", "disabled"))] = (
        "block_all"
    )
    on_shutdown: Annotated[Literal["keep", "detach"], BeforeValidator(read.choice("keep", "detach"))] = "keep"
    allow_dhcp: Flag = True
    allow_replies: Annotated[Literal["off", "host", "any"], BeforeValidator(read.choice("off", "host", "any"))] = "host"
    allow_link_local: Flag = False


class Metrics(_Section):
    """`metrics`: the Prometheus endpoint."""

    listen: Annotated[str | None, BeforeValidator(read.optional(read.host_port))] = None


class Config(_Section):
    """The whole configuration. Immutable; `Config()` is the defaults."""

    socket: Annotated[Path, BeforeValidator(read.socket_path)] = Path("/var/run/netfence.sock")
    socket_group: Annotated[str | None, BeforeValidator(read.optional(read.group))] = None
    data_dir: Annotated[Path, BeforeValidator(read.absolute_path)] = Path("/var/lib/netfence")
    bpffs_dir: Annotated[Path, BeforeValidator(read.absolute_path)] = Path("/sys/fs/bpf/netfence")
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], BeforeValidator(read.choice("debug", "info", "warning", "error"))
    ] = "info"
    log_format: Annotated[
        Literal["auto", "console", "json"], BeforeValidator(read.choice("auto", "console", "json"))
    ] = "auto"
    metadata: Annotated[Mapping[str, str], BeforeValidator(read.metadata)] = Field(default_factory=dict)
    policy_file: OptionalPath = None
    daemon_id: OptionalText = None
    dns: Dns = Dns()
    control_plane: ControlPlane = ControlPlane()
    enforcement: Enforcement = Enforcement()
    metrics: Metrics = Metrics()


class Loaded(NamedTuple):
    """The configuration in force; `sources` has every key (`dns.listen_addr`) and where its value came from."""

    config: Config
    sources: dict[str, str]

    def told(self) -> dict[str, tuple[object, str]]:
        """Return what JSON can say of it: dotted key → value and where it came from."""
        values = _leaves(self.config.model_dump(mode="json"), self.sources)
        return {key: (value, self.sources.get(key, "default")) for key, value in values.items()}


def _leaves(tree: Mapping[str, object], keys: Container[str], prefix: str = "") -> dict[str, object]:
    """Return dotted keys with their values; a mapping that is itself one of `keys` (metadata) is a value."""
    leaves: dict[str, object] = {}
    for name, value in tree.items():
        key = prefix + name
        if isinstance(value, dict) and value and key not in keys:
            leaves |= _leaves(value, keys, f"{key}.")
        else:
            leaves[key] = value
    return leaves


def _walk(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, bool]]:
    """Yield (path, is a section) of every key of a model."""
    for name, info in model.model_fields.items():
        path = f"{prefix}{name}"
        kind = info.annotation
        section = isinstance(kind, type) and issubclass(kind, BaseModel)
        yield path, section
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _walk(kind, f"{path}.")


KEYS: Final = Keys(
    leaves=tuple(path for path, section in _walk(Config) if not section),
    sections=tuple(path for path, section in _walk(Config) if section),
)


def load(path: Path | None, environ: Mapping[str, str], flags: Mapping[str, object]) -> Loaded:
    """Return the configuration of a file (None: no file), the environment and flags (by path; None: not given).

    Raises InvalidError with every fault: file and line or variable, key, value and what is allowed.
    """
    faults: list[str] = []
    given: dict[str, Given] = {}
    if path is not None:
        given |= from_file(path, KEYS, faults)
    given |= from_environ(environ, KEYS, faults)
    given |= from_flags(flags, KEYS, faults)
    bad: set[str] = set()
    try:
        config = Config.model_validate(_tree(given))
    except ValidationError as error:
        for fault in error.errors():
            key = ".".join(map(str, fault["loc"]))
            bad.add(key)
            faults.append(f"{given[key].source}: {key}: {_shown(given[key].value)}: {_why(fault)}")
        # With the defaults in place of what is bad the rest can still be checked, so that all faults are told at once.
        config = Config.model_validate(_tree({key: value for key, value in given.items() if key not in bad}))
    for keys, message in _conflicts(config):
        if not bad & set(keys):
            sources = ", ".join(dict.fromkeys(given[key].source for key in keys if key in given)) or "default"
            faults.append(f"{sources}: {message}")
    if faults:
        raise InvalidError(faults)
    return Loaded(config, {key: given[key].source if key in given else "default" for key in KEYS.leaves})


def _tree(given: Mapping[str, Given]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, (value, _) in given.items():
        *sections, name = path.split(".")
        table = tree
        for section in sections:
            table = table.setdefault(section, {})
        table[name] = value
    return tree


def _why(fault: Any) -> str:  # noqa: ANN401 - pydantic's dict of an error
    error = fault.get("ctx", {}).get("error")
    return str(error) if isinstance(error, ValueError) else str(fault["msg"])


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= MAX_ERROR_TEXT else f"{text[:MAX_ERROR_TEXT]}…"


def _conflicts(config: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield (keys, message) of values that are each good but not together."""
    dns, control = config.dns, config.control_plane
    for less, more in (("port_min", "port_max"), ("min_lease", "max_lease"), ("max_leases", "max_leases_total")):
        low, high = getattr(dns, less), getattr(dns, more)
        if low > high:
            yield (
                (f"dns.{less}", f"dns.{more}"),
                f"dns.{less}: {low:g}: allowed is at most dns.{more}, which is {high:g}",
            )
    tls = control.tls
    if (tls.cert is None) != (tls.key is None):
        lone, other = ("cert", "key") if tls.key is None else ("key", "cert")
        key = f"control_plane.tls.{lone}"
        need = f"control_plane.tls.{other}"
        yield (key, need), f"{key}: {str(getattr(tls, lone))!r}: allowed only together with {need}"
    for name in ("cert", "key", "server_name"):
        value = getattr(tls, name)
        if value is not None and tls.ca is None:
            key = f"control_plane.tls.{name}"
            yield (
                (key, "control_plane.tls.ca"),
                f"{key}: {str(value)!r}: allowed only together with control_plane.tls.ca",
            )
    if tls.ca is None and not control.insecure:
        keys = ("control_plane.url", "control_plane.tls.ca", "control_plane.insecure")
        why = "plaintext to another host is not allowed; set control_plane.tls.ca, or control_plane.insecure to true"
        yield from ((keys, f"{keys[0]}: {address!r}: {why}") for address in control.url if not _is_local(address))


def _is_local(url: str) -> bool:
    """Tell whether a control plane's address stays on this host."""
    if url.startswith("unix:/"):  # without the slash it is a host of that name
        return True
    host = url.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def system_upstreams(path: Path = RESOLV_CONF) -> tuple[str, ...]:
    """Return the name servers of a resolv.conf as upstreams, in order; empty when there is no file or none in it.

    What is not an address is left out, as the resolver does; a link-local one keeps its zone.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ()
    found: dict[str, None] = {}
    for line in lines:
        words = line.split()
        if len(words) < 2 or words[0] != "nameserver":
            continue
        host, percent, zone = words[1].partition("%")
        try:
            found[upstream_text(address_text(parse_address(host)) + percent + zone, DNS_PORT)] = None
        except ValueError:
            continue
    return tuple(found)[:MAX_UPSTREAMS]
