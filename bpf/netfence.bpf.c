/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* The fence: maps, the one verdict path, and entry points of a few lines. See README.md for the hook table.
 *
 * Maps are made by user space (dataplane/maps.py) and come in as -DFD_NAME=n, so that new programs can be loaded against
 * the maps already in force. bcc rewrites nothing here: every access is a plain helper call.
 */
#include <linux/types.h>

#include "reasons.h"
#include "layout.h"
#include "parse.h"
#include "always.h"

#define MAP(fd) ((void *)bpf_pseudo_fd(1, fd))
#define NONE PARSED

#define TC_PASS (-1) /* TCX_NEXT and TC_ACT_UNSPEC: the next program decides too */
#define TC_DROP 2    /* TCX_DROP and TC_ACT_SHOT */
#define CGROUP_PASS 1
#define CGROUP_DROP 0
#define FENCED_MARK 0x4e46 /* skb->tc_index of what entered through a fenced interface */
#define IFINDEX_LO 1
#define SOCKET_RAW 3 /* SOCK_RAW */

/* What the compiler knew of a value it knows no more: else it copies what follows for each value, and the verifier walks
 * twice as far. */
#define FORGET(value) asm volatile("" : "+r"(value))

/* The same for what the verifier knows of a packet: it would walk `decide` once for each way through the parsers. Each
 * word is XORed with a zero of which neither it nor the compiler knows that it is one.
 */
static __always_inline void forget_packet(struct packet *packet, __u64 any)
{
    __u64 same = any;
    FORGET(same);
    __u64 zero = any ^ same;
    FORGET(zero);
    for (__u64 at = 0; at < sizeof(*packet); at += 8) {
        __u64 word;
        __builtin_memcpy(&word, (char *)packet + at, 8);
        word ^= zero;
        __builtin_memcpy((char *)packet + at, &word, 8);
    }
}

#define HOOK_TC 1
#define HOOK_CGROUP 2
#define HOOK_CONNECT 3
#define HOOK_XDP 4

static __always_inline int mode_of(__u64 active)
{
    return (active >> NF_ACTIVE_MODE_SHIFT) & 0xff;
}

static __always_inline __u64 slot_of_interface(__u32 ifindex)
{
    __u32 *slot;
    if (ifindex < NF_DIRECT_IFINDEX)
        slot = bpf_map_lookup_elem(MAP(FD_IF_SLOT), &ifindex);
    else
        slot = bpf_map_lookup_elem(MAP(FD_IF_SLOT_FAR), &ifindex);
    return slot ? *slot : 0;
}

static __always_inline __u64 slot_of_cgroup(void)
{
#ifdef TEST_SLOT
    return TEST_SLOT; /* BPF_PROG_TEST_RUN gives cgroup programs fresh storage */
#else
    return *(__u32 *)bpf_get_local_storage(MAP(FD_CGROUP_SLOT), 0);
#endif
}

static __always_inline struct counters *count(__u64 slot, int reason, int would, __u64 packets, __u64 bytes)
{
    __u32 key = slot;
    __u64 index = reason & (REASON_COUNT - 1);
    struct counters *counters = bpf_map_lookup_elem(MAP(FD_COUNTERS), &key);
    if (!counters)
        return counters;
    struct count *one = would ? &counters->would[index] : &counters->real[index];
    one->packets += packets;
    one->bytes += bytes;
    return counters;
}

