/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Cursor parsers: bytes in, struct packet out. Pure: no maps, no helpers.
 *
 * Every parser checks bounds, moves the cursor behind what it read and returns PARSED, or the REASON_ that drops the
 * packet. Protocol numbers of Ethernet are in network order, all else in host order unless a name says otherwise.
 */
#ifndef NETFENCE_PARSE_H
#define NETFENCE_PARSE_H

#define PARSED (-1)

#define ETHERTYPE_IPV4 0x0800
#define ETHERTYPE_ARP 0x0806
#define ETHERTYPE_VLAN 0x8100
#define ETHERTYPE_IPV6 0x86dd
#define ETHERTYPE_QINQ 0x88a8
#define MAX_VLAN_TAGS 2

#define PROTO_HOPOPTS 0
#define PROTO_ICMP 1
#define PROTO_TCP 6
#define PROTO_UDP 17
#define PROTO_ROUTING 43
#define PROTO_FRAGMENT 44
#define PROTO_AH 51
#define PROTO_ICMPV6 58
#define PROTO_DSTOPTS 60
#define PROTO_MOBILITY 135
#define PROTO_HIP 139
#define PROTO_SHIM6 140

#define IPV4_MAX_LENGTH 65535
#define IPV4_FRAGMENT_MASK 0x3fff /* more-fragments and offset */
#define IPV4_OFFSET_MASK 0x1fff
#define IPV4_OPT_END 0
#define IPV4_OPT_NOP 1
#define IPV4_OPT_LSRR 131
#define IPV4_OPT_SSRR 137
#define IPV4_OPTIONS 12 /* more of them than that is no packet of ours: dropped as EXT_HEADERS */

#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10

/* Offsets, not pointers: masked to MAX_OFFSET they all look alike to the verifier, so the paths of a loop join again. */
struct cursor {
    void *data;
    void *end;
    __u64 offset;
    __u64 length; /* of the whole packet, what is not linear included */
};

#define MAX_OFFSET 2047

/* What a verdict needs to know of a packet. Only what follows the addresses is zeroed: those of ARP are never read. */
struct packet {
    struct address source;
    struct address destination;
    __u16 source_port;      /* network order; 0 without ports */
    __u16 destination_port; /* network order */
    __u8 arp;
    __u8 ipv6;     /* arrived as IPv6 (a mapped destination too) */
    __u8 protocol; /* upper layer; of a later fragment: what the fragment header says */
    __u8 extended; /* IPv6 extension headers were passed over */
    __u8 fragment; /* any part of a fragmented packet */
    __u8 hop_limit;
    __u8 tcp_flags;
    __u8 icmp_type;
    __u8 icmp_code;
    __u8 raw; /* of a raw socket, whose source address may be forged; told only where it matters */
    __u8 pad[2];
};

struct eth_header {
    __u8 destination[6];
    __u8 source[6];
    __u16 protocol;
};

struct vlan_header {
    __u16 tci;
    __u16 protocol;
};

struct ipv4_header {
    __u8 version_ihl;
    __u8 tos;
    __u16 total_length;
    __u16 id;
    __u16 fragment;
    __u8 ttl;
    __u8 protocol;
    __u16 checksum;
    __u32 source;
    __u32 destination;
};

struct ipv6_header {
    __u32 version_class_flow;
    __u16 payload_length;
    __u8 next_header;
    __u8 hop_limit;
    struct address source;
    struct address destination;
};

/* Extension headers but the fragment header: RFC 8200 4, RFC 4302 2. */
struct extension_header {
    __u8 next_header;
    __u8 length;
    __u8 type;
    __u8 segments_left;
};

struct fragment_header {
    __u8 next_header;
    __u8 reserved;
    __u16 offset;
    __u32 id;
};

struct port_header {
    __u16 source;
    __u16 destination;
};

struct udp_header {
    struct port_header ports;
    __u16 length;
    __u16 checksum;
};

struct tcp_header {
    struct port_header ports;
    __u32 sequence;
    __u32 acknowledgement;
    __u8 offset;
    __u8 flags;
    __u16 window;
    __u16 checksum;
    __u16 urgent;
};

struct icmp_header {
    __u8 type;
    __u8 code;
    __u16 checksum;
};

/* The header at the cursor, or NULL where fewer than `bytes` are left. Does not move the cursor. */
static __always_inline void *peek(struct cursor *cursor, __u64 bytes)
{
    void *header = cursor->data + (cursor->offset & MAX_OFFSET);
    return header + bytes <= cursor->end ? header : 0;
}

/* As peek, and move behind it. */
static __always_inline void *take(struct cursor *cursor, __u64 bytes)
{
    void *header = peek(cursor, bytes);
    cursor->offset += bytes;
    return header;
}

static __always_inline void mapped_address(struct address *to, __u32 ipv4)
{
    to->word[0] = 0;
    to->word[1] = 0;
    to->word[2] = bpf_htonl(0xffff);
    to->word[3] = ipv4;
}

