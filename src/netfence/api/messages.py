"""daemon.proto ↔ views: what the local API's requests mean and how its answers are written.

Owns the checks that need no host (a target is given, enum numbers are known, metadata within bounds); whether an
interface exists is the daemon's question. The control plane's messages are `control.convert`'s.
"""

from __future__ import annotations

import json
import math
from typing import Final, get_args

from google.protobuf import duration_pb2, timestamp_pb2

from netfence.api.metadata import metadata_errors
from netfence.api.views import (
    AttachmentInfoView,
    AttachSpec,
    Direction,
    DirectionWish,
    ExplanationView,
    FlowVerdict,
    FlowView,
    HookKind,
    HookWish,
    StatusView,
)
from netfence.errors import InvalidError
from netfence.v1 import daemon_pb2, types_pb2

MAX_INTERFACE_BYTES: Final = 127
"""Bytes of an interface's name: ALTIFNAMSIZ less its NUL; the names proper have 15, alternative ones this many."""

MAX_CGROUP_BYTES: Final = 4095
"""Bytes of a path: PATH_MAX less its NUL."""

MAX_SUBJECT: Final = 1024
"""Characters of a name or an address to explain: the longest that can be one has 1012, before IDNA conversion."""

MAX_WORD: Final = 32
"""Characters of an unknown word that an error repeats."""

_NANO = 1_000_000_000

_HOOK_WISHES: dict[int, HookWish] = {
    daemon_pb2.HOOK_UNSPECIFIED: "auto",
    daemon_pb2.HOOK_TC: "tc",
    daemon_pb2.HOOK_XDP: "xdp",
}
_DIRECTION_WISHES: dict[int, DirectionWish] = {
    daemon_pb2.DIRECTION_UNSPECIFIED: "auto",
    daemon_pb2.DIRECTION_WORKLOAD: "workload",
    daemon_pb2.DIRECTION_HOST: "host",
}
_HOOK_NAMES = {wish: daemon_pb2.Hook.Name(number) for number, wish in _HOOK_WISHES.items()}
_DIRECTION_NAMES = {wish: daemon_pb2.Direction.Name(number) for number, wish in _DIRECTION_WISHES.items()}
_TYPES: dict[HookKind, types_pb2.AttachmentType] = {
    "tc": types_pb2.ATTACHMENT_TYPE_TC,
    "xdp": types_pb2.ATTACHMENT_TYPE_XDP,
    "cgroup": types_pb2.ATTACHMENT_TYPE_CGROUP,
}
_HOOKS: dict[HookKind, daemon_pb2.Hook] = {
    "tc": daemon_pb2.HOOK_TC,
    "xdp": daemon_pb2.HOOK_XDP,
    "cgroup": daemon_pb2.HOOK_UNSPECIFIED,
}
_DIRECTIONS: dict[Direction, daemon_pb2.Direction] = {
    "workload": daemon_pb2.DIRECTION_WORKLOAD,
    "host": daemon_pb2.DIRECTION_HOST,
}


def attach_request(spec: AttachSpec) -> daemon_pb2.AttachRequest:
    """Write what `spec` asks for; the inverse of `attach_spec`."""
    return daemon_pb2.AttachRequest(
        interface_name=spec.interface,
        cgroup_path=spec.cgroup,
        metadata=spec.metadata,
        hook=_HOOK_NAMES[spec.hook],
        direction=_DIRECTION_NAMES[spec.direction],
    )


def attach_spec(request: daemon_pb2.AttachRequest) -> AttachSpec:
    """Return what `request` asks for. Raises InvalidError listing every fault."""
    errors = _target_errors(request)
    hook = _HOOK_WISHES.get(request.hook)
    if hook is None:
        errors.append(f"hook {request.hook} is unknown; use HOOK_UNSPECIFIED (0), HOOK_TC (1) or HOOK_XDP (2)")
    direction = _DIRECTION_WISHES.get(request.direction)
    if direction is None:
        errors.append(
            f"direction {request.direction} is unknown; use DIRECTION_UNSPECIFIED (0), DIRECTION_WORKLOAD (1) or"
            " DIRECTION_HOST (2)"
        )
    cgroup = request.WhichOneof("target") == "cgroup_path"
    if cgroup and (hook != "auto" or direction != "auto"):
        errors.append("hook and direction are for interfaces; leave them out for a cgroup")
    if hook == "xdp" and direction == "host":
        errors.append("XDP sees only what comes in; use direction workload, or hook tc for direction host")
    errors += metadata_errors(request.metadata)
    if errors or hook is None or direction is None:
        raise InvalidError([f"attach: {error}" for error in errors])
    return AttachSpec(
        interface=None if cgroup else request.interface_name,
        cgroup=request.cgroup_path if cgroup else None,
        metadata=dict(request.metadata),
        hook=hook,
        direction=direction,
    )