/* Tell of a drop whoever watches: so many in a window and no more, whatever the workload sends. Nobody is woken up. */
static __always_inline void report(const struct packet *packet, __u64 slot, struct counters *counters, int reason,
                                   int would, __u64 bytes)
{
    struct reported *reported = &counters->reported;
    __u64 now = bpf_jiffies64();
    if (reported->window != now >> NF_FLOW_WINDOW_SHIFT) {
        reported->window = now >> NF_FLOW_WINDOW_SHIFT;
        reported->flows = 0;
    }
    struct flow *flow = 0;
    if (reported->flows < NF_FLOWS_PER_WINDOW)
        flow = bpf_ringbuf_reserve(MAP(FD_FLOWS), sizeof(*flow), 0);
    if (!flow) {
        reported->lost++;
        return;
    }
    flow->at = now;
    flow->slot = slot;
    flow->length = bytes;
    flow->lost = reported->lost;
    flow->source_port = packet->source_port;
    flow->destination_port = packet->destination_port;
    flow->reason = reason;
    flow->would = would;
    flow->protocol = packet->protocol;
    flow->ipv6 = packet->ipv6;
    flow->pad = 0;
    flow->source = packet->source;
    flow->destination = packet->destination;
    bpf_ringbuf_submit(flow, BPF_RB_NO_WAKEUP);
    reported->flows++;
    reported->lost = 0;
}

/* Remember where a packet went that audit let through. */
static __always_inline void remember(const struct packet *packet, __u64 slot, __u64 packets, __u64 bytes)
{
    __u32 count_key = slot;
    struct seen_key key = {.slot = slot, .destination = packet->destination, .protocol = packet->protocol};
    key.port = packet->destination_port;
    struct seen *seen = bpf_map_lookup_elem(MAP(FD_SEEN), &key);
    if (seen) {
        __sync_fetch_and_add(&seen->packets, packets);
        __sync_fetch_and_add(&seen->bytes, bytes);
        return;
    }
    struct seen_count *used = bpf_map_lookup_elem(MAP(FD_SEEN_COUNT), &count_key);
    if (!used)
        return;
    struct seen fresh = {.packets = packets, .bytes = bytes};
    if (used->added - used->removed < NF_SEEN_PER_SLOT &&
        bpf_map_update_elem(MAP(FD_SEEN), &key, &fresh, BPF_NOEXIST) == 0)
        __sync_fetch_and_add(&used->added, 1);
    else
        __sync_fetch_and_add(&used->missed, packets);
}

/* One step of rule_lookup: what an entry of the trie says, or ASK_SHORTER where it has expired. */
#define ASK_SHORTER (-2)

static __always_inline int rule_verdict(const struct rule *rule, __u64 now)
{
    if (rule->deny > now)
        return REASON_DENY_RULE;
    if (rule->allow > now)
        return REASON_ALLOW_RULE;
    return rule->length ? ASK_SHORTER : NONE;
}

static __always_inline int rule_lookup4(__u32 policy, __u32 address, __u64 now, __u64 *length)
{
    struct rule_key4 key = {.length = 32, .address = address};
    void *rules = bpf_map_lookup_elem(MAP(FD_RULES4), &policy);
    if (!rules)
        return REASON_DENY_RULE; /* a policy without its table: never guessed */
    for (int i = 0; i <= NF_TTL_NESTING; i++) {
        struct rule *rule = bpf_map_lookup_elem(rules, &key);
        if (!rule)
            return NONE;
        *length = rule->length;
        int verdict = rule_verdict(rule, now);
        if (verdict != ASK_SHORTER)
            return verdict;
        key.length = rule->length - 1;
    }
    return REASON_DENY_RULE;
}

static __always_inline int rule_lookup6(__u32 policy, const struct address *address, __u64 now, __u64 *length)
{
    struct rule_key6 key = {.length = 128, .address = *address};
    void *rules = bpf_map_lookup_elem(MAP(FD_RULES6), &policy);
    if (!rules)
        return REASON_DENY_RULE;
    for (int i = 0; i <= NF_TTL_NESTING; i++) {
        struct rule *rule = bpf_map_lookup_elem(rules, &key);
        if (!rule)
            return NONE;
        *length = rule->length;
        int verdict = rule_verdict(rule, now);
        if (verdict != ASK_SHORTER)
            return verdict;
        key.length = rule->length - 1;
    }
    return REASON_DENY_RULE;
}