static __always_inline int is_mapped(const struct address *address)
{
    return address->word[0] == 0 && address->word[1] == 0 && address->word[2] == bpf_htonl(0xffff);
}

/* Ports, TCP flags, ICMP type. A first fragment need only hold the ports. */
static __always_inline int parse_upper(struct cursor *cursor, struct packet *packet)
{
    if (packet->protocol == PROTO_TCP) {
        /* Two branches that share nothing: of one pointer for both, older verifiers lose track (seen on 5.10). */
        struct tcp_header *tcp = peek(cursor, sizeof(*tcp));
        if (tcp) {
            packet->tcp_flags = tcp->flags;
            packet->source_port = tcp->ports.source;
            packet->destination_port = tcp->ports.destination;
            return PARSED;
        }
        struct port_header *ports = peek(cursor, sizeof(*ports));
        if (!ports || !packet->fragment)
            return REASON_TRUNCATED;
        packet->source_port = ports->source;
        packet->destination_port = ports->destination;
    } else if (packet->protocol == PROTO_UDP) {
        struct udp_header *udp = peek(cursor, sizeof(*udp));
        if (!udp)
            return REASON_TRUNCATED;
        packet->source_port = udp->ports.source;
        packet->destination_port = udp->ports.destination;
    } else if (packet->protocol == PROTO_ICMPV6 || packet->protocol == PROTO_ICMP) {
        struct icmp_header *icmp = peek(cursor, sizeof(*icmp));
        if (!icmp)
            return REASON_TRUNCATED;
        packet->icmp_type = icmp->type;
        packet->icmp_code = icmp->code;
    }
    return PARSED;
}

/* Source routes send a packet elsewhere than its destination address says: LSRR and SSRR are refused (RFC 7126 4.3).
 * `cursor` stands on the first option, `bytes` (4 … 40) of options follow, all inside the packet.
 */
static __always_inline int parse_ipv4_options(struct cursor cursor, __u64 bytes)
{
    /* No copy of the caller's value to the verifier: what the loop learns of the copy it would "learn" of the original, and
     * on paths that cannot be, 6.12 then forgets what either is ("REG INVARIANTS VIOLATION"). */
    asm volatile("%0 &= 63" : "+r"(bytes));
    __u64 end = cursor.offset + bytes;
    for (int i = 0; i < IPV4_OPTIONS; i++) {
        if (cursor.offset >= end)
            return PARSED;
        __u8 *kind = peek(&cursor, 1);
        if (!kind)
            return REASON_TRUNCATED;
        if (*kind == IPV4_OPT_END)
            return PARSED;
        if (*kind == IPV4_OPT_LSRR || *kind == IPV4_OPT_SSRR)
            return REASON_SOURCE_ROUTE;
        if (*kind == IPV4_OPT_NOP) {
            cursor.offset = (cursor.offset + 1) & MAX_OFFSET;
            continue;
        }
        __u8 *option = peek(&cursor, 2);
        if (!option || option[1] < 2)
            return REASON_TRUNCATED;
        cursor.offset = (cursor.offset + option[1]) & MAX_OFFSET;
    }
    return cursor.offset >= end ? PARSED : REASON_EXT_HEADERS;
}

static __always_inline int parse_ipv4(struct cursor *cursor, struct packet *packet)
{
    struct ipv4_header *ip = take(cursor, sizeof(*ip));
    if (!ip)
        return REASON_TRUNCATED;
    if (ip->version_ihl >> 4 != 4)
        return REASON_NOT_IP;
    __u64 header_bytes = (ip->version_ihl & 15) * 4;
    if (header_bytes < sizeof(*ip))
        return REASON_TRUNCATED;
    /* 0 where the packet is longer than the field can say: "BIG TCP" (Linux 6.3) before it is cut into segments */
    if (bpf_ntohs(ip->total_length) < header_bytes && (ip->total_length || cursor->length <= IPV4_MAX_LENGTH))
        return REASON_TRUNCATED;
    __u16 fragment = bpf_ntohs(ip->fragment);
    mapped_address(&packet->source, ip->source);
    mapped_address(&packet->destination, ip->destination);
    packet->protocol = ip->protocol;
    packet->hop_limit = ip->ttl;
    packet->fragment = (fragment & IPV4_FRAGMENT_MASK) != 0;
    if (header_bytes > sizeof(*ip)) {
        __u64 option_bytes = header_bytes - sizeof(*ip);
        if (!peek(cursor, option_bytes))
            return REASON_TRUNCATED;
        int reason = parse_ipv4_options(*cursor, option_bytes);
        if (reason != PARSED)
            return reason;
        cursor->offset = (cursor->offset + option_bytes) & MAX_OFFSET;
    }
    if (fragment & IPV4_OFFSET_MASK)
        return PARSED;
    return parse_upper(cursor, packet);
}

/* Extension headers as bits: 0, 43, 44, 51, 60 of the first 64 protocol numbers; 135, 139, 140 of the third. */
#define EXTENSIONS_LOW ((1ULL << 0) | (1ULL << 43) | (1ULL << 44) | (1ULL << 51) | (1ULL << 60))
#define EXTENSIONS_HIGH ((1ULL << 7) | (1ULL << 11) | (1ULL << 12))

