/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Why a packet passed or was dropped: the index into struct counters.
 * Mirrors: src/netfence/policy/modes.py (Mode, Reason). tests/unit/test_numbering.py compares them.
 */
#ifndef NETFENCE_REASONS_H
#define NETFENCE_REASONS_H

#define MODE_DISABLED 1
#define MODE_ALLOWLIST 2
#define MODE_BLOCK_ALL 3
#define MODE_DENYLIST 4

/* pass */
#define REASON_DISABLED 0
#define REASON_ALLOW_RULE 1
#define REASON_LEASE 2
#define REASON_ESTABLISHED 3
#define REASON_DEFAULT_PASS 4
#define REASON_REPLY 5
#define REASON_ARP 6
#define REASON_NEIGHBOUR 7
#define REASON_DNS 8
#define REASON_DHCP 9
#define REASON_LOOPBACK 10
#define REASON_DAEMON 11
#define REASON_LINK_LOCAL 12
/* drop */
#define REASON_DENY_RULE 16
#define REASON_DEFAULT_DROP 17
#define REASON_BLOCK_ALL 18
#define REASON_START 19
#define REASON_METADATA 20
#define REASON_FOREIGN_DNS 21
#define REASON_CONNECT 22
#define REASON_NOT_IP 23
#define REASON_VLAN_DEPTH 24
#define REASON_TRUNCATED 25
#define REASON_UNREADABLE 26
#define REASON_EXT_HEADERS 27
#define REASON_SOURCE_ROUTE 28

#define FIRST_DROP 16
#define REASON_COUNT 32

#endif