/* The longest live prefix that covers the destination: REASON_ALLOW_RULE or REASON_DENY_RULE and its length, or NONE.
 *
 * An expired long prefix hides a live shorter one in the trie, so on an expired entry the trie is asked again, one bit
 * shorter. User space bounds such chains (NF_TTL_NESTING); one that is longer all the same denies.
 */
static __always_inline int rule_lookup(const struct packet *packet, __u64 active, __u64 now, __u64 *length)
{
    __u32 policy = active & 0xffff;
    if (is_mapped(&packet->destination))
        return active & NF_ACTIVE_RULES4 ? rule_lookup4(policy, packet->destination.word[3], now, length) : NONE;
    return active & NF_ACTIVE_RULES6 ? rule_lookup6(policy, &packet->destination, now, length) : NONE;
}

static __always_inline int lease_lookup(const struct packet *packet, __u64 slot, const struct config *config, __u64 now)
{
    struct lease_key key = {.slot = slot, .address = packet->destination};
    struct lease *lease = bpf_map_lookup_elem(MAP(FD_LEASES), &key);
    if (!lease)
        return NONE;
    int tcp = packet->protocol == PROTO_TCP && !packet->fragment;
    __u64 last_use = lease->last_use;
    if (lease->expiry > now) {
        if (tcp && last_use != now)
            lease->last_use = now;
        return REASON_LEASE;
    }
    if (!tcp || (packet->tcp_flags & TCP_SYN) || !last_use)
        return NONE;
    if (now - last_use > config->established_idle || now - lease->expiry > config->established_max)
        return NONE;
    lease->last_use = now;
    return REASON_ESTABLISHED;
}

static __always_inline int is_foreign_dns(const struct packet *packet, __u64 slot, const struct config *config)
{
    __u16 port = bpf_ntohs(packet->destination_port);
    if (!has_ports(packet) || (port != PORT_DNS && (port < config->dns_port_low || port > config->dns_port_high)))
        return 0;
    struct endpoint endpoint = {.address = packet->destination, .port = packet->destination_port};
    __u32 *owner = bpf_map_lookup_elem(MAP(FD_DNS_ENDPOINTS), &endpoint);
    return owner && *owner != slot;
}

/* The verdict of a policy on a parsed packet: a REASON_. Everything but counting, auditing and connections from outside.
 *
 * Order (semantics.md 3, 6): foreign DNS → always passed → block_all → longest live rule → metadata → lease → link-local
 * → the mode's default.
 */
static __always_inline int decide(const struct packet *packet, __u64 slot, const struct config *config, __u64 active)
{
    int mode = mode_of(active);
    __u64 length = 0;
    if (packet->arp)
        return REASON_ARP;
    /* First: by default DNS servers listen on the loopback, which else always passes from a cgroup. */
    if (is_foreign_dns(packet, slot, config))
        return REASON_FOREIGN_DNS;
    int reason = always_passes(packet, config, mode);
    if (reason != NONE)
        return reason;
    if (mode != MODE_ALLOWLIST && mode != MODE_DENYLIST)
        return active & NF_ACTIVE_START ? REASON_START : REASON_BLOCK_ALL;
    __u64 now = bpf_jiffies64();
    reason = rule_lookup(packet, active, now, &length);
    if (reason == REASON_DENY_RULE)
        return reason;
    if (is_metadata(&packet->destination)) {
        int enough = is_mapped(&packet->destination) ? METADATA_RULE_IPV4 : METADATA_RULE_IPV6;
        return reason == REASON_ALLOW_RULE && length >= enough ? REASON_ALLOW_RULE : REASON_METADATA;
    }
    if (reason == REASON_ALLOW_RULE)
        return reason;
    if (active & NF_ACTIVE_LEASES) {
        reason = lease_lookup(packet, slot, config, now);
        if (reason != NONE)
            return reason;
    }
    if ((config->flags & NF_FLAG_LINK_LOCAL) && is_link_local(&packet->destination))
        return REASON_LINK_LOCAL;
    return mode == MODE_DENYLIST ? REASON_DEFAULT_PASS : REASON_DEFAULT_DROP;
}