static __always_inline int is_extension(__u64 header)
{
    __u64 set = header < 64 ? EXTENSIONS_LOW : (header >> 6) == 2 ? EXTENSIONS_HIGH : 0;
    return (set >> (header & 63)) & 1;
}

static __always_inline int parse_ipv6(struct cursor *cursor, struct packet *packet)
{
    struct ipv6_header *ip = take(cursor, sizeof(*ip));
    if (!ip)
        return REASON_TRUNCATED;
    if ((bpf_ntohl(ip->version_class_flow) >> 28) != 6)
        return REASON_NOT_IP;
    packet->source = ip->source;
    packet->destination = ip->destination;
    packet->ipv6 = 1;
    packet->hop_limit = ip->hop_limit;
    __u64 next = ip->next_header;
    if (is_extension(next)) {
        packet->extended = 1;
        for (int i = 0; i < NF_EXT_HEADERS; i++) {
            struct extension_header *extension = peek(cursor, sizeof(struct fragment_header));
            if (!extension)
                return REASON_TRUNCATED;
            __u64 bytes = (extension->length + 1) * 8;
            if (next == PROTO_FRAGMENT) {
                bytes = sizeof(struct fragment_header);
                packet->fragment = 1;
                if (bpf_ntohs(((struct fragment_header *)extension)->offset) & 0xfff8) {
                    packet->protocol = extension->next_header;
                    return PARSED;
                }
            } else if (next == PROTO_AH) {
                bytes = (extension->length + 2) * 4;
            } else if (next == PROTO_ROUTING && extension->segments_left) {
                return REASON_SOURCE_ROUTE;
            }
            next = extension->next_header;
            cursor->offset += bytes;
            if (cursor->offset > MAX_OFFSET - sizeof(struct tcp_header))
                return REASON_EXT_HEADERS;
            if (!peek(cursor, 0))
                return REASON_TRUNCATED;
            if (!is_extension(next))
                break;
        }
        if (is_extension(next))
            return REASON_EXT_HEADERS;
    }
    packet->protocol = next;
    return parse_upper(cursor, packet);
}

static __always_inline int is_vlan(__u16 protocol)
{
    return protocol == bpf_htons(ETHERTYPE_VLAN) || protocol == bpf_htons(ETHERTYPE_QINQ);
}

/* Where the headers end, for sure: an offset, or NF_PULL_BYTES where a look cannot tell. The cursor stands at the start. */
static __always_inline __u64 headers_end(struct cursor *cursor, int l3, __u16 protocol)
{
    if (!l3) {
        struct eth_header *eth = take(cursor, sizeof(*eth));
        if (!eth)
            return NF_PULL_BYTES;
        protocol = eth->protocol;
    }
    for (int i = 0; i < MAX_VLAN_TAGS; i++) {
        if (!is_vlan(protocol))
            break;
        struct vlan_header *vlan = take(cursor, sizeof(*vlan));
        if (!vlan)
            return NF_PULL_BYTES;
        protocol = vlan->protocol;
    }
    if (protocol == bpf_htons(ETHERTYPE_IPV4)) {
        struct ipv4_header *ip = peek(cursor, sizeof(*ip));
        if (ip)
            return cursor->offset + (ip->version_ihl & 15) * 4 + sizeof(struct tcp_header);
    } else if (protocol == bpf_htons(ETHERTYPE_IPV6)) {
        struct ipv6_header *ip = peek(cursor, sizeof(*ip));
        if (ip && !is_extension(ip->next_header))
            return cursor->offset + sizeof(*ip) + sizeof(struct tcp_header);
    }
    return NF_PULL_BYTES;
}

/* From the Ethernet header (or, on L3 devices, the IP header) on; `protocol` in network order, `tags` seen out of band. */
static __always_inline int parse_frame(struct cursor *cursor, int l3, __u16 protocol, int tags, struct packet *packet)
{
    if (!l3) {
        struct eth_header *eth = take(cursor, sizeof(*eth));
        if (!eth)
            return REASON_TRUNCATED;
        protocol = eth->protocol;
    }
    for (int i = 0; i < MAX_VLAN_TAGS; i++) {
        if (!is_vlan(protocol))
            break;
        struct vlan_header *vlan = take(cursor, sizeof(*vlan));
        if (!vlan)
            return REASON_TRUNCATED;
        protocol = vlan->protocol;
        tags++;
    }
    if (is_vlan(protocol) || tags > MAX_VLAN_TAGS)
        return REASON_VLAN_DEPTH;
    if (protocol == bpf_htons(ETHERTYPE_IPV4))
        return parse_ipv4(cursor, packet);
    if (protocol == bpf_htons(ETHERTYPE_IPV6))
        return parse_ipv6(cursor, packet);
    if (protocol == bpf_htons(ETHERTYPE_ARP)) {
        packet->arp = 1;
        return PARSED;
    }
    return REASON_NOT_IP;
}

#endif
