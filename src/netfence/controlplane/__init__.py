"""A library to write control planes with, and `netfenced controlplane`, which is one made with it.

Say what policy an attachment gets; the rest is done: streams, resync, results, retries, many daemons at once.

    from netfence.controlplane import Attachment, ControlPlane, Dns, Policy

    WEB = Policy("allowlist", allow=["10.0.0.0/8"], dns=Dns("allowlist", allow=["*.pypi.org"]))
    NOTHING = Policy("block_all")

    async def policy_for(attachment: Attachment) -> Policy:
        return WEB if attachment.metadata.get("role") == "web" else NOTHING

    ControlPlane(policy_for).run("127.0.0.1:7443")

The guide is docs/control-plane.md, a whole program examples/controlplane/control_plane.py.
"""

from netfence.controlplane.limits import Limits
from netfence.controlplane.plane import ControlPlane
from netfence.controlplane.policy import Cidr, Dns, DnsMode, Domain, Mode, Policy
from netfence.controlplane.tls import ServerTls
from netfence.controlplane.tokens import token_file
from netfence.controlplane.views import (
    Attachment,
    AttachmentStatus,
    Counters,
    Daemon,
    DaemonStatus,
    NameAnswer,
    Outcome,
    Peer,
    Result,
    Results,
    State,
)

__all__ = [
    "Attachment",
    "AttachmentStatus",
    "Cidr",
    "ControlPlane",
    "Counters",
    "Daemon",
    "DaemonStatus",
    "Dns",
    "DnsMode",
    "Domain",
    "Limits",
    "Mode",
    "NameAnswer",
    "Outcome",
    "Peer",
    "Policy",
    "Result",
    "Results",
    "ServerTls",
    "State",
    "token_file",
]
