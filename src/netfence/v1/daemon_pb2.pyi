import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import empty_pb2 as _empty_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from netfence.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Hook(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    HOOK_UNSPECIFIED: _ClassVar[Hook]
    HOOK_TC: _ClassVar[Hook]
    HOOK_XDP: _ClassVar[Hook]

class Direction(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DIRECTION_UNSPECIFIED: _ClassVar[Direction]
    DIRECTION_WORKLOAD: _ClassVar[Direction]
    DIRECTION_HOST: _ClassVar[Direction]
HOOK_UNSPECIFIED: Hook
HOOK_TC: Hook
HOOK_XDP: Hook
DIRECTION_UNSPECIFIED: Direction
DIRECTION_WORKLOAD: Direction
DIRECTION_HOST: Direction

class AttachRequest(_message.Message):
    __slots__ = ("interface_name", "cgroup_path", "metadata", "hook", "direction")
    class MetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    INTERFACE_NAME_FIELD_NUMBER: _ClassVar[int]
    CGROUP_PATH_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    HOOK_FIELD_NUMBER: _ClassVar[int]
    DIRECTION_FIELD_NUMBER: _ClassVar[int]
    interface_name: str
    cgroup_path: str
    metadata: _containers.ScalarMap[str, str]
    hook: Hook
    direction: Direction
    def __init__(self, interface_name: _Optional[str] = ..., cgroup_path: _Optional[str] = ..., metadata: _Optional[_Mapping[str, str]] = ..., hook: _Optional[_Union[Hook, str]] = ..., direction: _Optional[_Union[Direction, str]] = ...) -> None: ...

class AttachResponse(_message.Message):
    __slots__ = ("id", "dns_address")
    ID_FIELD_NUMBER: _ClassVar[int]
    DNS_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    id: str
    dns_address: str
    def __init__(self, id: _Optional[str] = ..., dns_address: _Optional[str] = ...) -> None: ...

class DetachRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class ListRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListResponse(_message.Message):
    __slots__ = ("attachments", "next_page_token", "total_count")
    ATTACHMENTS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    TOTAL_COUNT_FIELD_NUMBER: _ClassVar[int]
    attachments: _containers.RepeatedCompositeFieldContainer[AttachmentInfo]
    next_page_token: str
    total_count: int
    def __init__(self, attachments: _Optional[_Iterable[_Union[AttachmentInfo, _Mapping]]] = ..., next_page_token: _Optional[str] = ..., total_count: _Optional[int] = ...) -> None: ...

class AttachmentInfo(_message.Message):
    __slots__ = ("id", "target", "type", "mode", "dns_mode", "dns_address", "metadata", "packets_allowed", "packets_blocked", "dns_queries_allowed", "dns_queries_blocked", "attached_at", "policy_version", "policy_hash", "hook", "direction", "attach_mechanism", "packets_would_block", "audit")
    class MetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    ID_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    DNS_MODE_FIELD_NUMBER: _ClassVar[int]
    DNS_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    PACKETS_ALLOWED_FIELD_NUMBER: _ClassVar[int]
    PACKETS_BLOCKED_FIELD_NUMBER: _ClassVar[int]
    DNS_QUERIES_ALLOWED_FIELD_NUMBER: _ClassVar[int]
    DNS_QUERIES_BLOCKED_FIELD_NUMBER: _ClassVar[int]
    ATTACHED_AT_FIELD_NUMBER: _ClassVar[int]
    POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    POLICY_HASH_FIELD_NUMBER: _ClassVar[int]
    HOOK_FIELD_NUMBER: _ClassVar[int]
    DIRECTION_FIELD_NUMBER: _ClassVar[int]
    ATTACH_MECHANISM_FIELD_NUMBER: _ClassVar[int]
    PACKETS_WOULD_BLOCK_FIELD_NUMBER: _ClassVar[int]
    AUDIT_FIELD_NUMBER: _ClassVar[int]
    id: str
    target: str
    type: _types_pb2.AttachmentType
    mode: _types_pb2.PolicyMode
    dns_mode: _types_pb2.DnsMode
    dns_address: str
    metadata: _containers.ScalarMap[str, str]
    packets_allowed: int
    packets_blocked: int
    dns_queries_allowed: int
    dns_queries_blocked: int
    attached_at: _timestamp_pb2.Timestamp
    policy_version: str
    policy_hash: str
    hook: Hook
    direction: Direction
    attach_mechanism: str
    packets_would_block: int
    audit: bool
    def __init__(self, id: _Optional[str] = ..., target: _Optional[str] = ..., type: _Optional[_Union[_types_pb2.AttachmentType, str]] = ..., mode: _Optional[_Union[_types_pb2.PolicyMode, str]] = ..., dns_mode: _Optional[_Union[_types_pb2.DnsMode, str]] = ..., dns_address: _Optional[str] = ..., metadata: _Optional[_Mapping[str, str]] = ..., packets_allowed: _Optional[int] = ..., packets_blocked: _Optional[int] = ..., dns_queries_allowed: _Optional[int] = ..., dns_queries_blocked: _Optional[int] = ..., attached_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., policy_version: _Optional[str] = ..., policy_hash: _Optional[str] = ..., hook: _Optional[_Union[Hook, str]] = ..., direction: _Optional[_Union[Direction, str]] = ..., attach_mechanism: _Optional[str] = ..., packets_would_block: _Optional[int] = ..., audit: _Optional[bool] = ...) -> None: ...

class DaemonStatus(_message.Message):
    __slots__ = ("version", "daemon_id", "hostname", "control_plane_state", "control_plane_address", "attachment_count", "uptime", "kernel_release", "features", "config")
    class FeaturesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class ConfigEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: ConfigValue
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[ConfigValue, _Mapping]] = ...) -> None: ...
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DAEMON_ID_FIELD_NUMBER: _ClassVar[int]
    HOSTNAME_FIELD_NUMBER: _ClassVar[int]
    CONTROL_PLANE_STATE_FIELD_NUMBER: _ClassVar[int]
    CONTROL_PLANE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    ATTACHMENT_COUNT_FIELD_NUMBER: _ClassVar[int]
    UPTIME_FIELD_NUMBER: _ClassVar[int]
    KERNEL_RELEASE_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    version: str
    daemon_id: str
    hostname: str
    control_plane_state: _types_pb2.ConnectionState
    control_plane_address: str
    attachment_count: int
    uptime: _duration_pb2.Duration
    kernel_release: str
    features: _containers.ScalarMap[str, str]
    config: _containers.MessageMap[str, ConfigValue]
    def __init__(self, version: _Optional[str] = ..., daemon_id: _Optional[str] = ..., hostname: _Optional[str] = ..., control_plane_state: _Optional[_Union[_types_pb2.ConnectionState, str]] = ..., control_plane_address: _Optional[str] = ..., attachment_count: _Optional[int] = ..., uptime: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., kernel_release: _Optional[str] = ..., features: _Optional[_Mapping[str, str]] = ..., config: _Optional[_Mapping[str, ConfigValue]] = ...) -> None: ...

