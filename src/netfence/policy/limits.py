"""Named bounds of the policy, each with its reason; a bound that is not here does not exist (style.md 5)."""

from __future__ import annotations

from typing import Final

MAX_CIDR_RULES: Final = 1_000_000
"""CIDR entries per attachment, both lists and families: some 130 bytes each in the kernel, so about 130 MB."""

MAX_DOMAIN_RULES: Final = 1_000_000
"""Domain rules per attachment: about 150 bytes each in the daemon."""

MAX_TTL_NESTING: Final = 4
"""Prefixes with a TTL that contain one another: an expired one costs the kernel one more trie lookup per packet, and
the verifier wants that loop bounded."""

MAX_TTL_S: Final = 10 * 365 * 86_400.0
"""Ten years: the longest TTL. Beyond it a control plane means "for ever" (which is 0) or is mistaken, and the sum with
the kernel's clock must stay far from overflow."""

MAX_UPSTREAMS: Final = 8
"""DNS upstreams of one policy: each may cost `dns.timeout` before the next is tried, and clients give up sooner."""

MAX_NAME: Final = 253
"""Characters of a domain name without its final dot (RFC 1035 section 2.3.4: 255 octets on the wire)."""

MAX_LABEL: Final = 63
"""Characters of a label (RFC 1035 section 2.3.4)."""

MAX_DOMAIN_TEXT: Final = 4 * MAX_NAME
"""Characters of a domain as written, before IDNA conversion: a longer text is refused without being converted, which
takes time quadratic in the length."""

MAX_ATTACHMENTS: Final = 2047
"""Attachments of one daemon: the kernel's per-slot tables have 2048 entries and slot 0 means `start_mode`."""

MAX_NAMES_PER_LEASE: Final = 64
"""Names remembered as holders of one address (a CDN's address has thousands); the least recently asked one is forgotten
first, which can only make a lease end sooner."""

MAX_HOLDS: Final = 65_536
"""Holds (name, address) of one attachment: four for each lease of the default `dns.max_leases`. Bounds what a workload
that asks for ever new names can make us remember."""

MAX_FAULTS: Final = 10_000
"""Faults of one command that are written out; beyond them they are counted. A million bad entries would be a hundred
megabytes about a mistake that the first ten tell."""

MAX_ERROR_TEXT: Final = 80
"""Characters of a bad value that an error message repeats: a megabyte of garbage must not become a log line."""

MAX_METADATA_KEYS: Final = 64
"""Keys of one metadata map: orchestrators label with a dozen."""

MAX_METADATA_KEY_BYTES: Final = 63
"""Bytes of a metadata key in UTF-8: a label's length in the orchestrators that people use."""

MAX_METADATA_VALUE_BYTES: Final = 1024
"""Bytes of a metadata value in UTF-8."""
