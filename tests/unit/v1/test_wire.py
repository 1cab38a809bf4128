"""The generated contract against the table of names and numbers that the first implementation's peers rely on.

The table below is transcribed by hand from the wire contract, and is the only copy that the code does not make itself:
if this test fails, the proto files are wrong, not the table.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from google.protobuf.descriptor import EnumDescriptor, FieldDescriptor, FileDescriptor

from netfence.v1 import control_pb2, daemon_pb2, types_pb2

ROOT = Path(__file__).resolve().parents[3]
FILES: tuple[FileDescriptor, ...] = (types_pb2.DESCRIPTOR, control_pb2.DESCRIPTOR, daemon_pb2.DESCRIPTOR)
DURATION = "google.protobuf.Duration"
TIMESTAMP = "google.protobuf.Timestamp"
EMPTY = "google.protobuf.Empty"
METADATA = "map<string, string>"

# service.method: request, response; `stream` as in the proto file
METHODS = {
    "ControlPlane.Connect": ("stream DaemonEvent", "stream ControlCommand"),
    "ControlPlane.QueryDns": ("DnsQueryRequest", "DnsQueryResponse"),
    "DaemonService.Attach": ("AttachRequest", "AttachResponse"),
    "DaemonService.Detach": ("DetachRequest", EMPTY),
    "DaemonService.List": ("ListRequest", "ListResponse"),
    "DaemonService.GetStatus": (EMPTY, "DaemonStatus"),
    "DaemonService.Watch": ("WatchRequest", "stream FlowEvent"),
    "DaemonService.Explain": ("ExplainRequest", "ExplainResponse"),
    "DaemonService.Suggest": ("SuggestRequest", "SuggestResponse"),
}

ENUMS = {
    "PolicyMode": {
        "POLICY_MODE_UNSPECIFIED": 0,
        "POLICY_MODE_DISABLED": 1,
        "POLICY_MODE_ALLOWLIST": 2,
        "POLICY_MODE_BLOCK_ALL": 3,
        "POLICY_MODE_DENYLIST": 4,
    },
    "AttachmentType": {
        "ATTACHMENT_TYPE_UNSPECIFIED": 0,
        "ATTACHMENT_TYPE_TC": 1,
        "ATTACHMENT_TYPE_CGROUP": 2,
        "ATTACHMENT_TYPE_XDP": 100,
    },
    "DnsMode": {
        "DNS_MODE_UNSPECIFIED": 0,
        "DNS_MODE_DISABLED": 1,
        "DNS_MODE_ALLOWLIST": 2,
        "DNS_MODE_DENYLIST": 3,
        "DNS_MODE_PROXY": 4,
    },
    "UnsubscribeReason": {
        "UNSUBSCRIBE_REASON_UNSPECIFIED": 0,
        "UNSUBSCRIBE_REASON_REMOVED": 1,
        "UNSUBSCRIBE_REASON_DETACHED": 2,
        "UNSUBSCRIBE_REASON_ERROR": 3,
    },
    "ConnectionState": {
        "CONNECTION_STATE_UNSPECIFIED": 0,
        "CONNECTION_STATE_DISCONNECTED": 1,
        "CONNECTION_STATE_CONNECTING": 2,
        "CONNECTION_STATE_CONNECTED": 3,
    },
    "Hook": {"HOOK_UNSPECIFIED": 0, "HOOK_TC": 1, "HOOK_XDP": 2},
    "Direction": {"DIRECTION_UNSPECIFIED": 0, "DIRECTION_WORKLOAD": 1, "DIRECTION_HOST": 2},
}

POLICY_FIELDS = {
    "mode": (1, "PolicyMode"),
    "allow_cidrs": (2, "repeated CIDREntry"),
    "deny_cidrs": (3, "repeated CIDREntry"),
    "dns": (4, "DnsConfig"),
    "audit": (100, "bool"),
}

# message: field: (number, type); `oneof name:` before the type of a field in a oneof
MESSAGES = {
    "DaemonEvent": {
        "sync": (1, "oneof event: SyncRequest"),
        "subscribed": (2, "oneof event: Subscribed"),
        "unsubscribed": (3, "oneof event: Unsubscribed"),
        "heartbeat": (4, "oneof event: Heartbeat"),
        "command_result": (100, "oneof event: CommandResult"),
    },
    "SyncRequest": {
        "daemon_id": (1, "string"),
        "hostname": (2, "string"),
        "attachments": (3, "repeated Attachment"),
        "metadata": (4, METADATA),
        "capabilities": (100, "repeated string"),
        "daemon_version": (101, "string"),
    },
    "Attachment": {
        "id": (1, "string"),
        "target": (2, "string"),
        "type": (3, "AttachmentType"),
        "mode": (4, "PolicyMode"),
        "dns_mode": (5, "DnsMode"),
        "metadata": (6, METADATA),
        "dns_address": (100, "string"),
        "policy_version": (101, "string"),
        "policy_hash": (102, "string"),
    },
    "Subscribed": {
        "id": (1, "string"),
        "target": (2, "string"),
        "type": (3, "AttachmentType"),
        "mode": (4, "PolicyMode"),
        "dns_mode": (5, "DnsMode"),
        "dns_address": (6, "string"),
        "metadata": (7, METADATA),
    },
    "Unsubscribed": {"id": (1, "string"), "reason": (2, "UnsubscribeReason"), "error": (3, "string")},
    "Heartbeat": {"stats": (1, "repeated AttachmentStats")},
    "AttachmentStats": {
        "id": (1, "string"),
        "packets_allowed": (2, "uint64"),
        "packets_blocked": (3, "uint64"),
        "dns_queries_allowed": (4, "uint64"),
        "dns_queries_blocked": (5, "uint64"),
        "bytes_allowed": (100, "uint64"),
        "bytes_blocked": (101, "uint64"),
        "policy_hash": (102, "string"),
        "packets_would_block": (103, "uint64"),
    },
    "ControlCommand": {
        "id": (1, "string"),
        "sync_ack": (2, "oneof command: SyncAck"),
        "set_mode": (3, "oneof command: SetMode"),
        "allow_cidr": (4, "oneof command: CIDREntry"),
        "deny_cidr": (5, "oneof command: CIDREntry"),
        "remove_cidr": (6, "oneof command: string"),
        "bulk_update": (7, "oneof command: BulkUpdate"),
        "set_dns_mode": (8, "oneof command: SetDnsMode"),
        "allow_domain": (9, "oneof command: DomainEntry"),
        "deny_domain": (10, "oneof command: DomainEntry"),
        "remove_domain": (11, "oneof command: string"),
        "subscribed_ack": (12, "oneof command: SubscribedAck"),
        "version": (100, "string"),
        "nonce": (101, "string"),
    },
    "SyncAck": {},
    "SubscribedAck": POLICY_FIELDS,
    "BulkUpdate": POLICY_FIELDS,
    "SetMode": {"mode": (1, "PolicyMode")},
    "SetDnsMode": {"mode": (1, "DnsMode")},
    "DnsConfig": {
        "mode": (1, "DnsMode"),
        "allow_domains": (2, "repeated DomainEntry"),
        "deny_domains": (3, "repeated DomainEntry"),
        "upstream_servers": (4, "repeated string"),
    },
    "CIDREntry": {"cidr": (1, "string"), "ttl": (2, DURATION)},
    "DomainEntry": {"domain": (1, "string"), "include_subdomains": (2, "bool")},
    "DnsQueryRequest": {"id": (1, "string"), "domain": (2, "string"), "query_type": (3, "string")},
    "DnsQueryResponse": {
        "allow": (1, "bool"),
        "add_to_filter": (2, "bool"),
        "ips": (3, "repeated string"),
        "ttl_seconds": (4, "uint32"),
    },
    "CommandResult": {
        "nonce": (1, "string"),
        "id": (2, "string"),
        "version": (3, "string"),
        "ok": (4, "bool"),
        "errors": (5, "repeated string"),
        "policy_hash": (6, "string"),
    },
    "AttachRequest": {
        "interface_name": (1, "oneof target: string"),
        "cgroup_path": (2, "oneof target: string"),
        "metadata": (3, METADATA),
        "hook": (100, "Hook"),
        "direction": (101, "Direction"),
    },
    "AttachResponse": {"id": (1, "string"), "dns_address": (2, "string")},
    "DetachRequest": {"id": (1, "string")},
    "ListRequest": {"page_size": (1, "int32"), "page_token": (2, "string")},
    "ListResponse": {
        "attachments": (1, "repeated AttachmentInfo"),
        "next_page_token": (2, "string"),
        "total_count": (3, "int32"),
    },
    "AttachmentInfo": {
        "id": (1, "string"),
        "target": (2, "string"),
        "type": (3, "AttachmentType"),
        "mode": (4, "PolicyMode"),
        "dns_mode": (5, "DnsMode"),
        "dns_address": (6, "string"),
        "metadata": (7, METADATA),
        "packets_allowed": (8, "uint64"),
        "packets_blocked": (9, "uint64"),
        "dns_queries_allowed": (10, "uint64"),
        "dns_queries_blocked": (11, "uint64"),
        "attached_at": (12, TIMESTAMP),
        "policy_version": (100, "string"),
        "policy_hash": (101, "string"),
        "hook": (102, "Hook"),
        "direction": (103, "Direction"),
        "attach_mechanism": (104, "string"),
        "packets_would_block": (105, "uint64"),
        "audit": (106, "bool"),
    },
    "DaemonStatus": {
        "version": (1, "string"),
        "daemon_id": (2, "string"),
        "hostname": (3, "string"),
        "control_plane_state": (4, "ConnectionState"),
        "control_plane_address": (5, "string"),
        "attachment_count": (6, "int32"),
        "uptime": (100, DURATION),
        "kernel_release": (101, "string"),
        "features": (102, METADATA),
        "config": (103, "map<string, ConfigValue>"),
    },
    "ConfigValue": {"json": (1, "string"), "source": (2, "string")},
    "WatchRequest": {"id": (1, "string"), "verdicts": (2, "repeated string")},
    "FlowEvent": {
        "time": (1, TIMESTAMP),
        "id": (2, "string"),
        "kind": (3, "string"),
        "verdict": (4, "string"),
        "reason": (5, "string"),
        "protocol": (6, "string"),
        "source": (7, "string"),
        "destination": (8, "string"),
        "domain": (9, "string"),
        "rule": (10, "string"),
        "lost": (11, "uint64"),
    },
    "ExplainRequest": {"id": (1, "string"), "subject": (2, "string")},
    "ExplainStep": {"kind": (1, "string"), "subject": (2, "string"), "text": (3, "string")},
    "ExplainVerdict": {
        "address": (1, "string"),
        "verdict": (2, "string"),
        "reason": (3, "string"),
        "rule": (4, "string"),
        "lease": (5, DURATION),
    },
    "ExplainResponse": {
        "subject": (1, "string"),
        "name_verdict": (2, "string"),
        "steps": (3, "repeated ExplainStep"),
        "addresses": (4, "repeated ExplainVerdict"),
        "remedies": (5, "repeated string"),
    },
    "SuggestRequest": {"id": (1, "string")},
    "SuggestResponse": {"policy": (1, "string"), "missed": (2, "uint64")},
}

SCALARS = {
    FieldDescriptor.TYPE_BOOL: "bool",
    FieldDescriptor.TYPE_INT32: "int32",
    FieldDescriptor.TYPE_STRING: "string",
    FieldDescriptor.TYPE_UINT32: "uint32",
    FieldDescriptor.TYPE_UINT64: "uint64",
}


def _short(full_name: str) -> str:
    return full_name.removeprefix("netfence.v1.")


def _type(field: FieldDescriptor) -> str:
    """Write a field's type as the table does."""
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        key, value = (_type(field.message_type.fields_by_name[name]) for name in ("key", "value"))
        return f"map<{key}, {value}>"
    if field.message_type is not None:
        name = _short(field.message_type.full_name)
    elif field.enum_type is not None:
        name = _short(field.enum_type.full_name)
    else:
        name = SCALARS[field.type]
    if field.containing_oneof is not None:
        return f"oneof {field.containing_oneof.name}: {name}"
    return f"repeated {name}" if field.is_repeated else name


