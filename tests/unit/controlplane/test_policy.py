"""Policies: what is refused, what is equal, and the messages made of them."""

from __future__ import annotations

import datetime as dt
import ipaddress
import itertools
import re
from pathlib import Path
from typing import Any

import pytest

from netfence.control.convert import command_of
from netfence.controlplane import Cidr, Dns, DnsMode, Domain, Mode, Policy
from netfence.controlplane.policy import duration, framed
from netfence.errors import ExhaustedError, InvalidError
from netfence.policy import limits
from netfence.policy.commands import BulkUpdate, CidrSpec, DnsSpec, DomainSpec, apply
from netfence.policy.policy import EMPTY
from netfence.v1 import control_pb2

FULL = Policy(
    "allowlist",
    allow=["10.0.0.1/8", "192.0.2.7", Cidr("198.51.100.0/24", ttl_s=90.5)],
    deny=["10.0.13.0/24", "2001:DB8::1/32"],
    dns=Dns(
        "allowlist",
        allow=[Domain("PyPI.org.", include_subdomains=True), "*.Bücher.example"],
        deny=["internal.pypi.org"],
        upstreams=["192.0.2.53", "2001:db8::53"],
    ),
)


def test_hash_is_that_of_the_documented_vector() -> None:
    text = (Path(__file__).parents[3] / "docs/policy-hash.md").read_text()
    digests = re.findall(r"^[0-9a-f]{64}$", text, re.MULTILINE)
    assert FULL.hash == digests[1]
    assert Policy("block_all").hash == digests[0]


def test_every_fault_is_told_at_once() -> None:
    with pytest.raises(InvalidError) as caught:
        Policy(
            "allow",
            allow=["10.0.0.0/33", Cidr("10.0.0.0/8", ttl_s=-1)],
            deny="10.0.0.0/8",
            dns=Dns("nope", allow=["a..b"], deny="x", upstreams=["resolver"]),
            version="v" * 300,
        )
    faults = caught.value.errors
    for part in ("mode: ", "allow[0]: ", "allow[1]: ", "deny: ", "dns.mode: ", "dns.allow[0]: "):
        assert any(fault.startswith(part) for fault in faults), (part, faults)
    for part in ("dns.deny: ", "dns.upstreams[0]: ", "version: "):
        assert any(fault.startswith(part) for fault in faults), (part, faults)
    assert len(faults) == 9


def test_too_many_rules_are_refused_as_in_the_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("netfence.policy.commands.MAX_CIDR_RULES", 1)
    with pytest.raises(ExhaustedError):
        Policy("denylist", allow=["10.0.0.0/8", "11.0.0.0/8"])


@pytest.mark.parametrize("version", ["\ud800", "é" * 129], ids=["surrogate", "too many bytes"])
def test_version_that_does_not_fit_a_message_is_refused(version: str) -> None:
    with pytest.raises(InvalidError):
        Policy("block_all", version=version)
    assert Policy("block_all", version="é" * 128).version == "é" * 128


def test_modes_are_names_or_values() -> None:
    assert Policy(Mode.ALLOWLIST, dns=Dns(DnsMode.PROXY)) == Policy("allowlist", dns=Dns("proxy"))


def test_policy_cannot_be_changed() -> None:
    allow = ["10.0.0.0/8"]
    policy = Policy("allowlist", allow=allow)
    allow.append("0.0.0.0/0")
    assert policy.allow == ("10.0.0.0/8",)
    with pytest.raises(AttributeError):
        policy.mode = "disabled"  # type: ignore[misc]


DIFFERENT = {
    "mode": Policy("denylist"),
    "audit": Policy("denylist", audit=True),
    "allow": Policy("denylist", allow=["10.0.0.0/8"]),
    "deny": Policy("denylist", deny=["10.0.0.0/8"]),
    "ttl": Policy("denylist", deny=[Cidr("10.0.0.0/8", ttl_s=60)]),
    "other-ttl": Policy("denylist", deny=[Cidr("10.0.0.0/8", ttl_s=61)]),
    "allow-ttl": Policy("denylist", allow=[Cidr("10.0.0.0/8", ttl_s=60)]),
    "dns-mode": Policy("denylist", dns=Dns("allowlist")),
    "domain": Policy("denylist", dns=Dns("allowlist", allow=["a.b"])),
    "domain-below": Policy("denylist", dns=Dns("allowlist", allow=[Domain("a.b", include_subdomains=True)])),
    "upstream": Policy("denylist", dns=Dns("allowlist", upstreams=["192.0.2.53"])),
}


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(DIFFERENT, 2)))
def test_version_and_equality_tell_what_differs(one: str, other: str) -> None:
    assert DIFFERENT[one] != DIFFERENT[other]
    assert DIFFERENT[one].version != DIFFERENT[other].version


def test_version_is_of_the_meaning_not_of_the_writing() -> None:
    one = Policy(
        "allowlist", allow=["10.0.0.1/8", "192.0.2.7"], dns=Dns("allowlist", allow=["A.example.", "b.example"])
    )
    other = Policy(
        "allowlist", allow=["192.0.2.7/32", "10.0.0.0/8"], dns=Dns("allowlist", allow=["b.example", "a.example"])
    )
    assert one == other
    assert hash(one) == hash(other)
    assert one.version == other.version
    assert one.bulk_body == other.bulk_body


def test_own_version_is_kept_and_counts() -> None:
    assert Policy("block_all", version="r7").version == "r7"
    assert Policy("block_all", version="r7") != Policy("block_all")
    assert Policy("block_all", version="r7").digest == Policy("block_all").digest


