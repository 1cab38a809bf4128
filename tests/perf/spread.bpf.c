/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* The fence compiled for a benchmark (spread_build.py): BPF_PROG_TEST_RUN repeats one packet, and here each repetition
 * takes the next destination of a row, put in behind the parser, and the next attachment of another. All else is the
 * fence's own source, pasted below.
 *
 * An address is made from its number, so that the row itself costs no cache: number * an odd constant, which for IPv4
 * is a permutation of 10.0.0.0/8 and for IPv6 one of the /64s of 2001:db8::/32. verdict_bench.address makes the same.
 */
#include <linux/types.h>

#include "reasons.h"
#include "layout.h"
#include "parse.h"

#define ROW_ADDRESSES 0
#define ROW_SLOTS 1
#define ROW_LENGTH 65536
#define STEP_ADDRESSES 40503 /* odd: visits the whole row; 2^16 / golden ratio: no prefetcher sees what comes */
#define STEP_SLOTS 28163     /* another one, or each attachment would see one address only */
#define NUMBER_FACTOR 0x9e3779b1

/* The next number is one of first … first + span - 1, all of them equally often. */
struct row {
    __u64 taken; /* how many so far: user space compares it with the runs it asked for */
    __u32 first;
    __u32 span;
    __u64 last; /* written so that the empty programs do the work too */
};

static __always_inline __u32 next_of(__u32 which, __u64 step)
{
    struct row *row = bpf_map_lookup_elem((void *)bpf_pseudo_fd(1, FD_ROWS), &which);
    if (!row)
        return bpf_get_prandom_u32(); /* never; a constant would have the verifier walk everything twice */
    __u64 place = row->taken++ * step & (ROW_LENGTH - 1);
    row->last = row->first + (place * row->span >> 16);
    return row->last;
}

static __always_inline __u32 next_address(void)
{
    return next_of(ROW_ADDRESSES, STEP_ADDRESSES) * NUMBER_FACTOR;
}

static __always_inline int parse_frame_spread(struct cursor *cursor, int l3, __u16 protocol, int tags,
                                              struct packet *packet)
{
    __u32 number = next_address();
    int reason = parse_frame(cursor, l3, protocol, tags, packet);
    if (reason != PARSED)
        return reason;
    /* One store at a place that is no choice: clang picks by "|", which the verifier does not allow on the stack. */
    packet->destination.word[1] = packet->ipv6 ? bpf_htonl(number) : packet->destination.word[1];
    packet->destination.word[3] =
        packet->ipv6 ? packet->destination.word[3] : bpf_htonl(0x0a000000 | (number & 0xffffff));
    return reason;
}
#define parse_frame parse_frame_spread
#define TEST_SLOT next_of(ROW_SLOTS, STEP_SLOTS) /* of the cgroup program */

#include "netfence.bpf.c"

int spread_tc(struct __sk_buff *skb)
{
    return verdict(skb, HOOK_TC, slot_of_interface(next_of(ROW_SLOTS, STEP_SLOTS))) ? TC_PASS : TC_DROP;
}

int spread_xdp(struct xdp_md *xdp)
{
    return verdict(xdp, HOOK_XDP, slot_of_interface(next_of(ROW_SLOTS, STEP_SLOTS))) ? XDP_PASS : XDP_DROP;
}

/* What the spreading costs, to be taken off; one for each program type. */
static __always_inline int spread_nothing(void)
{
    return next_of(ROW_SLOTS, STEP_SLOTS) + next_address() ? 1 : 0;
}

int spread_empty_tc(struct __sk_buff *skb)
{
    return spread_nothing();
}

int spread_empty_cgroup(struct __sk_buff *skb)
{
    return spread_nothing();
}

int spread_empty_xdp(struct xdp_md *xdp)
{
    return spread_nothing();
}
