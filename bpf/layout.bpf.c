/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Compiled only by the compile child, to write down the layouts that bcc's table classes know; never loaded. */
#include <linux/types.h>

#include "layout.h"

BPF_TABLE("hash", struct rule_key4, struct rule, layout_rules4, 1);
BPF_TABLE("hash", struct rule_key6, struct address, layout_rules6, 1);
BPF_TABLE("hash", struct lease_key, struct lease, layout_leases, 1);
BPF_TABLE("hash", struct inbound_key, struct inbound, layout_inbound, 1);
BPF_TABLE("hash", struct endpoint, struct inbound_count, layout_endpoint, 1);
BPF_TABLE("hash", u32, struct config, layout_config, 1);
BPF_TABLE("hash", struct reported, struct counters, layout_counters, 1);
BPF_TABLE("hash", struct seen_key, struct seen, layout_seen, 1);
BPF_TABLE("hash", struct seen_count, struct flow, layout_flow, 1);
