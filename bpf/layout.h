/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* What the kernel and the daemon share: map keys, values, limits.
 *
 * The daemon never restates these: the compile child writes sizes, offsets and every NF_ constant below to layout.json
 * (dataplane/compile.py), which therefore wants each constant as one line `#define NF_NAME number`.
 * Addresses are 16 bytes in network order, IPv4 as ::ffff:a.b.c.d. Times are jiffies (bpf_jiffies64).
 */
#ifndef NETFENCE_LAYOUT_H
#define NETFENCE_LAYOUT_H

#define NF_SLOTS 2048            /* attachments + 1: slot 0 means start_mode */
#define NF_POLICIES 4096         /* one in force per slot, as many being filled or waiting for RCU */
#define NF_DIRECT_IFINDEX 65536  /* interface indices looked up in an array; a hash beyond */
#define NF_RULES 1048576         /* per policy and family; room for limits.MAX_CIDR_RULES */
#define NF_LEASES_DEFAULT 262144 /* dns.max_leases_total */
#define NF_INBOUND 131072        /* TCP connections begun from outside, all attachments */
#define NF_INBOUND_PER_SLOT 4096 /* one attachment's share of them */
#define NF_SEEN 131072           /* destinations that audit let through, all attachments */
#define NF_SEEN_PER_SLOT 4096    /* one attachment's share of them */
#define NF_FLOWS_BYTES 262144    /* of the ring of reports: some 2,900 of them; a power of two and pages */
#define NF_FLOW_WINDOW_SHIFT 5   /* 32 jiffies: a tenth of a second or so, by HZ */
#define NF_FLOWS_PER_WINDOW 64   /* reports of one attachment on one CPU in that time */
#define NF_HOST_ADDRESSES 4096   /* addresses of this host that `allow_replies: host` knows */
#define NF_OWN_ADDRESSES 16      /* addresses of one interface and its bridge, for neighbour discovery */
#define NF_TTL_NESTING 4         /* limits.MAX_TTL_NESTING: expired prefixes looked through before a live one */
#define NF_EXT_HEADERS 6         /* IPv6 extension headers; RFC 8200 4.1 knows six kinds, each once */
#define NF_PULL_BYTES 512        /* made linear when headers are not: more than any chain we accept needs */

/* `active`: bits of the one word that switches a policy. */
#define NF_ACTIVE_MODE_SHIFT 16   /* bits 0-15: policy index; 16-23: mode */
#define NF_ACTIVE_RULES4 16777216 /* bit 24: the policy has IPv4 rules */
#define NF_ACTIVE_RULES6 33554432 /* bit 25: … IPv6 rules */
#define NF_ACTIVE_LEASES 67108864 /* bit 26: the slot may have leases */
#define NF_ACTIVE_AUDIT 134217728 /* bit 27: count, do not drop */
#define NF_ACTIVE_START 268435456 /* bit 28: no policy yet: start_mode */
/* bit 63: the daemon's own (dataplane/slotword.py): the policy is not stored yet; no program looks at it */

/* `flags`: what does not change with the policy. */
#define NF_FLAG_L3 1           /* no Ethernet header (tun, wireguard) */
#define NF_FLAG_CGROUP 2       /* the target is a cgroup */
#define NF_FLAG_HOST 4         /* host direction: the daemon's own traffic passes */
#define NF_FLAG_DHCP 8         /* enforcement.allow_dhcp */
#define NF_FLAG_LINK_LOCAL 16  /* enforcement.allow_link_local */
#define NF_FLAG_REPLIES 32     /* enforcement.allow_replies is not off */
#define NF_FLAG_REPLIES_ANY 64 /* … is any */
#define NF_FLAG_WATCH 128      /* somebody wants to be told of drops */

struct address {
    __u32 word[4];
};

/* One entry per slot. Written by user space only, through mmap; `active` in one aligned 8-byte store. */
struct config {
    __u64 active;
    __u64 established_idle; /* jiffies */
    __u64 established_max;  /* jiffies */
    __u64 handshake_idle;   /* jiffies an unanswered or closing inbound connection lives */
    __u64 daemon_cgroup;    /* cgroup id of the daemon, NF_FLAG_HOST */
    struct address dns_address;
    __u16 dns_port;      /* network order */
    __u16 dns_port_low;  /* host order; every attachment's DNS port lies in low … high, or is 53 */
    __u16 dns_port_high; /* host order */
    __u16 own_count;
    __u32 flags;
    __u32 pad;
    struct address own[NF_OWN_ADDRESSES];
    __u8 attachment[40]; /* its id, text; what a daemon without its state knows it by */
};

struct rule_key4 {
    __u32 length;
    __u32 address;
};

struct rule_key6 {
    __u32 length;
    struct address address;
};

/* Expiries: 0 = not in that list, ~0 = for ever, else live while > now. */
struct rule {
    __u64 allow;
    __u64 deny;
    __u64 length; /* of this prefix, in bits: an expired one is passed over by asking for length - 1 */
};

struct lease_key {
    __u32 slot;
    struct address address;
};

struct lease {
    __u64 expiry;
    __u64 last_use; /* of TCP; 0 = never */
};

/* A TCP connection begun from outside, as the workload's answers name it. */
struct inbound_key {
    __u32 slot;
    struct address peer;
    struct address own;
    __u16 peer_port; /* network order */
    __u16 own_port;  /* network order */
};

#define NF_INBOUND_SYN 0 /* the workload has not answered with more than SYN+ACK */
#define NF_INBOUND_OPEN 1
#define NF_INBOUND_CLOSING 2 /* FIN or RST seen */

struct inbound {
    __u64 last_use;
    __u64 state;
};

/* Entries in use = added - removed; the kernel only adds, user space only removes, so neither needs a lock. `missed` counts
 * SYNs of connections for which there was no room. */
struct inbound_count {
    __u32 added;
    __u32 removed;
    __u64 missed;
};

struct endpoint {
    struct address address;
    __u32 port; /* network order in the low 16 bits, as struct config.dns_port */
};

/* Side by side, so that a packet touches one cache line. */
struct count {
    __u64 packets;
    __u64 bytes;
};

/* How many reports this CPU has made of the slot's drops in this window, and how many it kept back since the last. */
struct reported {
    __u64 window; /* jiffies >> NF_FLOW_WINDOW_SHIFT */
    __u32 flows;
    __u32 lost;
};

struct counters {
    struct count real[32];  /* by REASON_ */
    struct count would[32]; /* audit mode: by the reason that would have dropped */
    struct reported reported;
};

/* A report of one packet that was dropped, or in audit mode would have been. Addresses are zero where not known. */
struct flow {
    __u64 at; /* jiffies */
    __u32 slot;
    __u32 length;           /* bytes */
    __u32 lost;             /* reports kept back before this one, of this slot and CPU */
    __u16 source_port;      /* network order; 0 without ports */
    __u16 destination_port; /* network order */
    __u8 reason;            /* REASON_ */
    __u8 would;             /* it passed all the same: audit */
    __u8 protocol;
    __u8 ipv6; /* arrived as IPv6 */
    __u32 pad;
    struct address source;
    struct address destination;
};

/* What audit mode let through, for `suggest`. */
struct seen_key {
    __u32 slot;
    struct address destination;
    __u16 port; /* network order; 0 without ports */
    __u8 protocol;
    __u8 pad;
};

struct seen {
    __u64 packets;
    __u64 bytes;
};

/* As inbound_count; `missed` counts packets for whose destination there was no room. */
struct seen_count {
    __u32 added;
    __u32 removed;
    __u64 missed;
};

#endif
