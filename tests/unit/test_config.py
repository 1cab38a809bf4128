"""The configuration: defaults, precedence and provenance, what goes together, and all faults at once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from pydantic import ValidationError

import netfence
from netfence.config import KEYS, Config, Loaded, load, system_upstreams
from netfence.errors import InvalidError
from netfence.policy.limits import MAX_UPSTREAMS
from netfence.policy.prefix import parse_cidr

REFERENCE = Path(netfence.__file__).parent / "netfence.yaml"

# The table of cli-and-config.md, key by key; durations in seconds, sizes in bytes.
DEFAULTS: dict[str, object] = {
    "socket": Path("/var/run/netfence.sock"),
    "socket_group": None,
    "data_dir": Path("/var/lib/netfence"),
    "bpffs_dir": Path("/sys/fs/bpf/netfence"),
    "log_level": "info",
    "log_format": "auto",
    "metadata": {},
    "policy_file": None,
    "daemon_id": None,
    "dns.listen_addr": "127.0.0.1",
    "dns.port_min": 11000,
    "dns.port_max": 15999,
    "dns.upstreams": None,
    "dns.timeout": 2.0,
    "dns.attempts": 2,
    "dns.reject_rcode": "refused",
    "dns.min_lease": 300.0,
    "dns.lease_grace": 60.0,
    "dns.max_lease": 86400.0,
    "dns.established_idle": 7200.0,
    "dns.established_max": 86400.0,
    "dns.max_leases": 16384,
    "dns.max_leases_total": 262144,
    "dns.allow_private": (),
    "dns.search_domains": (),
    "dns.max_qps": 0,
    "control_plane.url": (),
    "control_plane.subscribe_ack_timeout": 5.0,
    "control_plane.heartbeat_interval": 30.0,
    "control_plane.query_timeout": 2.0,
    "control_plane.tls.ca": None,
    "control_plane.tls.cert": None,
    "control_plane.tls.key": None,
    "control_plane.tls.server_name": None,
    "control_plane.token_file": None,
    "control_plane.insecure": False,
    "control_plane.max_stale": 0.0,
    "control_plane.stale_action": "keep",
    "control_plane.max_message_size": 64 * 1024 * 1024,
    "enforcement.start_mode": "block_all",
    "enforcement.on_shutdown": "keep",
    "enforcement.allow_dhcp": True,
    "enforcement.allow_replies": "host",
    "enforcement.allow_link_local": False,
    "metrics.listen": None,
}


def value_of(config: Config, path: str) -> object:
    value: object = config
    for name in path.split("."):
        value = getattr(value, name)
    return value


def loaded(tmp_path: Path, text: str, environ: Mapping[str, str] | None = None) -> Loaded:
    path = tmp_path / "netfence.yaml"
    path.write_text(text, encoding="utf-8")
    return load(path, environ or {}, {})


def faults_of(
    tmp_path: Path, text: str = "", environ: Mapping[str, str] | None = None, flags: Mapping[str, object] | None = None
) -> list[str]:
    """Return the faults of a file (which is called F in them), environment and flags."""
    path = tmp_path / "netfence.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InvalidError) as caught:
        load(path, environ or {}, flags or {})
    return [fault.replace(str(path), "F") for fault in caught.value.errors]


def test_the_keys_are_those_of_the_specification() -> None:
    assert set(KEYS.leaves) == set(DEFAULTS)


@pytest.mark.parametrize("key", DEFAULTS)
def test_defaults(key: str) -> None:
    config, sources = load(None, {}, {})
    assert value_of(config, key) == DEFAULTS[key]
    assert type(value_of(config, key)) is type(DEFAULTS[key]) or isinstance(DEFAULTS[key], Path)
    assert sources[key] == "default"


def test_the_reference_file_has_every_key_with_its_default() -> None:
    config, sources = load(REFERENCE, {}, {})
    for key, default in DEFAULTS.items():
        assert sources[key].startswith(f"file {REFERENCE}:"), f"{key} is missing"
        assert value_of(config, key) == default, key


def test_the_reference_file_says_something_about_every_key() -> None:
    """Each key, or the group of keys it stands in, follows a comment."""
    previous = ""
    for line in REFERENCE.read_text(encoding="utf-8").splitlines():
        if re.fullmatch(r" *[a-z_]+: .*", line):
            assert previous, f"no comment before {line!r}"
        if line.strip().startswith("#"):
            previous = line
        elif not line.strip():
            previous = ""
        elif line.endswith(":"):
            previous = "" if line in ("dns:", "control_plane:", "metrics:") else line


def test_flags_win_over_the_environment_over_the_file_over_the_default(tmp_path: Path) -> None:
    path = tmp_path / "netfence.yaml"
    path.write_text("log_level: error\nlog_format: json\nsocket: /f.sock\n", encoding="utf-8")
    environ = {"NETFENCE_LOG_FORMAT": "console", "NETFENCE_SOCKET": "/e.sock", "PATH": "/bin", "OTHER_SOCKET": "x"}
    config, sources = load(path, environ, {"socket": Path("/c.sock"), "policy_file": None})
    assert (config.log_level, config.log_format, config.socket) == ("error", "console", Path("/c.sock"))
    assert config.policy_file is None
    assert {key: sources[key] for key in ("log_level", "log_format", "socket", "policy_file")} == {
        "log_level": f"file {path}:1",
        "log_format": "environment NETFENCE_LOG_FORMAT",
        "socket": "flag",
        "policy_file": "default",
    }


VALUES = {
    "socket": ("/run/x.sock", Path("/run/x.sock")),
    "socket_group": ("netfence", "netfence"),
    "data_dir": ("/data", Path("/data")),
    "bpffs_dir": ("/bpf", Path("/bpf")),
    "log_level": ("debug", "debug"),
    "log_format": ("json", "json"),
    "metadata": ("a=b,c=d e", {"a": "b", "c": "d e"}),
    "policy_file": ("/p.yaml", Path("/p.yaml")),
    "daemon_id": ("node-1", "node-1"),
    "dns.listen_addr": ("169.254.100.0/24", "169.254.100.0/24"),
    "dns.port_min": ("1024", 1024),
    "dns.port_max": ("65535", 65535),
    "dns.upstreams": ("192.0.2.53, 2001:db8::53", ("192.0.2.53:53", "[2001:db8::53]:53")),
    "dns.timeout": ("1.5s", 1.5),
    "dns.attempts": ("1", 1),
    "dns.reject_rcode": ("nxdomain", "nxdomain"),
    "dns.min_lease": ("0", 0.0),
    "dns.lease_grace": ("5m", 300.0),
    "dns.max_lease": ("2d", 172800.0),
    "dns.established_idle": ("1h", 3600.0),
    "dns.established_max": ("3h", 10800.0),
    "dns.max_leases": ("1000", 1000),
    "dns.max_leases_total": ("300000", 300000),
    "dns.allow_private": ("10.0.0.1/8,fd00::/8", ("10.0.0.0/8", "fd00::/8")),
    "dns.search_domains": ("Corp.Example.", ("corp.example",)),
    "dns.max_qps": ("50", 50),
    "control_plane.url": ("localhost:1,[::1]:2", ("localhost:1", "[::1]:2")),
    "control_plane.subscribe_ack_timeout": ("0", 0.0),
    "control_plane.heartbeat_interval": ("10", 10.0),
    "control_plane.query_timeout": ("1s", 1.0),
    "control_plane.tls.ca": ("/ca.pem", Path("/ca.pem")),
    "control_plane.tls.cert": ("/cert.pem", Path("/cert.pem")),
    "control_plane.tls.key": ("/key.pem", Path("/key.pem")),
    "control_plane.tls.server_name": ("cp.example", "cp.example"),
    "control_plane.token_file": ("/token", Path("/token")),
    "control_plane.insecure": ("true", True),
    "control_plane.max_stale": ("1h", 3600.0),
    "control_plane.stale_action": ("block_all", "block_all"),
    "control_plane.max_message_size": ("1 MiB", 1 << 20),
    "enforcement.start_mode": ("disabled", "disabled"),
    "enforcement.on_shutdown": ("detach", "detach"),
    "enforcement.allow_dhcp": ("false", False),
    "enforcement.allow_replies": ("off", "off"),
    "enforcement.allow_link_local": ("yes", True),
    "metrics.listen": ("127.0.0.1:9100", "127.0.0.1:9100"),
}


def test_every_key_can_be_set_in_the_environment_and_in_the_file(tmp_path: Path) -> None:
    assert set(VALUES) == set(DEFAULTS)
    environ = {"NETFENCE_" + key.upper().replace(".", "__"): text for key, (text, _) in VALUES.items()}
    config, sources = load(None, environ, {})
    lines: dict[str, list[str]] = {}
    for key, (text, expected) in VALUES.items():
        assert value_of(config, key) == expected, key
        assert sources[key] == "environment NETFENCE_" + key.upper().replace(".", "__")
        lines.setdefault(key.rpartition(".")[0], []).append(f"{key.rpartition('.')[2]}: {text!r}")
    tls = lines.pop("control_plane.tls")
    lines["control_plane"].append("tls: {" + ", ".join(tls) + "}")
    top = lines.pop("")
    sections = [f"{name}:\n  " + "\n  ".join(inner) for name, inner in lines.items()]
    assert loaded(tmp_path, "\n".join(top + sections)).config == config


def test_unquoted_off_is_a_word_here(tmp_path: Path) -> None:
    """YAML 1.1 would read `off` as false."""
    assert loaded(tmp_path, "enforcement: {allow_replies: off}").config.enforcement.allow_replies == "off"


def test_an_explicit_null_is_the_default_where_none_is_one(tmp_path: Path) -> None:
    text = "dns: {upstreams: ~}\ncontrol_plane: {url: null, tls: }\nmetadata:\npolicy_file:\n"
    assert loaded(tmp_path, text).config == Config()
    assert load(None, {"NETFENCE_POLICY_FILE": "", "NETFENCE_DNS__UPSTREAMS": ""}, {}).config == Config()


@pytest.mark.parametrize("text", ["", "# nothing\n", "~\n", "---\n"], ids=["empty", "comment", "null", "document"])
def test_an_empty_file_is_the_defaults(tmp_path: Path, text: str) -> None:
    assert loaded(tmp_path, text).config == Config()


TOP = (
    "bpffs_dir, control_plane, daemon_id, data_dir, dns, enforcement, log_format, log_level, metadata, metrics, "
    "policy_file, socket, socket_group"
)
WILDCARD = "a wildcard; allowed is one address of this host that the workloads reach, or a CIDR"


def test_all_faults_of_all_sources_are_told_at_once(tmp_path: Path) -> None:
    text = """\