class ConfigValue(_message.Message):
    __slots__ = ("json", "source")
    JSON_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    json: str
    source: str
    def __init__(self, json: _Optional[str] = ..., source: _Optional[str] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("id", "verdicts")
    ID_FIELD_NUMBER: _ClassVar[int]
    VERDICTS_FIELD_NUMBER: _ClassVar[int]
    id: str
    verdicts: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, id: _Optional[str] = ..., verdicts: _Optional[_Iterable[str]] = ...) -> None: ...

class FlowEvent(_message.Message):
    __slots__ = ("time", "id", "kind", "verdict", "reason", "protocol", "source", "destination", "domain", "rule", "lost")
    TIME_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    DESTINATION_FIELD_NUMBER: _ClassVar[int]
    DOMAIN_FIELD_NUMBER: _ClassVar[int]
    RULE_FIELD_NUMBER: _ClassVar[int]
    LOST_FIELD_NUMBER: _ClassVar[int]
    time: _timestamp_pb2.Timestamp
    id: str
    kind: str
    verdict: str
    reason: str
    protocol: str
    source: str
    destination: str
    domain: str
    rule: str
    lost: int
    def __init__(self, time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., id: _Optional[str] = ..., kind: _Optional[str] = ..., verdict: _Optional[str] = ..., reason: _Optional[str] = ..., protocol: _Optional[str] = ..., source: _Optional[str] = ..., destination: _Optional[str] = ..., domain: _Optional[str] = ..., rule: _Optional[str] = ..., lost: _Optional[int] = ...) -> None: ...

class ExplainRequest(_message.Message):
    __slots__ = ("id", "subject")
    ID_FIELD_NUMBER: _ClassVar[int]
    SUBJECT_FIELD_NUMBER: _ClassVar[int]
    id: str
    subject: str
    def __init__(self, id: _Optional[str] = ..., subject: _Optional[str] = ...) -> None: ...

class ExplainStep(_message.Message):
    __slots__ = ("kind", "subject", "text")
    KIND_FIELD_NUMBER: _ClassVar[int]
    SUBJECT_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    kind: str
    subject: str
    text: str
    def __init__(self, kind: _Optional[str] = ..., subject: _Optional[str] = ..., text: _Optional[str] = ...) -> None: ...

class ExplainVerdict(_message.Message):
    __slots__ = ("address", "verdict", "reason", "rule", "lease")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    RULE_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    address: str
    verdict: str
    reason: str
    rule: str
    lease: _duration_pb2.Duration
    def __init__(self, address: _Optional[str] = ..., verdict: _Optional[str] = ..., reason: _Optional[str] = ..., rule: _Optional[str] = ..., lease: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class ExplainResponse(_message.Message):
    __slots__ = ("subject", "name_verdict", "steps", "addresses", "remedies")
    SUBJECT_FIELD_NUMBER: _ClassVar[int]
    NAME_VERDICT_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    REMEDIES_FIELD_NUMBER: _ClassVar[int]
    subject: str
    name_verdict: str
    steps: _containers.RepeatedCompositeFieldContainer[ExplainStep]
    addresses: _containers.RepeatedCompositeFieldContainer[ExplainVerdict]
    remedies: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, subject: _Optional[str] = ..., name_verdict: _Optional[str] = ..., steps: _Optional[_Iterable[_Union[ExplainStep, _Mapping]]] = ..., addresses: _Optional[_Iterable[_Union[ExplainVerdict, _Mapping]]] = ..., remedies: _Optional[_Iterable[str]] = ...) -> None: ...

class SuggestRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class SuggestResponse(_message.Message):
    __slots__ = ("policy", "missed")
    POLICY_FIELD_NUMBER: _ClassVar[int]
    MISSED_FIELD_NUMBER: _ClassVar[int]
    policy: str
    missed: int
    def __init__(self, policy: _Optional[str] = ..., missed: _Optional[int] = ...) -> None: ...
