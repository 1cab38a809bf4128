"""Named bounds of the DNS servers, each with its reason; a bound that is not here does not exist (style.md 5)."""

from __future__ import annotations

from typing import Final

MAX_UDP_REPLY: Final = 1232
"""Octets of the largest UDP message we send or invite: it crosses any path of IPv6's minimum MTU without fragments."""

MIN_UDP_REPLY: Final = 512
"""Octets that every client takes over UDP (RFC 1035 section 4.2.1); smaller EDNS sizes mean this one (RFC 6891)."""

MAX_UPSTREAM_DATAGRAM: Final = 4096
"""Octets read of one upstream datagram: more than we invite; what is longer is cut, fails to parse and is not used."""

MAX_RECORDS: Final = 512
"""Records of an upstream answer that we take: the largest RRsets in use have some hundreds."""

MAX_POINTERS: Final = 64
"""Compression pointers followed in one name: real names have one for each label that another name shares at most."""

MAX_NAME_WORK: Final = 65_536
"""What reading all names of an answer may cost: a name its octets and 8 for each label and pointer. 512 records with
names of 80 octets and 5 labels each fit; more than 3 ms of the event loop do not."""

MAX_SVCB_OCTETS: Final = 8192
"""Octets of RDATA of all SVCB and HTTPS records in an answer: real ones have 50 to 500, keys for ECH included, and
every 4 may be a parameter or an address."""

MAX_TARGETS: Final = 16
"""Names that the SVCB and HTTPS records of one answer lead to: each is matched against the deny rules."""

MAX_ADDRESSES: Final = 512
"""Addresses of one answer that are opened, and special ones in it that are looked up: each costs microseconds."""

MAX_CUT_RECORDS: Final = 100
"""Records of an answer out of which special-purpose addresses are cut: its names go through dnslib, at 10 to 20 µs a
record. Answers that mix so many records with addresses that have to go are nobody's but an attacker's."""

MAX_CUT_NAME_WORK: Final = 16_384
"""As `MAX_NAME_WORK`, for an answer that is cut: dnslib is slower, and writes a name of many labels in square time."""

MAX_CUTS: Final = 32
"""Cut answers that an attachment keeps: the same answer is not cut again for every query that meets it."""

MAX_CHAIN: Final = 16
"""CNAMEs followed from the question's name; resolvers stop at 8 to 16 and real chains have fewer than 6."""

MAX_QUERY_EXTRAS: Final = 4
"""Additional records of a query: OPT, and perhaps a signature that we ignore."""

MAX_TCP_QUERY: Final = 4096
"""Octets of a query over TCP: a 255-octet name and padding are below 1 KiB, a larger length prefix is garbage."""

MAX_TCP_CONNECTIONS: Final = 32
"""Open TCP connections of one attachment: a workload's resolvers use one or two each."""

MAX_TCP_PIPELINE: Final = 16
"""Queries of one TCP connection being answered at once; reading pauses above it."""

MAX_TCP_UNSENT: Final = 131_072
"""Octets written to a TCP client that does not read; beyond it reading pauses and the idle time-out ends it."""

TCP_IDLE_S: Final = 10.0
"""Seconds a TCP connection may go without a complete query or a read answer (RFC 7766 section 6.2.3: a few seconds)."""

MAX_OUTSTANDING: Final = 256
"""Queries of one attachment waiting for an upstream or the control plane: 256 at 20 ms are 12,800 per second. Above it
SERVFAIL, at once."""

MAX_FLIGHTS: Final = 4096
"""Upstream questions of the whole daemon in the air, each with a socket of its own."""

MAX_FREE_FLIGHTS: Final = 2048
"""While fewer are in the air an attachment is bound by `MAX_OUTSTANDING` alone; above it each attachment may still have
one. 2048 and one for each of 2047 attachments are `MAX_FLIGHTS`: nobody's greed takes the last one of another."""

MAX_BAD_DATAGRAMS: Final = 8
"""Datagrams with the wrong id or question taken from one upstream socket before TCP is used instead: more are somebody
guessing, and TCP cannot be guessed."""

RESOLVE_DEADLINE_S: Final = 20.0
"""Seconds after which a question is given up whatever upstreams are left: the client (5 s in glibc, thrice) is gone."""

MAX_CACHE_ENTRIES: Final = 32_768
"""Answers in the shared cache of the daemon; with `MAX_CACHED_ANSWER` about 20 MB of usual answers, 150 MB at worst."""

MAX_CACHE_SHARE: Final = MAX_CACHE_ENTRIES // 8
"""Answers in the shared cache that one attachment's questions may have brought in."""

MAX_CACHED_ANSWER: Final = 4096
"""Octets of an answer that is cached; larger ones are rare and are asked for again."""

MAX_NEGATIVE_S: Final = 3 * 3600.0
"""Seconds a negative answer is cached at most (RFC 2308 section 5)."""

MAX_HOT_ENTRIES: Final = 512
"""Ready-made replies of one attachment (its own fast path): a workload's distinct queries of a few minutes."""

MAX_HOT_REPLY: Final = 512
"""Octets of a ready-made reply; see `MAX_HOT_KEY`."""

MAX_HOT_KEY: Final = 512
"""Octets of a query with a ready-made reply: a name of 255 and EDNS options with padding to 468 (RFC 8467) fit. A
datagram has up to 64 kB."""

MAX_HOT_ANSWER: Final = 4096
"""Octets of the answer that a ready-made reply is made of anew each second (its OPT may be all of it): with
`MAX_HOT_ENTRIES` at most 3 MB for an attachment that tries to fill it."""

MAX_DECISIONS: Final = 1024
"""Decisions of the control plane remembered per attachment in DNS mode `proxy`."""

MAX_REJUDGE: Final = 4
"""Times one query is begun anew because the policy changed while it waited; then SERVFAIL."""

MAX_EDE_TEXT: Final = 160
"""Octets of the text in an Extended DNS Error: a sentence, and the reply still fits 512 octets."""
