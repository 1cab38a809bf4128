"""The gRPC channel to one address of the control plane: its transport security and every option, each with a reason.

A channel is made for one connection and closed with it: a client's certificates cannot be exchanged in a channel that
exists, a new one resolves the address anew and at once, and then the pauses between tries are the stream owner's alone.
Which address is next, and when, is not known here; nor where secrets come from (`credentials`).
"""

from __future__ import annotations

from typing import Final
from urllib.parse import quote

import grpc
import grpc.aio

from netfence.control.credentials import Secrets

KEEPALIVE_TIME_MS: Final = 310_000
"""Pause between HTTP/2 pings: above 5 minutes, because Go servers answer more frequent ones with GOAWAY
(too_many_pings) unless they were told otherwise. Dead TCP peers are found sooner, see KEEPALIVE_TIMEOUT_MS; the pings
are for a peer whose kernel still answers but whose process does not."""

KEEPALIVE_TIMEOUT_MS: Final = 20_000
"""Wait for the answer to a ping. gRPC also makes it TCP_USER_TIMEOUT of the socket: data, such as a heartbeat, that
stays unacknowledged so long ends the connection. So a dead peer is found within a heartbeat interval and this.
Measured on a link that drops everything: 20.5 s with data in flight, 330.5 s without; with neither this nor pings,
nothing is noticed in 120 s."""

CONNECT_TIMEOUT_MS: Final = 5_000
"""TCP and TLS handshake with one address: room for two lost SYNs (sent again after 1 s and 3 s), and the next address
of `control_plane.url` is tried soon."""

INITIAL_BACKOFF_MS: Final = 1_000
"""gRPC's own first pause before it connects again. A channel is not used after a failure (see the module), so this
matters only for who keeps one: short, because calls in the pause fail without a try."""

MAX_BACKOFF_MS: Final = 3_000
"""gRPC's own longest pause: as long as the stream owner's first tries take (wire.md, behaviour 5)."""

LOCAL_AUTHORITY: Final = "localhost"
"""`:authority` on a unix socket, where gRPC's own default is the path: Rust's and .NET's servers refuse that, as it is
no host name (grpc/grpc issues 34305 and 38142)."""


def make_channel(address: str, secrets: Secrets, *, max_message_size: int) -> grpc.aio.Channel:
    """Return a new channel to ``host:port``, ``[v6]:port`` or ``unix:/path``; the caller closes it.

    TLS if `secrets` has a CA, mutual if it has a certificate too. `max_message_size` is bytes, in both directions.
    """
    unix = address.startswith("unix:/")  # "unix:443" is a host's name and a port
    # gRPC wants a URI: without the scheme it would take the host in "dns:443" for one.
    target = f"unix:{quote(address[5:])}" if unix else f"dns:///{address}"
    options = [
        ("grpc.max_receive_message_length", max_message_size),
        ("grpc.max_send_message_length", max_message_size),
        # Environment variables must not redirect the stream that the fence is told by.
        ("grpc.enable_http_proxy", 0),
        ("grpc.address_http_proxy_enabled_addresses", ""),
        # Nor may a TXT record of the control plane's domain configure the channel.
        ("grpc.service_config_disable_resolution", 1),
        # A connection is this channel's own, so that new secrets mean a new connection.
        ("grpc.use_local_subchannel_pool", 1),
        # A stream that was begun twice would be two daemons.
        ("grpc.enable_retries", 0),
        ("grpc.initial_reconnect_backoff_ms", INITIAL_BACKOFF_MS),
        ("grpc.max_reconnect_backoff_ms", MAX_BACKOFF_MS),
        ("grpc.min_reconnect_backoff_ms", CONNECT_TIMEOUT_MS),
        ("grpc.keepalive_time_ms", KEEPALIVE_TIME_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 0),  # Go servers count these as too many, whatever the pause
        ("grpc.http2.max_pings_without_data", 0),  # no limit: a stream may be silent for long
    ]
    if authority := secrets.server_name or (LOCAL_AUTHORITY if unix else ""):
        # Also the name that TLS asks for and checks; grpc.ssl_target_name_override would add nothing.
        options.append(("grpc.default_authority", authority))
    if secrets.ca is None:
        return grpc.aio.insecure_channel(target, options=options)
    credentials = grpc.ssl_channel_credentials(secrets.ca, secrets.key, secrets.cert)
    return grpc.aio.secure_channel(target, credentials, options=options)


def call_metadata(secrets: Secrets) -> tuple[tuple[str, str], ...]:
    """Return the metadata that every call carries: the token, if there is one."""
    return () if secrets.token is None else (("authorization", f"Bearer {secrets.token}"),)
