"""Real namespaces, interfaces, cgroups, packets, name servers and daemons for tests/kernel, tests/perf and ci/demo.py.

Nothing here touches the machine's own network: every interface lives in an anonymous network namespace and every mount
in this process's own mount namespace (`sandbox`), so that whatever way a test process ends, the kernel takes them away.
Only cgroup directories need sweeping, which the next run does (`cgroup.sweep`).

| module | gives |
|---|---|
| `deadline` | `wait_for`: a condition instead of a sleep |
| `sandbox`, `netns`, `cgroup`, `spawn` | the places where things run |
| `agent` | a process inside a namespace and cgroup whose sockets a test drives |
| `packets`, `wire` | named packets; sending them and counting exactly how many arrived |
| `tuntap` | tap and tun devices with the test as the VM behind them |
| `topology` | workload, host and internet |
| `unbound`, `services` | what the internet offers |
| `daemon` | a real `netfenced` with its own files, cgroup and bpffs |
"""