def _enums() -> dict[str, EnumDescriptor]:
    return {name: enum for file in FILES for name, enum in file.enum_types_by_name.items()}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_package_and_path(file: FileDescriptor) -> None:
    assert file.package == "netfence.v1"
    assert re.fullmatch(r"netfence/v1/(types|control|daemon)\.proto", file.name)


def test_methods() -> None:
    found = {}
    for file in FILES:
        for service in file.services_by_name.values():
            for method in service.methods:
                request, response = _short(method.input_type.full_name), _short(method.output_type.full_name)
                found[f"{service.name}.{method.name}"] = (
                    f"stream {request}" if method.client_streaming else request,
                    f"stream {response}" if method.server_streaming else response,
                )
    assert found == METHODS


def test_no_enum_is_missing_or_extra() -> None:
    assert _enums().keys() == ENUMS.keys()


@pytest.mark.parametrize("name", ENUMS)
def test_enum(name: str) -> None:
    assert {value.name: value.number for value in _enums()[name].values} == ENUMS[name]


def test_no_message_is_missing_or_extra() -> None:
    assert {name for file in FILES for name in file.message_types_by_name} == MESSAGES.keys()


@pytest.mark.parametrize("name", MESSAGES)
def test_message(name: str) -> None:
    message = next(file.message_types_by_name[name] for file in FILES if name in file.message_types_by_name)
    assert {field.name: (field.number, _type(field)) for field in message.fields} == MESSAGES[name]


