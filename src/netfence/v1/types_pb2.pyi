from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from typing import ClassVar as _ClassVar

DESCRIPTOR: _descriptor.FileDescriptor

class PolicyMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    POLICY_MODE_UNSPECIFIED: _ClassVar[PolicyMode]
    POLICY_MODE_DISABLED: _ClassVar[PolicyMode]
    POLICY_MODE_ALLOWLIST: _ClassVar[PolicyMode]
    POLICY_MODE_BLOCK_ALL: _ClassVar[PolicyMode]
    POLICY_MODE_DENYLIST: _ClassVar[PolicyMode]

class AttachmentType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ATTACHMENT_TYPE_UNSPECIFIED: _ClassVar[AttachmentType]
    ATTACHMENT_TYPE_TC: _ClassVar[AttachmentType]
    ATTACHMENT_TYPE_CGROUP: _ClassVar[AttachmentType]
    ATTACHMENT_TYPE_XDP: _ClassVar[AttachmentType]

class DnsMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DNS_MODE_UNSPECIFIED: _ClassVar[DnsMode]
    DNS_MODE_DISABLED: _ClassVar[DnsMode]
    DNS_MODE_ALLOWLIST: _ClassVar[DnsMode]
    DNS_MODE_DENYLIST: _ClassVar[DnsMode]
    DNS_MODE_PROXY: _ClassVar[DnsMode]

class UnsubscribeReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    UNSUBSCRIBE_REASON_UNSPECIFIED: _ClassVar[UnsubscribeReason]
    UNSUBSCRIBE_REASON_REMOVED: _ClassVar[UnsubscribeReason]
    UNSUBSCRIBE_REASON_DETACHED: _ClassVar[UnsubscribeReason]
    UNSUBSCRIBE_REASON_ERROR: _ClassVar[UnsubscribeReason]

class ConnectionState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CONNECTION_STATE_UNSPECIFIED: _ClassVar[ConnectionState]
    CONNECTION_STATE_DISCONNECTED: _ClassVar[ConnectionState]
    CONNECTION_STATE_CONNECTING: _ClassVar[ConnectionState]
    CONNECTION_STATE_CONNECTED: _ClassVar[ConnectionState]
POLICY_MODE_UNSPECIFIED: PolicyMode
POLICY_MODE_DISABLED: PolicyMode
POLICY_MODE_ALLOWLIST: PolicyMode
POLICY_MODE_BLOCK_ALL: PolicyMode
POLICY_MODE_DENYLIST: PolicyMode
ATTACHMENT_TYPE_UNSPECIFIED: AttachmentType
ATTACHMENT_TYPE_TC: AttachmentType
ATTACHMENT_TYPE_CGROUP: AttachmentType
ATTACHMENT_TYPE_XDP: AttachmentType
DNS_MODE_UNSPECIFIED: DnsMode
DNS_MODE_DISABLED: DnsMode
DNS_MODE_ALLOWLIST: DnsMode
DNS_MODE_DENYLIST: DnsMode
DNS_MODE_PROXY: DnsMode
UNSUBSCRIBE_REASON_UNSPECIFIED: UnsubscribeReason
UNSUBSCRIBE_REASON_REMOVED: UnsubscribeReason
UNSUBSCRIBE_REASON_DETACHED: UnsubscribeReason
UNSUBSCRIBE_REASON_ERROR: UnsubscribeReason
CONNECTION_STATE_UNSPECIFIED: ConnectionState
CONNECTION_STATE_DISCONNECTED: ConnectionState
CONNECTION_STATE_CONNECTING: ConnectionState
CONNECTION_STATE_CONNECTED: ConnectionState
