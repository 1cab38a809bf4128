"""Readers of single values: what each takes, and that a refusal says what is allowed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from netfence import config_values as read
from netfence.policy.limits import MAX_METADATA_KEYS, MAX_UPSTREAMS

Reader = Callable[[object], object]
TIMEOUT = read.duration(1, 86_400)
SIZE = read.size(1024, 1 << 30)
PORT = read.integer(1, 65_535)
WORD = read.choice("off", "host", "any")
CIDRS = read.list_of(read.cidr, 3)


@pytest.mark.parametrize(
    ("reader", "value", "expected"),
    [
        pytest.param(TIMEOUT, "300", 300.0, id="duration-bare"),
        pytest.param(TIMEOUT, 300, 300.0, id="duration-number"),
        pytest.param(TIMEOUT, "300s", 300.0, id="duration-s"),
        pytest.param(TIMEOUT, "1.5 m", 90.0, id="duration-m"),
        pytest.param(TIMEOUT, "2h", 7200.0, id="duration-h"),
        pytest.param(TIMEOUT, "1d", 86400.0, id="duration-d"),
        pytest.param(SIZE, "64 MiB", 64 << 20, id="size-mib"),
        pytest.param(SIZE, "1GiB", 1 << 30, id="size-gib"),
        pytest.param(SIZE, "2048", 2048, id="size-bare"),
        pytest.param(SIZE, "2048 B", 2048, id="size-b"),
        pytest.param(PORT, "65535", 65535, id="integer"),
        pytest.param(PORT, 1, 1, id="integer-number"),
        pytest.param(WORD, "off", "off", id="choice"),
        pytest.param(read.boolean, "Yes", True, id="yes"),
        pytest.param(read.boolean, "off", False, id="off"),
        pytest.param(read.boolean, True, True, id="true"),
        pytest.param(read.absolute_path, "/a/b", Path("/a/b"), id="path"),
        pytest.param(read.absolute_path, Path("/a/b"), Path("/a/b"), id="path-object"),
        pytest.param(read.socket_path, "/" + "a" * 106, Path("/" + "a" * 106), id="socket-107"),
        pytest.param(read.group, "netfence", "netfence", id="group"),
        pytest.param(read.group, "1000", "1000", id="gid"),
        pytest.param(read.identifier, "node-1.example", "node-1.example", id="identifier"),
        pytest.param(read.optional(PORT), None, None, id="optional-nothing"),
        pytest.param(read.optional(PORT), "5", 5, id="optional-something"),
        pytest.param(CIDRS, None, (), id="list-nothing"),
        pytest.param(CIDRS, " ", (), id="list-blank"),
        pytest.param(CIDRS, "10.0.0.1/8", ("10.0.0.0/8",), id="list-one"),
        pytest.param(CIDRS, "10.0.0.0/8 , fd00::1", ("10.0.0.0/8", "fd00::1/128"), id="list-commas"),
        pytest.param(CIDRS, ["10.0.0.0/8"], ("10.0.0.0/8",), id="list-list"),
        pytest.param(read.domain, "Corp.Example.", "corp.example", id="domain"),
        pytest.param(read.upstreams, None, None, id="upstreams-nothing"),
        pytest.param(read.upstreams, "192.0.2.1,[::1]:5353", ("192.0.2.1:53", "[::1]:5353"), id="upstreams"),
        pytest.param(read.metadata, "a=b, c=d=e", {"a": "b", "c": "d=e"}, id="metadata-text"),
        pytest.param(read.metadata, {"a": 1, "b": "x,y"}, {"a": "1", "b": "x,y"}, id="metadata-mapping"),
        pytest.param(read.metadata, None, {}, id="metadata-nothing"),
        pytest.param(read.metadata, {"k" * 63: "v" * 1024}, {"k" * 63: "v" * 1024}, id="metadata-longest"),
        pytest.param(read.listen_addr, "127.0.0.1", "127.0.0.1", id="listen-ipv4"),
        pytest.param(read.listen_addr, "2001:DB8::1", "2001:db8::1", id="listen-ipv6"),
        pytest.param(read.listen_addr, "127.53.0.9/16", "127.53.0.0/16", id="listen-cidr"),
        pytest.param(read.listen_addr, "169.254.100.0/30", "169.254.100.0/30", id="listen-smallest-ipv4"),
        pytest.param(read.listen_addr, "fd00::/126", "fd00::/126", id="listen-smallest-ipv6"),
        pytest.param(read.host_port, "127.0.0.1:9100", "127.0.0.1:9100", id="host-port-ipv4"),
        pytest.param(read.host_port, "[2001:DB8::1]:9100", "[2001:db8::1]:9100", id="host-port-ipv6"),
        pytest.param(read.host_port, "cp.example:443", "cp.example:443", id="host-port-name"),
        pytest.param(read.url, "unix:/run/cp.sock", "unix:/run/cp.sock", id="url-unix"),
        pytest.param(read.url, "cp.example:443", "cp.example:443", id="url-host"),
    ],
)
def test_reads(reader: Reader, value: object, expected: object) -> None:
    assert reader(value) == expected
    assert type(reader(value)) is type(expected) or isinstance(expected, Path)


@pytest.mark.parametrize(
    ("reader", "values", "allowed"),
    [
        pytest.param(
            TIMEOUT, ["", "x", "-1", "1w", "1e3", "0", "0.5", "1.1d", "25h", "nan", "inf", "5m5s", " 5", "\u0665s"],
            "300s, 5m, 2h or 1d, from 1s to 86400s", id="duration",
        ),
        pytest.param(TIMEOUT, [None, True, ["5s"], {}], "where a text is wanted", id="duration-type"),
        pytest.param(SIZE, ["", "x", "1.5 MiB", "-1", "1 MB", "1023", "2 GiB"], "from 1024 to 1073741824", id="size"),
        pytest.param(PORT, ["", "x", "0", "65536", "-1", "+1", "1.0", "0x10", "9" * 5000], "1 to 65535", id="integer"),
        pytest.param(WORD, ["", "OFF", "false", None, False, ["off"]], "allowed are off, host, any", id="choice"),
        pytest.param(read.boolean, ["", "2", "maybe"], "allowed are true and false", id="boolean"),
        pytest.param(read.absolute_path, ["", "a/b", "./a", "~/a", "/a\0b"], "an absolute path", id="path"),
        pytest.param(read.socket_path, ["/" + "a" * 107, "/" + "ü" * 60, "a"], "an absolute path", id="socket"),
        pytest.param(read.group, ["", "a b", "-x", "a:b", "x" * 33], "name or number of a group", id="group"),
        pytest.param(read.identifier, ["", "a b", "a\n", "x" * 129, "\x1b[2J"], "printable char", id="identifier"),
        pytest.param(CIDRS, [{"a": 1}, 5], "a list", id="list-type"),
        pytest.param(CIDRS, ["10.0.0.0/8," * 2, ["::", "::", "::", "::"]], "item ''|4 given, .* at most 3", id="list"),
        pytest.param(read.domain, ["*.corp.example", "*"], "without \\*", id="domain-star"),
        pytest.param(read.domain, ["", "a..b"], "is not a domain", id="domain"),
        pytest.param(read.upstreams, ["", [], ()], "leave the key out", id="upstreams-empty"),
        pytest.param(read.upstreams, ["ns.example", "192.0.2.1,x"], "is not an upstream", id="upstreams"),
        pytest.param(read.upstreams, [["::1"] * (MAX_UPSTREAMS + 1)], f"at most {MAX_UPSTREAMS}", id="upstreams-many"),
        pytest.param(read.metadata, ["a", "a=b,c", [1], 5], "allowed is", id="metadata-form"),
        pytest.param(
            read.metadata, [{"": "v"}, {"k" * 64: "v"}, {"a=b": "v"}, {"a,b": "v"}, {"a\nb": "v"}, {"ü" * 32: "v"}],
            "1 to 63 printable bytes", id="metadata-key",
        ),
        pytest.param(
            read.metadata, [{"k": "v" * 1025}, {"k": "\x1b[2J"}, {"k": "a\nb"}], "up to 1024 printable bytes",
            id="metadata-value",
        ),
        pytest.param(read.metadata, [{"k": None}, {"k": ["v"]}, {"\ud800": "v"}], "key ", id="metadata-type"),
        pytest.param(
            read.metadata, [{f"k{number}": "" for number in range(MAX_METADATA_KEYS + 1)}],
            f"at most {MAX_METADATA_KEYS}", id="metadata-many",
        ),
        pytest.param(read.listen_addr, ["0.0.0.0", "::", "::/0", "10.0.0.0/0"], "wildcard", id="listen-any"),
        pytest.param(
            read.listen_addr, ["0.0.0.1", "224.0.0.1", "255.255.255.255", "240.0.0.0/8"], "not an address of a host",
            id="listen-ipv4",
        ),
        pytest.param(read.listen_addr, ["ff02::1", "fe80::1"], "multicast or link-local", id="listen-ipv6"),
        pytest.param(read.listen_addr, ["192.0.2.1/32", "192.0.2.0/31"], "/30 or shorter", id="listen-small-ipv4"),
        pytest.param(read.listen_addr, ["fd00::1/128", "fd00::/127"], "/126 or shorter", id="listen-small-ipv6"),
        pytest.param(
            read.listen_addr, ["", "localhost", "127.0.0.1:53", "127.1", "fe80::1%lo", "127.0.0.0/x"], "is not a",
            id="listen-text",
        ),
        pytest.param(
            read.host_port, ["", "host", ":9100", "host:", "host:0", "host:65536", "::1:9100", "[::1]", "[::1:9100",
                             "[127.0.0.1]:1", "a b:1", "a/b:1", "[fe80::1%lo]:1", "host:x"],
            "allowed is host:port", id="host-port",
        ),
        pytest.param(read.url, ["https://cp.example", "dns:///cp.example:443"], "without a scheme", id="url-scheme"),
        pytest.param(read.url, ["cp.example", "unix:run/x", ""], "unix:/path", id="url"),
        pytest.param(read.url, ["unix:/" + "a" * 107], "at most 107 bytes", id="url-unix-long"),
    ],
)  # fmt: skip
def test_refuses_and_says_what_is_allowed(reader: Reader, values: list[object], allowed: str) -> None:
    for value in values:
        with pytest.raises(ValueError, match=allowed):
            reader(value)


def test_every_bad_item_of_a_list_is_told() -> None:
    with pytest.raises(ValueError, match=r"item 'x': .*; item 'y': "):
        CIDRS("x, ::1, y")
