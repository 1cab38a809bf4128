"""One module per way of standing in a packet's path: tcx, clsact, cgroup.

Each has `attach`, `detach`, `attached` and `in_front`; all block (the kernel waits for RCU) and are meant for a worker
thread; all raise `netfence.errors` with a full message.
"""