def _target_errors(request: daemon_pb2.AttachRequest) -> list[str]:
    match request.WhichOneof("target"):
        case "interface_name":
            what, text, limit = "interface_name", request.interface_name, MAX_INTERFACE_BYTES
        case "cgroup_path":
            what, text, limit = "cgroup_path", request.cgroup_path, MAX_CGROUP_BYTES
        case _:
            return ["no target; set interface_name or cgroup_path"]
    if not text:
        return [f"{what} is empty; name the target"]
    if len(text.encode()) > limit:
        return [f"{what} is {len(text.encode())} bytes long; at most {limit} are possible"]
    if "\0" in text:
        return [f"{what} has a NUL character; no such target can exist"]
    return []


def attachment_message(view: AttachmentInfoView) -> daemon_pb2.AttachmentInfo:
    """Write one attachment."""
    cgroup = view.hook == "cgroup"
    return daemon_pb2.AttachmentInfo(
        id=view.id,
        target=view.target,
        type=_TYPES[view.hook],
        mode=types_pb2.PolicyMode.Name(view.mode),
        dns_mode=types_pb2.DnsMode.Name(view.dns_mode),
        dns_address=view.dns_address,
        metadata=view.metadata,
        packets_allowed=view.packets_allowed,
        packets_blocked=view.packets_blocked,
        dns_queries_allowed=view.dns_queries_allowed,
        dns_queries_blocked=view.dns_queries_blocked,
        attached_at=_timestamp(view.attached_at),
        policy_version=view.policy_version,
        policy_hash=view.policy_hash,
        hook=_HOOKS[view.hook],
        direction=daemon_pb2.DIRECTION_UNSPECIFIED if cgroup else _DIRECTIONS[view.direction],
        attach_mechanism=view.attach_mechanism,
        packets_would_block=view.packets_would_block,
        audit=view.audit,
    )


def daemon_status_message(view: StatusView) -> daemon_pb2.DaemonStatus:
    """Write the daemon's status."""
    seconds, nanos = _split(view.uptime_s)
    return daemon_pb2.DaemonStatus(
        version=view.version,
        daemon_id=view.daemon_id,
        hostname=view.hostname,
        control_plane_state=types_pb2.ConnectionState.Name(view.control_plane_state),
        control_plane_address=view.control_plane_address,
        attachment_count=view.attachment_count,
        uptime=duration_pb2.Duration(seconds=seconds, nanos=nanos),
        kernel_release=view.kernel_release,
        features=view.features,
        config={
            key: daemon_pb2.ConfigValue(json=json.dumps(value, ensure_ascii=False), source=source)
            for key, (value, source) in view.config.items()
        },
    )


def explain_subject(request: daemon_pb2.ExplainRequest) -> str:
    """Return what `request` asks about. Raises InvalidError listing every fault."""
    errors = []
    if not request.id:
        errors.append("id is empty; give the id that attach returned")
    if not request.subject:
        errors.append("subject is empty; give a name or an address")
    elif len(request.subject) > MAX_SUBJECT:
        errors.append(f"subject has {len(request.subject)} characters; a name has {MAX_SUBJECT} at most")
    if errors:
        raise InvalidError([f"explain: {error}" for error in errors])
    return request.subject


def explanation_message(view: ExplanationView) -> daemon_pb2.ExplainResponse:
    """Write an explanation."""
    response = daemon_pb2.ExplainResponse(subject=view.subject, name_verdict=view.name_verdict, remedies=view.remedies)
    for kind, subject, text in view.steps:
        response.steps.add(kind=kind, subject=subject, text=text)
    for one in view.addresses:
        verdict = response.addresses.add(address=one.address, verdict=one.verdict, reason=one.reason, rule=one.rule)
        if one.lease_s is not None:
            seconds, nanos = _split(one.lease_s)
            verdict.lease.CopyFrom(duration_pb2.Duration(seconds=seconds, nanos=nanos))
    return response


def watch_verdicts(request: daemon_pb2.WatchRequest) -> frozenset[FlowVerdict]:
    """Return the verdicts that `request` asks for, empty for all. Raises InvalidError listing every fault."""
    known: frozenset[FlowVerdict] = frozenset(get_args(FlowVerdict))
    if wrong := sorted(set(request.verdicts) - known):
        raise InvalidError(
            [f"watch: {verdict[:MAX_WORD]!r} is no verdict; use pass, drop or would_drop" for verdict in wrong]
        )
    return known & frozenset(request.verdicts)


def flow_message(view: FlowView) -> daemon_pb2.FlowEvent:
    """Write one decision."""
    return daemon_pb2.FlowEvent(
        time=_timestamp(view.time),
        id=view.id,
        kind=view.kind,
        verdict=view.verdict,
        reason=view.reason,
        protocol=view.protocol,
        source=view.source,
        destination=view.destination,
        domain=view.domain,
        rule=view.rule,
        lost=view.lost,
    )


def _timestamp(epoch_s: float) -> timestamp_pb2.Timestamp:
    seconds, nanos = _split(epoch_s)
    return timestamp_pb2.Timestamp(seconds=seconds, nanos=nanos)


def _split(time_s: float) -> tuple[int, int]:
    """Return whole seconds and nanoseconds; the fraction is scaled alone, or a float of today loses its last digits."""
    fraction, whole = math.modf(time_s)
    carry, nanos = divmod(round(fraction * _NANO), _NANO)
    return int(whole) + carry, nanos