def test_policy_is_not_equal_to_something_else() -> None:
    assert Policy("block_all") != "block_all"


@pytest.mark.parametrize("policy", [*DIFFERENT.values(), FULL], ids=[*DIFFERENT, "full"])
@pytest.mark.parametrize("kind", ["bulk_update", "subscribed_ack"])
def test_message_gives_the_daemon_the_same_policy(policy: Policy, kind: str) -> None:
    body = policy.bulk_body if kind == "bulk_update" else policy.ack_body
    message = control_pb2.ControlCommand.FromString(framed(body, "id-1", "7"))
    assert (message.WhichOneof("command"), message.id, message.nonce) == (kind, "id-1", "7")
    assert message.version == policy.version
    applied = apply(EMPTY, command_of(message), 0.0)
    assert applied == policy.rules
    assert applied.hash() == policy.hash


def test_dns_that_was_not_given_is_not_sent() -> None:
    message = control_pb2.ControlCommand.FromString(Policy("allowlist").bulk_body)
    assert not message.bulk_update.HasField("dns")  # so that the daemon warns of it
    assert control_pb2.ControlCommand.FromString(FULL.bulk_body).bulk_update.HasField("dns")


def test_frame_without_nonce_asks_for_no_result() -> None:
    message = control_pb2.ControlCommand.FromString(framed(FULL.bulk_body, "id-1"))
    assert message.nonce == ""


@pytest.mark.parametrize(("ttl_s", "parts"), [(90.5, (90, 500_000_000)), (1e-9, (0, 1)), (0.9999999999, (1, 0))])
def test_duration(ttl_s: float, parts: tuple[int, int]) -> None:
    made = duration(ttl_s)
    assert (made.seconds, made.nanos) == parts


def test_from_update_is_the_policy_of_a_file() -> None:
    update = BulkUpdate(
        Mode.ALLOWLIST,
        allow_cidrs=["10.0.0.0/8", CidrSpec("192.0.2.7", 60.0)],
        deny_cidrs=["10.9.0.0/16"],
        dns=DnsSpec(DnsMode.ALLOWLIST, [DomainSpec("a.example", include_subdomains=True)], [], ["192.0.2.53"]),
        audit=True,
    )
    policy = Policy.from_update(update, "file:1")
    assert policy.rules == apply(EMPTY, update, 0.0)
    assert policy.version == "file:1"


def test_from_update_refuses_unknown_modes() -> None:
    with pytest.raises(InvalidError) as caught:
        Policy.from_update(BulkUpdate(0, dns=DnsSpec(9)))
    assert len(caught.value.errors) == 2


def test_bound_of_versions_is_reached_by_none_of_ours() -> None:
    assert len(Policy("block_all").version) < limits.MAX_NAME


def test_shortest_ttl_is_never_for_ever() -> None:
    policy = Policy("allowlist", allow=[Cidr("192.0.2.7", ttl_s=1e-10)])
    (entry,) = control_pb2.ControlCommand.FromString(policy.bulk_body).bulk_update.allow_cidrs
    assert entry.HasField("ttl")
    assert entry.ttl.nanos == 1


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "ttl-text": ({"allow": ["::/0", Cidr("10.0.0.0/8", ttl_s="1h")]}, "allow[1]: "),  # type: ignore[arg-type]
    "ttl-timedelta": ({"deny": [Cidr("10.0.0.0/8", ttl_s=dt.timedelta(hours=1))]}, "deny[0]: "),  # type: ignore[arg-type]
    "no-list": ({"allow": None}, "allow: "),
    "number": ({"allow": [1]}, "allow[0]: "),
    "tuple": ({"allow": [("10.0.0.0/8", 60)]}, "allow[0]: "),
    "network": ({"allow": [ipaddress.ip_network("10.0.0.0/8")]}, "allow[0]: "),
    "cidr-none": ({"allow": [Cidr(None)]}, "allow[0]: "),  # type: ignore[arg-type]
    "dns-mapping": ({"dns": {"mode": "proxy"}}, "dns: "),
    "dns-text": ({"dns": "proxy"}, "dns: "),
    "domain-none": ({"dns": Dns("proxy", allow=[None])}, "dns.allow[0]: "),  # type: ignore[list-item]
    "domain-of-none": ({"dns": Dns("proxy", deny=[Domain(None)])}, "dns.deny[0]: "),  # type: ignore[arg-type]
    "upstream-number": ({"dns": Dns("proxy", upstreams=["::1", 53])}, "dns.upstreams[1]: "),  # type: ignore[list-item]
    "version": ({"version": 7}, "version: "),
}


@pytest.mark.parametrize(("arguments", "place"), WRONG.values(), ids=WRONG)
def test_wrong_types_are_faults_with_their_place(arguments: dict[str, Any], place: str) -> None:
    with pytest.raises(InvalidError) as caught:
        Policy("allowlist", **arguments)
    assert [fault.startswith(place) for fault in caught.value.errors] == [True], caught.value.errors


def test_wrong_types_leave_the_others_their_places() -> None:
    with pytest.raises(InvalidError) as caught:
        Policy(
            "allowlist",
            allow=[1, "nowhere"],  # type: ignore[list-item]
            dns=Dns("proxy", allow=[2, "a..b"], upstreams=[3, "nowhere"]),  # type: ignore[list-item]
        )
    places = {fault.partition(": ")[0] for fault in caught.value.errors}
    assert places == {f"{name}[{index}]" for name in ("allow", "dns.allow", "dns.upstreams") for index in (0, 1)}