def _generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gen_proto", ROOT / "ci/gen_proto.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gen_proto"] = module
    spec.loader.exec_module(module)
    return module


UNCOMMENTED = """syntax = "proto3";
package bad;
service S { rpc M(A) returns (A); }
message A {
  // Told.
  string told = 1;
  string untold = 2;
  oneof pick { int32 one = 3; }
  map<string, string> pairs = 4;
}
enum E {
  E_UNSPECIFIED = 0; // Told behind.
  E_UNTOLD = 1;
}
"""


def test_comment_check_names_every_uncommented_element(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = _generator()
    proto = tmp_path / "proto"
    (proto / "netfence/v1").mkdir(parents=True)
    (proto / "netfence/v1/bad.proto").write_text(UNCOMMENTED)
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(generator, "PROTO", proto)
    _, (file,) = generator.generate(["netfence/v1/bad.proto"], tmp_path / "out")
    assert [place.split(": ")[1] for place in generator.missing_comments(file)] == [
        *("S", "S.M", "A", "A.untold", "A.one", "A.pairs", "A.pick", "E", "E.E_UNTOLD")
    ]


def test_check_names_a_file_that_is_out_of_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = _generator()
    monkeypatch.setattr(generator, "OUTPUT", tmp_path / "v1")
    monkeypatch.setattr(sys, "argv", ["gen_proto.py"])
    assert generator.main() == 0
    monkeypatch.setattr(sys, "argv", ["gen_proto.py", "--check"])
    assert generator.main() == 0
    (tmp_path / "v1/daemon_pb2.py").write_text("# edited by hand\n")
    (tmp_path / "v1/gone_pb2.py").write_text("")
    capsys.readouterr()
    assert generator.main() == 1
    said = capsys.readouterr().err
    assert re.findall(r"gen_proto: (\w+\.py)", said) == ["daemon_pb2.py", "gone_pb2.py"]
    assert (tmp_path / "v1/daemon_pb2.py").read_text() == "# edited by hand\n"


def test_committed_code_is_what_the_generator_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = _generator()
    monkeypatch.setattr(sys, "argv", ["gen_proto.py", "--check"])
    assert generator.main() == 0


def _least_version(requirement: str) -> tuple[int, ...]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (found,) = (line for line in project["dependencies"] if re.match(rf"{requirement}\b(?!-)", line))
    match = re.search(r">=([\d.]+)", found)
    assert match is not None, found
    return tuple(map(int, match[1].split(".")))


def test_dependencies_are_as_new_as_the_generated_code_wants() -> None:
    # Generated modules refuse to load with older libraries; pip must not choose those.
    protobuf = re.search(r"Protobuf Python Version: ([\d.]+)", (ROOT / "src/netfence/v1/daemon_pb2.py").read_text())
    stubs = re.search(r"GENERATED_VERSION = '([\d.]+)'", (ROOT / "src/netfence/v1/daemon_pb2_grpc.py").read_text())
    assert protobuf is not None
    assert stubs is not None
    assert _least_version("protobuf") >= tuple(map(int, protobuf[1].split(".")))
    assert _least_version("grpcio") >= tuple(map(int, stubs[1].split(".")))
