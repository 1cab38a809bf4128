import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from netfence.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DaemonEvent(_message.Message):
    __slots__ = ("sync", "subscribed", "unsubscribed", "heartbeat", "command_result")
    SYNC_FIELD_NUMBER: _ClassVar[int]
    SUBSCRIBED_FIELD_NUMBER: _ClassVar[int]
    UNSUBSCRIBED_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    COMMAND_RESULT_FIELD_NUMBER: _ClassVar[int]
    sync: SyncRequest
    subscribed: Subscribed
    unsubscribed: Unsubscribed
    heartbeat: Heartbeat
    command_result: CommandResult
    def __init__(self, sync: _Optional[_Union[SyncRequest, _Mapping]] = ..., subscribed: _Optional[_Union[Subscribed, _Mapping]] = ..., unsubscribed: _Optional[_Union[Unsubscribed, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., command_result: _Optional[_Union[CommandResult, _Mapping]] = ...) -> None: ...

class SyncRequest(_message.Message):
    __slots__ = ("daemon_id", "hostname", "attachments", "metadata", "capabilities", "daemon_version")
    class MetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    DAEMON_ID_FIELD_NUMBER: _ClassVar[int]
    HOSTNAME_FIELD_NUMBER: _ClassVar[int]
    ATTACHMENTS_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    CAPABILITIES_FIELD_NUMBER: _ClassVar[int]
    DAEMON_VERSION_FIELD_NUMBER: _ClassVar[int]
    daemon_id: str
    hostname: str
    attachments: _containers.RepeatedCompositeFieldContainer[Attachment]
    metadata: _containers.ScalarMap[str, str]
    capabilities: _containers.RepeatedScalarFieldContainer[str]
    daemon_version: str
    def __init__(self, daemon_id: _Optional[str] = ..., hostname: _Optional[str] = ..., attachments: _Optional[_Iterable[_Union[Attachment, _Mapping]]] = ..., metadata: _Optional[_Mapping[str, str]] = ..., capabilities: _Optional[_Iterable[str]] = ..., daemon_version: _Optional[str] = ...) -> None: ...

class Attachment(_message.Message):
    __slots__ = ("id", "target", "type", "mode", "dns_mode", "metadata", "dns_address", "policy_version", "policy_hash")
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
    METADATA_FIELD_NUMBER: _ClassVar[int]
    DNS_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    POLICY_HASH_FIELD_NUMBER: _ClassVar[int]
    id: str
    target: str
    type: _types_pb2.AttachmentType
    mode: _types_pb2.PolicyMode
    dns_mode: _types_pb2.DnsMode
    metadata: _containers.ScalarMap[str, str]
    dns_address: str
    policy_version: str
    policy_hash: str
    def __init__(self, id: _Optional[str] = ..., target: _Optional[str] = ..., type: _Optional[_Union[_types_pb2.AttachmentType, str]] = ..., mode: _Optional[_Union[_types_pb2.PolicyMode, str]] = ..., dns_mode: _Optional[_Union[_types_pb2.DnsMode, str]] = ..., metadata: _Optional[_Mapping[str, str]] = ..., dns_address: _Optional[str] = ..., policy_version: _Optional[str] = ..., policy_hash: _Optional[str] = ...) -> None: ...

class Subscribed(_message.Message):
    __slots__ = ("id", "target", "type", "mode", "dns_mode", "dns_address", "metadata")
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
    id: str
    target: str
    type: _types_pb2.AttachmentType
    mode: _types_pb2.PolicyMode
    dns_mode: _types_pb2.DnsMode
    dns_address: str
    metadata: _containers.ScalarMap[str, str]
    def __init__(self, id: _Optional[str] = ..., target: _Optional[str] = ..., type: _Optional[_Union[_types_pb2.AttachmentType, str]] = ..., mode: _Optional[_Union[_types_pb2.PolicyMode, str]] = ..., dns_mode: _Optional[_Union[_types_pb2.DnsMode, str]] = ..., dns_address: _Optional[str] = ..., metadata: _Optional[_Mapping[str, str]] = ...) -> None: ...

class Unsubscribed(_message.Message):
    __slots__ = ("id", "reason", "error")
    ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    id: str
    reason: _types_pb2.UnsubscribeReason
    error: str
    def __init__(self, id: _Optional[str] = ..., reason: _Optional[_Union[_types_pb2.UnsubscribeReason, str]] = ..., error: _Optional[str] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("stats",)
    STATS_FIELD_NUMBER: _ClassVar[int]
    stats: _containers.RepeatedCompositeFieldContainer[AttachmentStats]
    def __init__(self, stats: _Optional[_Iterable[_Union[AttachmentStats, _Mapping]]] = ...) -> None: ...

class AttachmentStats(_message.Message):
    __slots__ = ("id", "packets_allowed", "packets_blocked", "dns_queries_allowed", "dns_queries_blocked", "bytes_allowed", "bytes_blocked", "policy_hash", "packets_would_block")
    ID_FIELD_NUMBER: _ClassVar[int]
    PACKETS_ALLOWED_FIELD_NUMBER: _ClassVar[int]
    PACKETS_BLOCKED_FIELD_NUMBER: _ClassVar[int]
    DNS_QUERIES_ALLOWED_FIELD_NUMBER: _ClassVar[int]
    DNS_QUERIES_BLOCKED_FIELD_NUMBER: _ClassVar[int]
    BYTES_ALLOWED_FIELD_NUMBER: _ClassVar[int]
    BYTES_BLOCKED_FIELD_NUMBER: _ClassVar[int]
    POLICY_HASH_FIELD_NUMBER: _ClassVar[int]
    PACKETS_WOULD_BLOCK_FIELD_NUMBER: _ClassVar[int]
    id: str
    packets_allowed: int
    packets_blocked: int
    dns_queries_allowed: int
    dns_queries_blocked: int
    bytes_allowed: int
    bytes_blocked: int
    policy_hash: str
    packets_would_block: int
    def __init__(self, id: _Optional[str] = ..., packets_allowed: _Optional[int] = ..., packets_blocked: _Optional[int] = ..., dns_queries_allowed: _Optional[int] = ..., dns_queries_blocked: _Optional[int] = ..., bytes_allowed: _Optional[int] = ..., bytes_blocked: _Optional[int] = ..., policy_hash: _Optional[str] = ..., packets_would_block: _Optional[int] = ...) -> None: ...

class ControlCommand(_message.Message):
    __slots__ = ("id", "sync_ack", "set_mode", "allow_cidr", "deny_cidr", "remove_cidr", "bulk_update", "set_dns_mode", "allow_domain", "deny_domain", "remove_domain", "subscribed_ack", "version", "nonce")
    ID_FIELD_NUMBER: _ClassVar[int]
    SYNC_ACK_FIELD_NUMBER: _ClassVar[int]
    SET_MODE_FIELD_NUMBER: _ClassVar[int]
    ALLOW_CIDR_FIELD_NUMBER: _ClassVar[int]
    DENY_CIDR_FIELD_NUMBER: _ClassVar[int]
    REMOVE_CIDR_FIELD_NUMBER: _ClassVar[int]
    BULK_UPDATE_FIELD_NUMBER: _ClassVar[int]
    SET_DNS_MODE_FIELD_NUMBER: _ClassVar[int]
    ALLOW_DOMAIN_FIELD_NUMBER: _ClassVar[int]
    DENY_DOMAIN_FIELD_NUMBER: _ClassVar[int]
    REMOVE_DOMAIN_FIELD_NUMBER: _ClassVar[int]
    SUBSCRIBED_ACK_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    id: str
    sync_ack: SyncAck
    set_mode: SetMode
    allow_cidr: CIDREntry
    deny_cidr: CIDREntry
    remove_cidr: str
    bulk_update: BulkUpdate
    set_dns_mode: SetDnsMode
    allow_domain: DomainEntry
    deny_domain: DomainEntry
    remove_domain: str
    subscribed_ack: SubscribedAck
    version: str
    nonce: str
    def __init__(self, id: _Optional[str] = ..., sync_ack: _Optional[_Union[SyncAck, _Mapping]] = ..., set_mode: _Optional[_Union[SetMode, _Mapping]] = ..., allow_cidr: _Optional[_Union[CIDREntry, _Mapping]] = ..., deny_cidr: _Optional[_Union[CIDREntry, _Mapping]] = ..., remove_cidr: _Optional[str] = ..., bulk_update: _Optional[_Union[BulkUpdate, _Mapping]] = ..., set_dns_mode: _Optional[_Union[SetDnsMode, _Mapping]] = ..., allow_domain: _Optional[_Union[DomainEntry, _Mapping]] = ..., deny_domain: _Optional[_Union[DomainEntry, _Mapping]] = ..., remove_domain: _Optional[str] = ..., subscribed_ack: _Optional[_Union[SubscribedAck, _Mapping]] = ..., version: _Optional[str] = ..., nonce: _Optional[str] = ...) -> None: ...

class SyncAck(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SubscribedAck(_message.Message):
    __slots__ = ("mode", "allow_cidrs", "deny_cidrs", "dns", "audit")
    MODE_FIELD_NUMBER: _ClassVar[int]
    ALLOW_CIDRS_FIELD_NUMBER: _ClassVar[int]
    DENY_CIDRS_FIELD_NUMBER: _ClassVar[int]
    DNS_FIELD_NUMBER: _ClassVar[int]
    AUDIT_FIELD_NUMBER: _ClassVar[int]
    mode: _types_pb2.PolicyMode
    allow_cidrs: _containers.RepeatedCompositeFieldContainer[CIDREntry]
    deny_cidrs: _containers.RepeatedCompositeFieldContainer[CIDREntry]
    dns: DnsConfig
    audit: bool
    def __init__(self, mode: _Optional[_Union[_types_pb2.PolicyMode, str]] = ..., allow_cidrs: _Optional[_Iterable[_Union[CIDREntry, _Mapping]]] = ..., deny_cidrs: _Optional[_Iterable[_Union[CIDREntry, _Mapping]]] = ..., dns: _Optional[_Union[DnsConfig, _Mapping]] = ..., audit: _Optional[bool] = ...) -> None: ...

class BulkUpdate(_message.Message):
    __slots__ = ("mode", "allow_cidrs", "deny_cidrs", "dns", "audit")
    MODE_FIELD_NUMBER: _ClassVar[int]
    ALLOW_CIDRS_FIELD_NUMBER: _ClassVar[int]
    DENY_CIDRS_FIELD_NUMBER: _ClassVar[int]
    DNS_FIELD_NUMBER: _ClassVar[int]
    AUDIT_FIELD_NUMBER: _ClassVar[int]
    mode: _types_pb2.PolicyMode
    allow_cidrs: _containers.RepeatedCompositeFieldContainer[CIDREntry]
    deny_cidrs: _containers.RepeatedCompositeFieldContainer[CIDREntry]
    dns: DnsConfig
    audit: bool
    def __init__(self, mode: _Optional[_Union[_types_pb2.PolicyMode, str]] = ..., allow_cidrs: _Optional[_Iterable[_Union[CIDREntry, _Mapping]]] = ..., deny_cidrs: _Optional[_Iterable[_Union[CIDREntry, _Mapping]]] = ..., dns: _Optional[_Union[DnsConfig, _Mapping]] = ..., audit: _Optional[bool] = ...) -> None: ...

class SetMode(_message.Message):
    __slots__ = ("mode",)
    MODE_FIELD_NUMBER: _ClassVar[int]
    mode: _types_pb2.PolicyMode
    def __init__(self, mode: _Optional[_Union[_types_pb2.PolicyMode, str]] = ...) -> None: ...

class SetDnsMode(_message.Message):
    __slots__ = ("mode",)
    MODE_FIELD_NUMBER: _ClassVar[int]
    mode: _types_pb2.DnsMode
    def __init__(self, mode: _Optional[_Union[_types_pb2.DnsMode, str]] = ...) -> None: ...

class DnsConfig(_message.Message):
    __slots__ = ("mode", "allow_domains", "deny_domains", "upstream_servers")
    MODE_FIELD_NUMBER: _ClassVar[int]
    ALLOW_DOMAINS_FIELD_NUMBER: _ClassVar[int]
    DENY_DOMAINS_FIELD_NUMBER: _ClassVar[int]
    UPSTREAM_SERVERS_FIELD_NUMBER: _ClassVar[int]
    mode: _types_pb2.DnsMode
    allow_domains: _containers.RepeatedCompositeFieldContainer[DomainEntry]
    deny_domains: _containers.RepeatedCompositeFieldContainer[DomainEntry]
    upstream_servers: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, mode: _Optional[_Union[_types_pb2.DnsMode, str]] = ..., allow_domains: _Optional[_Iterable[_Union[DomainEntry, _Mapping]]] = ..., deny_domains: _Optional[_Iterable[_Union[DomainEntry, _Mapping]]] = ..., upstream_servers: _Optional[_Iterable[str]] = ...) -> None: ...

class CIDREntry(_message.Message):
    __slots__ = ("cidr", "ttl")
    CIDR_FIELD_NUMBER: _ClassVar[int]
    TTL_FIELD_NUMBER: _ClassVar[int]
    cidr: str
    ttl: _duration_pb2.Duration
    def __init__(self, cidr: _Optional[str] = ..., ttl: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class DomainEntry(_message.Message):
    __slots__ = ("domain", "include_subdomains")
    DOMAIN_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_SUBDOMAINS_FIELD_NUMBER: _ClassVar[int]
    domain: str
    include_subdomains: bool
    def __init__(self, domain: _Optional[str] = ..., include_subdomains: _Optional[bool] = ...) -> None: ...

class DnsQueryRequest(_message.Message):
    __slots__ = ("id", "domain", "query_type")
    ID_FIELD_NUMBER: _ClassVar[int]
    DOMAIN_FIELD_NUMBER: _ClassVar[int]
    QUERY_TYPE_FIELD_NUMBER: _ClassVar[int]
    id: str
    domain: str
    query_type: str
    def __init__(self, id: _Optional[str] = ..., domain: _Optional[str] = ..., query_type: _Optional[str] = ...) -> None: ...

class DnsQueryResponse(_message.Message):
    __slots__ = ("allow", "add_to_filter", "ips", "ttl_seconds")
    ALLOW_FIELD_NUMBER: _ClassVar[int]
    ADD_TO_FILTER_FIELD_NUMBER: _ClassVar[int]
    IPS_FIELD_NUMBER: _ClassVar[int]
    TTL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    allow: bool
    add_to_filter: bool
    ips: _containers.RepeatedScalarFieldContainer[str]
    ttl_seconds: int
    def __init__(self, allow: _Optional[bool] = ..., add_to_filter: _Optional[bool] = ..., ips: _Optional[_Iterable[str]] = ..., ttl_seconds: _Optional[int] = ...) -> None: ...

class CommandResult(_message.Message):
    __slots__ = ("nonce", "id", "version", "ok", "errors", "policy_hash")
    NONCE_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    OK_FIELD_NUMBER: _ClassVar[int]
    ERRORS_FIELD_NUMBER: _ClassVar[int]
    POLICY_HASH_FIELD_NUMBER: _ClassVar[int]
    nonce: str
    id: str
    version: str
    ok: bool
    errors: _containers.RepeatedScalarFieldContainer[str]
    policy_hash: str
    def __init__(self, nonce: _Optional[str] = ..., id: _Optional[str] = ..., version: _Optional[str] = ..., ok: _Optional[bool] = ..., errors: _Optional[_Iterable[str]] = ..., policy_hash: _Optional[str] = ...) -> None: ...