static __always_inline void inbound_key_of(struct inbound_key *key, __u64 slot, const struct address *peer,
                                           const struct address *own, __u16 peer_port, __u16 own_port)
{
    key->slot = slot;
    key->peer = *peer;
    key->own = *own;
    key->peer_port = peer_port;
    key->own_port = own_port;
}

/* Is this an answer on a TCP connection begun from outside? Asked only where nothing matched and the packet would drop. */
static __always_inline int is_reply(const struct packet *packet, __u64 slot, const struct config *config)
{
    __u32 count_key = slot;
    struct inbound_key key = {};
    if (!(config->flags & NF_FLAG_REPLIES) || packet->protocol != PROTO_TCP || packet->fragment)
        return 0;
    if (!(packet->tcp_flags & (TCP_ACK | TCP_RST)))
        return 0;
    struct inbound_count *used = bpf_map_lookup_elem(MAP(FD_INBOUND_COUNT), &count_key);
    if (!used || used->added == used->removed)
        return 0;
    inbound_key_of(&key, slot, &packet->destination, &packet->source, packet->destination_port, packet->source_port);
    struct inbound *inbound = bpf_map_lookup_elem(MAP(FD_INBOUND), &key);
    if (!inbound)
        return 0;
    __u64 now = bpf_jiffies64();
    __u64 idle = inbound->state == NF_INBOUND_OPEN ? config->established_idle : config->handshake_idle;
    if (now - inbound->last_use > idle)
        return 0;
    inbound->last_use = now;
    if (packet->tcp_flags & (TCP_FIN | TCP_RST))
        inbound->state = NF_INBOUND_CLOSING;
    else if (inbound->state == NF_INBOUND_SYN && !(packet->tcp_flags & TCP_SYN))
        inbound->state = NF_INBOUND_OPEN;
    return 1;
}

/* A TCP packet from outside: note a SYN, and the end of a connection so noted. Drops nothing.
 *
 * Nothing but a SYN makes an entry (a revoked server could keep its connection), and `trusted` must hold: the SYN did not
 * enter the host through a fenced interface (a workload could forge one).
 */
