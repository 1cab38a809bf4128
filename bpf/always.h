/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* What passes in every mode without being asked (semantics.md 6), and the addresses that get special care. Pure.
 *
 * Exceptions by port or type never apply to fragments: every function here that looks at a port or a type says no to them.
 */
#ifndef NETFENCE_ALWAYS_H
#define NETFENCE_ALWAYS_H

#define PORT_DNS 53
#define PORT_DHCP_SERVER 67
#define PORT_DHCP_CLIENT 68
#define PORT_DHCP6_CLIENT 546
#define PORT_DHCP6_SERVER 547

#define ICMPV6_MLD_QUERY 130
#define ICMPV6_MLD_REPORT 131
#define ICMPV6_MLD_DONE 132
#define ICMPV6_ROUTER_SOLICITATION 133
#define ICMPV6_NEIGHBOUR_SOLICITATION 135
#define ICMPV6_NEIGHBOUR_ADVERTISEMENT 136
#define ICMPV6_MLD2_REPORT 143
#define ND_HOP_LIMIT 255
#define MLD_HOP_LIMIT 1

#define IPV4_METADATA 0xa9fea9fe /* 169.254.169.254 */
#define METADATA_RULE_IPV4 16    /* an allow rule at least this long opens the metadata address */
#define METADATA_RULE_IPV6 64

static __always_inline int same_address(const struct address *a, const struct address *b)
{
    return a->word[0] == b->word[0] && a->word[1] == b->word[1] && a->word[2] == b->word[2] && a->word[3] == b->word[3];
}

static __always_inline int is_link_local(const struct address *address)
{
    if (is_mapped(address))
        return (address->word[3] & bpf_htonl(0xffff0000)) == bpf_htonl(0xa9fe0000); /* 169.254.0.0/16 */
    return (address->word[0] & bpf_htonl(0xffc00000)) == bpf_htonl(0xfe800000);     /* fe80::/10 */
}

static __always_inline int is_metadata(const struct address *address)
{
    if (is_mapped(address))
        return address->word[3] == bpf_htonl(IPV4_METADATA);
    return address->word[0] == bpf_htonl(0xfd000ec2) && address->word[1] == 0 && address->word[2] == 0 &&
           address->word[3] == bpf_htonl(0x00000254); /* fd00:ec2::254 */
}

static __always_inline int is_loopback(const struct address *address)
{
    if (is_mapped(address))
        return (address->word[3] & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000);
    return address->word[0] == 0 && address->word[1] == 0 && address->word[2] == 0 && address->word[3] == bpf_htonl(1);
}

static __always_inline int has_ports(const struct packet *packet)
{
    return packet->protocol == PROTO_TCP || packet->protocol == PROTO_UDP;
}

static __always_inline int is_own_dns(const struct packet *packet, const struct config *config)
{
    return has_ports(packet) && !packet->fragment && !packet->raw && packet->destination_port == config->dns_port &&
           same_address(&packet->destination, &config->dns_address);
}

/* RFC 4861: solicitations go to the solicited-node group or to the address itself, hosts ask from their global address. */
static __always_inline int is_neighbour_destination(const struct address *to, const struct config *config)
{
    if ((to->word[0] & bpf_htonl(0xffc00000)) == bpf_htonl(0xfe800000))
        return 1;
    if (to->word[0] == bpf_htonl(0xff020000) && to->word[1] == 0) {
        if (to->word[2] == 0 && (to->word[3] == bpf_htonl(1) || to->word[3] == bpf_htonl(2)))
            return 1; /* ff02::1, ff02::2 */
        if (to->word[2] == bpf_htonl(1) && (to->word[3] & bpf_htonl(0xff000000)) == bpf_htonl(0xff000000))
            return 1; /* ff02::1:ff00:0/104 */
    }
    for (int i = 0; i < NF_OWN_ADDRESSES; i++) {
        if (i >= config->own_count)
            break;
        if (same_address(to, &config->own[i]))
            return 1;
    }
    return 0;
}

static __always_inline int is_neighbour(const struct packet *packet, const struct config *config)
{
    if (packet->protocol != PROTO_ICMPV6 || !packet->ipv6 || packet->fragment)
        return 0;
    if (packet->icmp_type == ICMPV6_ROUTER_SOLICITATION || packet->icmp_type == ICMPV6_NEIGHBOUR_SOLICITATION ||
        packet->icmp_type == ICMPV6_NEIGHBOUR_ADVERTISEMENT)
        return packet->icmp_code == 0 && packet->hop_limit == ND_HOP_LIMIT && !packet->extended &&
               is_neighbour_destination(&packet->destination, config);
    if (packet->icmp_type == ICMPV6_MLD_REPORT || packet->icmp_type == ICMPV6_MLD_DONE ||
        packet->icmp_type == ICMPV6_MLD2_REPORT)
        return packet->hop_limit == MLD_HOP_LIMIT &&
               (packet->destination.word[0] & bpf_htonl(0xffff0000)) == bpf_htonl(0xff020000);
    return 0;
}

static __always_inline int is_dhcp(const struct packet *packet)
{
    const struct address *to = &packet->destination;
    if (packet->protocol != PROTO_UDP || packet->fragment)
        return 0;
    if (!packet->ipv6)
        return packet->source_port == bpf_htons(PORT_DHCP_CLIENT) &&
               packet->destination_port == bpf_htons(PORT_DHCP_SERVER) && to->word[3] == 0xffffffff;
    return packet->source_port == bpf_htons(PORT_DHCP6_CLIENT) &&
           packet->destination_port == bpf_htons(PORT_DHCP6_SERVER) && to->word[0] == bpf_htonl(0xff020000) &&
           to->word[1] == 0 && to->word[2] == 0 && to->word[3] == bpf_htonl(0x00010002); /* ff02::1:2 */
}

static __always_inline int is_free_loopback(const struct packet *packet)
{
    if (packet->fragment || !is_loopback(&packet->destination))
        return 0;
    return !(has_ports(packet) && packet->destination_port == bpf_htons(PORT_DNS));
}

/* The REASON_ under which the packet passes whatever the policy says, or PARSED for: ask the policy. */
static __always_inline int always_passes(const struct packet *packet, const struct config *config, int mode)
{
    if (is_own_dns(packet, config))
        return REASON_DNS;
    if (config->flags & NF_FLAG_CGROUP) {
        if (mode != MODE_BLOCK_ALL && is_free_loopback(packet))
            return REASON_LOOPBACK;
        return is_neighbour(packet, config) ? REASON_NEIGHBOUR : PARSED;
    }
    if (is_neighbour(packet, config))
        return REASON_NEIGHBOUR;
    if ((config->flags & NF_FLAG_DHCP) && is_dhcp(packet))
        return REASON_DHCP;
    return PARSED;
}

#endif