dns:
  lisen_addr: 10.0.0.1
  listen_addr: 0.0.0.0
  port_min: 70000
  min_lease: 2h
  max_lease: 1h
zzz: /p.yaml
log_level: loud
"""
    environ = {"NETFENCE_DNS__REJECT_RCODE": "servfail", "NETFENCE_DATADIR": "/x"}
    assert faults_of(tmp_path, text, environ, {"socket": "relative.sock"}) == [
        "file F:2: dns.lisen_addr: unknown key (value '10.0.0.1'); did you mean dns.listen_addr?",
        f"file F:7: zzz: unknown key (value '/p.yaml'); known at the top are {TOP}",
        "environment NETFENCE_DATADIR: datadir: unknown key (value '/x'); did you mean data_dir?",
        "flag: socket: 'relative.sock': allowed is an absolute path",
        "file F:8: log_level: 'loud': allowed are debug, info, warning, error",
        f"file F:3: dns.listen_addr: '0.0.0.0': {WILDCARD}",
        "file F:4: dns.port_min: '70000': allowed is a number from 1 to 65535",
        "environment NETFENCE_DNS__REJECT_RCODE: dns.reject_rcode: 'servfail': allowed are refused, nxdomain",
        "file F:5, file F:6: dns.min_lease: 7200: allowed is at most dns.max_lease, which is 3600",
    ]


@pytest.mark.parametrize(
    ("environ", "fault"),
    [
        pytest.param(
            {"NETFENCE_DNS__PORT_MIN": "16000"},
            "environment NETFENCE_DNS__PORT_MIN: dns.port_min: 16000: allowed is at most dns.port_max, which is 15999",
            id="ports",
        ),
        pytest.param(
            {"NETFENCE_DNS__MAX_LEASES_TOTAL": "10"},
            "environment NETFENCE_DNS__MAX_LEASES_TOTAL: dns.max_leases: 16384: allowed is at most "
            "dns.max_leases_total, which is 10",
            id="leases",
        ),
        pytest.param(
            {"NETFENCE_CONTROL_PLANE__TLS__CA": "/ca", "NETFENCE_CONTROL_PLANE__TLS__CERT": "/c"},
            "environment NETFENCE_CONTROL_PLANE__TLS__CERT: control_plane.tls.cert: '/c': allowed only together with "
            "control_plane.tls.key",
            id="cert-without-key",
        ),
        pytest.param(
            {"NETFENCE_CONTROL_PLANE__TLS__CA": "/ca", "NETFENCE_CONTROL_PLANE__TLS__KEY": "/k"},
            "environment NETFENCE_CONTROL_PLANE__TLS__KEY: control_plane.tls.key: '/k': allowed only together with "
            "control_plane.tls.cert",
            id="key-without-cert",
        ),
        pytest.param(
            {"NETFENCE_CONTROL_PLANE__TLS__SERVER_NAME": "cp"},
            "environment NETFENCE_CONTROL_PLANE__TLS__SERVER_NAME: control_plane.tls.server_name: 'cp': allowed only "
            "together with control_plane.tls.ca",
            id="name-without-ca",
        ),
        pytest.param(
            {"NETFENCE_CONTROL_PLANE__URL": "localhost:1,192.0.2.1:2"},
            "environment NETFENCE_CONTROL_PLANE__URL: control_plane.url: '192.0.2.1:2': plaintext to another host is "
            "not allowed; set control_plane.tls.ca, or control_plane.insecure to true",
            id="plaintext",
        ),
        pytest.param(
            {"NETFENCE_CONTROL_PLANE__URL": "unix:443"},
            "environment NETFENCE_CONTROL_PLANE__URL: control_plane.url: 'unix:443': plaintext to another host is "
            "not allowed; set control_plane.tls.ca, or control_plane.insecure to true",
            id="a-host-called-unix",
        ),
    ],
)
def test_values_that_do_not_go_together(tmp_path: Path, environ: dict[str, str], fault: str) -> None:
    assert faults_of(tmp_path, environ=environ) == [fault]


def test_what_goes_together_is_not_judged_by_a_value_that_was_refused(tmp_path: Path) -> None:
    environ = {"NETFENCE_DNS__PORT_MIN": "x", "NETFENCE_DNS__PORT_MAX": "5"}
    assert faults_of(tmp_path, environ=environ) == [
        "environment NETFENCE_DNS__PORT_MIN: dns.port_min: 'x': allowed is a number from 1 to 65535"
    ]


@pytest.mark.parametrize(
    "environ",
    [
        {"URL": "127.9.9.9:1"},
        {"URL": "[::1]:1"},
        {"URL": "localhost:1"},
        {"URL": "unix:/run/cp.sock"},
        {"URL": "192.0.2.1:2", "INSECURE": "true"},
        {"URL": "cp.example:2", "TLS__CA": "/ca.pem"},
    ],
    ids=lambda environ: environ["URL"],
)
def test_where_plaintext_is_no_question(environ: dict[str, str]) -> None:
    config = load(None, {f"NETFENCE_CONTROL_PLANE__{name}": value for name, value in environ.items()}, {}).config
    assert config.control_plane.url == (environ["URL"],)


def test_the_configuration_is_immutable_and_closed() -> None:
    with pytest.raises(ValidationError):
        Config().dns.port_min = 1
    with pytest.raises(ValidationError):
        Config.model_validate({"nonsense": 1})


def test_allow_private_as_keys() -> None:
    config = load(None, {"NETFENCE_DNS__ALLOW_PRIVATE": "10.0.0.0/8,fd00::/8"}, {}).config
    assert config.dns.allow_private_keys == (parse_cidr("10.0.0.0/8"), parse_cidr("fd00::/8"))


RESOLV_CONF = """\
# nameserver 192.0.2.1
; nameserver 192.0.2.2
search corp.example
nameserver 192.0.2.53
nameserver\t2001:db8::53   # the second
nameserver fe80::1%eth0
nameserver ns.example
nameserver
nameserver 192.0.2.53
options edns0
"""


def test_system_upstreams(tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    path.write_text(RESOLV_CONF, encoding="utf-8")
    assert system_upstreams(path) == ("192.0.2.53:53", "[2001:db8::53]:53", "[fe80::1%eth0]:53")
    path.write_text("".join(f"nameserver 192.0.2.{host}\n" for host in range(1, 100)), encoding="utf-8")
    assert len(system_upstreams(path)) == MAX_UPSTREAMS
    path.write_bytes(b"\xff\xfe\0nameserver")
    assert system_upstreams(path) == ()
    assert system_upstreams(tmp_path / "missing") == ()