static __always_inline void note_inbound(const struct packet *packet, __u64 slot, int trusted)
{
    __u32 count_key = slot;
    struct inbound_key key = {};
    int syn = (packet->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;
    int end = packet->tcp_flags & (TCP_FIN | TCP_RST);
    if (packet->protocol != PROTO_TCP || packet->fragment || !(syn || end) || (syn && !trusted))
        return;
    struct inbound_count *used = bpf_map_lookup_elem(MAP(FD_INBOUND_COUNT), &count_key);
    if (!used || (!syn && used->added == used->removed))
        return;
    inbound_key_of(&key, slot, &packet->source, &packet->destination, packet->source_port, packet->destination_port);
    struct inbound *inbound = bpf_map_lookup_elem(MAP(FD_INBOUND), &key);
    __u64 now = bpf_jiffies64();
    if (inbound) {
        inbound->state = syn ? NF_INBOUND_SYN : NF_INBOUND_CLOSING;
        if (syn)
            inbound->last_use = now;
        return;
    }
    if (!syn)
        return;
    struct inbound fresh = {.last_use = now, .state = NF_INBOUND_SYN};
    if (used->added - used->removed < NF_INBOUND_PER_SLOT &&
        bpf_map_update_elem(MAP(FD_INBOUND), &key, &fresh, BPF_NOEXIST) == 0)
        __sync_fetch_and_add(&used->added, 1);
    else
        __sync_fetch_and_add(&used->missed, 1);
}

static __always_inline const struct config *config_of(__u64 slot)
{
    __u32 key = slot;
    return bpf_map_lookup_elem(MAP(FD_CONFIG), &key);
}

/* Where the packet lies. `hook` is a constant, so that each entry point keeps the branch of its own context only. */
static __always_inline struct cursor cursor_of(void *context, int hook)
{
    struct cursor cursor = {};
    if (hook == HOOK_XDP) {
        struct xdp_md *xdp = context;
        cursor.data = (void *)(long)xdp->data;
        cursor.end = (void *)(long)xdp->data_end;
        cursor.length = cursor.end - cursor.data; /* of a frame longer than a page the first part (decision 0013) */
    } else {
        struct __sk_buff *skb = context;
        cursor.data = (void *)(long)skb->data;
        cursor.end = (void *)(long)skb->data_end;
        cursor.length = skb->len;
    }
    return cursor;
}

/* Parse what is linear: REASON_TRUNCATED where headers, or all there is, end before the packet does. */
static __always_inline int parse_linear(void *context, int hook, const struct config *config, struct packet *packet)
{
    struct __sk_buff *skb = context; /* but under XDP, where there is always an Ethernet header and nothing beside it */
    struct cursor cursor = cursor_of(context, hook);
    int l3 = hook == HOOK_CGROUP || (hook == HOOK_TC && (config->flags & NF_FLAG_L3));
    int tags = hook == HOOK_TC && skb->vlan_present ? 1 : 0;
    return parse_frame(&cursor, l3, hook == HOOK_XDP ? 0 : skb->protocol, tags, packet);
}

/* Parse a packet; under TC, headers outside the linear data are pulled in first.
 *
 * Which those are is told by a look that costs the verifier little. Parsing again after the pull would double its work,
 * and a loop around both may be refused before 6.2 ("back-edge", by how clang orders the blocks).
 */
static __always_inline int parse(void *context, int hook, const struct config *config, struct packet *packet)
{
    struct __sk_buff *skb = context; /* but under XDP */
    /* Before anything fails: what cannot be read is told of too. */
    __builtin_memset(&packet->source_port, 0, sizeof(*packet) - __builtin_offsetof(struct packet, source_port));
    if (hook == HOOK_TC) {
        struct cursor cursor = cursor_of(context, hook);
        __u64 linear = cursor.end - cursor.data;
        if (linear < cursor.length && linear < NF_PULL_BYTES &&
            linear < headers_end(&cursor, config->flags & NF_FLAG_L3, skb->protocol) &&
            bpf_skb_pull_data(skb, cursor.length < NF_PULL_BYTES ? cursor.length : NF_PULL_BYTES) < 0)
            return REASON_UNREADABLE;
    }
    int reason = parse_linear(context, hook, config, packet);
    if (hook == HOOK_CGROUP && reason == REASON_TRUNCATED &&
        (void *)(long)skb->data_end - (void *)(long)skb->data < skb->len)
        return REASON_UNREADABLE; /* no helper there makes it readable */
    return reason;
}

/* A raw socket can send a query with any source address, and the answer would go there, past the fence. */
static __always_inline int is_raw_socket(struct __sk_buff *skb)
{
    struct bpf_sock *sock = skb->sk;
    if (!sock)
        return 1;
    sock = bpf_sk_fullsock(sock);
    return !sock || sock->type == SOCKET_RAW;
}

/* Count what was decided; true: it passes.
 *
 * Under XDP only what is dropped: what it lets pass nf_tc judges again, and counts. Nothing that comes with a packet can
 * tell nf_tc that XDP has seen it, and seen *this*: whoever administers a namespace behind a veth can lead a packet around
 * XDP, and read and copy all that the kernel keeps of it (docs/decisions/0012).
 */
static __always_inline int settle(void *context, int hook, __u64 slot, const struct config *config,
                                  const struct packet *packet, int reason, int would)
{
    struct __sk_buff *skb = context; /* but under XDP, where a frame is one packet */
    __u64 packets = hook != HOOK_XDP && skb->gso_segs ? skb->gso_segs : 1;
    __u64 bytes = cursor_of(context, hook).length;
    int pass = reason < FIRST_DROP || would;
    if (hook == HOOK_XDP && pass)
        return 1;
    struct counters *counters = count(slot, reason, would, packets, bytes);
    if (reason < FIRST_DROP)
        return 1;
    if (would && reason < REASON_CONNECT) /* of what could not be parsed no destination is known */
        remember(packet, slot, packets, bytes);
    if (counters && (config->flags & NF_FLAG_WATCH))
        report(packet, slot, counters, reason, would, bytes);
    return pass;
}

/* Judge one packet; true: it passes. */
static __always_inline int verdict(void *context, int hook, __u64 slot)
{
    struct __sk_buff *skb = context; /* but under XDP */
    struct packet packet;
    const struct config *config = config_of(slot);
    if (!config)
        return 0;
    /* Every packet in every mode: a SYN may come in fragments, and an entry made in one mode would serve in the next. */
    if (hook == HOOK_TC && (config->flags & (NF_FLAG_REPLIES | NF_FLAG_HOST)) == NF_FLAG_REPLIES)
        skb->tc_index = FENCED_MARK;
    __u64 active = *(volatile __u64 *)&config->active;
    if (mode_of(active) == MODE_DISABLED)
        return settle(context, hook, slot, config, &packet, REASON_DISABLED, 0);
    int reason = parse(context, hook, config, &packet);
    if (reason == PARSED) {
        if (hook == HOOK_CGROUP && is_own_dns(&packet, config))
            packet.raw = is_raw_socket(skb);
        forget_packet(&packet, cursor_of(context, hook).length);
        reason = decide(&packet, slot, config, active);
        if (reason == REASON_DEFAULT_DROP && is_reply(&packet, slot, config))
            reason = REASON_REPLY;
    } else {
        __builtin_memset(&packet, 0, __builtin_offsetof(struct packet, source_port)); /* else perhaps not written */
    }
    FORGET(reason);
    /* Forwarded packets have no socket and cgroup id 0: never the daemon's. */
    if (reason >= FIRST_DROP && hook == HOOK_TC && (config->flags & NF_FLAG_HOST) && config->daemon_cgroup &&
        bpf_skb_cgroup_id(skb) == config->daemon_cgroup)
        reason = REASON_DAEMON;
    FORGET(reason);
    int would = reason >= FIRST_DROP && (active & NF_ACTIVE_AUDIT) && !(active & NF_ACTIVE_START);
    return settle(context, hook, slot, config, &packet, reason, would);
}

int nf_tc(struct __sk_buff *skb)
{
    return verdict(skb, HOOK_TC, slot_of_interface(skb->ifindex)) ? TC_PASS : TC_DROP;
}

/* In front of nf_tc on the same interface: the same verdict, before the kernel makes a packet of the frame; drops only. */
int nf_xdp(struct xdp_md *xdp)
{
    return verdict(xdp, HOOK_XDP, slot_of_interface(xdp->ingress_ifindex)) ? XDP_PASS : XDP_DROP;
}

int nf_cgroup_egress(struct __sk_buff *skb)
{
    return verdict(skb, HOOK_CGROUP, slot_of_cgroup()) ? CGROUP_PASS : CGROUP_DROP;
}

static __always_inline int is_fenced_interface(__u32 ifindex)
{
    __u64 slot = slot_of_interface(ifindex);
    const struct config *config = config_of(slot);
    return slot && (!config || !(config->flags & NF_FLAG_HOST));
}

/* The opposite hook of an interface: what goes to the workload. */
int nf_tc_inbound(struct __sk_buff *skb)
{
    struct packet packet;
    __u64 slot = slot_of_interface(skb->ifindex);
    const struct config *config = config_of(slot);
    if (!config || !slot || !(config->flags & NF_FLAG_REPLIES))
        return TC_PASS;
    if (parse(skb, HOOK_TC, config, &packet) != PARSED)
        return TC_PASS;
    int local = skb->ingress_ifindex == 0; /* never came in from a device: this host itself sends it */
    int trusted = local || ((config->flags & NF_FLAG_REPLIES_ANY) && !is_fenced_interface(skb->ingress_ifindex));
    if (skb->tc_index == FENCED_MARK)
        trusted = 0;
    note_inbound(&packet, slot, trusted);
    return TC_PASS;
}

int nf_cgroup_inbound(struct __sk_buff *skb)
{
    struct packet packet;
    __u64 slot = slot_of_cgroup();
    const struct config *config = config_of(slot);
    if (!config || !slot || !(config->flags & NF_FLAG_REPLIES))
        return CGROUP_PASS;
    if (parse(skb, HOOK_CGROUP, config, &packet) != PARSED || packet.protocol != PROTO_TCP)
        return CGROUP_PASS;
    /* Loopback passes by itself; a raw socket of the workload could send any source through it. */
    int trusted =
        skb->ingress_ifindex != IFINDEX_LO && skb->tc_index != FENCED_MARK &&
        ((config->flags & NF_FLAG_REPLIES_ANY) || bpf_map_lookup_elem(MAP(FD_HOST_ADDRESSES), &packet.source));
    note_inbound(&packet, slot, trusted);
    return CGROUP_PASS;
}

/* connect() and sendmsg(): an error at once where the packet filter would drop in silence (semantics.md 8). */
static __always_inline int connect_verdict(struct bpf_sock_addr *context, int family6)
{
    struct packet packet = {.ipv6 = family6, .protocol = context->protocol, .tcp_flags = TCP_SYN};
    struct address *to = &packet.destination;
    __u64 slot = slot_of_cgroup();
    const struct config *config = config_of(slot);
    if (!config)
        return CGROUP_DROP;
    __u64 active = *(volatile __u64 *)&config->active;
    if (mode_of(active) == MODE_DISABLED)
        return CGROUP_PASS;
    packet.destination_port = context->user_port;
    if (family6) {
        to->word[0] = context->user_ip6[0];
        to->word[1] = context->user_ip6[1];
        to->word[2] = context->user_ip6[2];
        to->word[3] = context->user_ip6[3];
        if (!(to->word[0] | to->word[1] | to->word[2] | to->word[3]))
            to->word[3] = bpf_htonl(1); /* the kernel connects :: to ::1 */
    } else {
        __u32 ipv4 = context->user_ip4;
        mapped_address(to, ipv4 ? ipv4 : bpf_htonl(0x7f000001)); /* … and 0.0.0.0 to 127.0.0.1 */
    }
    if (decide(&packet, slot, config, active) < FIRST_DROP)
        return CGROUP_PASS;
    int would = (active & NF_ACTIVE_AUDIT) && !(active & NF_ACTIVE_START);
    struct counters *counters = count(slot, REASON_CONNECT, would, 1, 0);
    if (counters && !would && (config->flags & NF_FLAG_WATCH)) /* what audit lets through is told of with its packets */
        report(&packet, slot, counters, REASON_CONNECT, 0, 0);
    return would ? CGROUP_PASS : CGROUP_DROP;
}

int nf_connect4(struct bpf_sock_addr *context)
{
    return connect_verdict(context, 0);
}

int nf_connect6(struct bpf_sock_addr *context)
{
    return connect_verdict(context, 1);
}

int nf_sendmsg4(struct bpf_sock_addr *context)
{
    return connect_verdict(context, 0);
}

int nf_sendmsg6(struct bpf_sock_addr *context)
{
    return connect_verdict(context, 1);
}

/* Now, in jiffies, for user space: written to clock[0] by BPF_PROG_TEST_RUN. */
int nf_clock(struct __sk_buff *skb)
{
    __u32 key = 0;
    __u64 *clock = bpf_map_lookup_elem(MAP(FD_CLOCK), &key);
    if (clock)
        *clock = bpf_jiffies64();
    return 0;
}
