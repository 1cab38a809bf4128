"""A real `netfenced` with its own files, cgroup and bpffs, in the topology's host namespace.

    with Netfenced(topology.host, tmp_path, policy={"default": {"mode": "denylist"}}) as daemon:
        attached = daemon.attach(interface="veth0")
        daemon.set_policy({"default": {"mode": "block_all"}})        # returns when it is in force
        assert daemon.info(attached.id).packets_blocked == 3

Leaving the block detaches everything, ends the daemon, and fails if anything of it is left (`leftovers`).
"""

from __future__ import annotations

import collections
import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from harness import sandbox, topology, warm
from harness.cgroup import Cgroup
from harness.deadline import DEFAULT_TIMEOUT_S, SLOWNESS, wait_for
from harness.netns import NetNs
from harness.spawn import spawn, stop
from netfence.api.client import DaemonClient, RefusedError, UnreachableError
from netfence.api.views import AttachSpec, DirectionWish, HookWish
from netfence.config import Dns
from netfence.control.policyfile import digest_of, load_policy_file
from netfence.control.port import AttachmentView
from netfence.dataplane.compile import map_specs
from netfence.dataplane.counters import CounterMap, Counters
from netfence.dataplane.layout import Layout
from netfence.dataplane.links import obj_get
from netfence.dataplane.maps import Map
from netfence.policy.modes import Reason
from netfence.store import DATABASE
from netfence.v1 import daemon_pb2

PROGRAM = Path(sys.executable).with_name("netfenced")
START_TIMEOUT_S = 60.0 * SLOWNESS
STOP_TIMEOUT_S = 20.0 * SLOWNESS
LOG_TAIL_LINES = 40
BLOCK_ALL: dict[str, Any] = {"default": {"mode": "block_all"}}

# Everything the topology's internet answers with, so that DNS may open it (it is all documentation space).
ALLOW_PRIVATE = ["192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24", "2001:db8::/32"]


@dataclass(frozen=True, slots=True)
class Attached:
    """What attach answers."""

    id: str
    dns: tuple[str, int]  # host and port of the attachment's own DNS server


class Netfenced:
    """The daemon process and its files. A context manager; `start` and `stop` may be called inside."""

    running: list[Netfenced] = []  # noqa: RUF012  # for the report of a failed test

    def __init__(
        self,
        netns: NetNs,
        directory: Path,
        *,
        policy: Mapping[str, Any] | None = BLOCK_ALL,
        config: Mapping[str, Any] | None = None,
        env: Mapping[str, str] | None = None,
        cold: bool = False,
    ) -> None:
        """Prepare files under `directory`; `config` is merged over ours, key by key; `policy` None: no policy file.

        `cold`: no programs are loaded yet, and the first start compiles, as on a machine after its boot.
        """
        self.netns = netns
        self.directory = directory
        self.socket = directory / "netfence.sock"
        self.bpffs = directory / "bpffs"
        self.pins = self.bpffs / warm.PINS
        self.policy_file = directory / "policy.yaml"
        self.log_file = directory / "netfenced.log"
        self.config_file = directory / "netfence.yaml"
        self._policy, self._config, self._env, self._cold = policy, config or {}, dict(env or {}), cold
        self._close = ExitStack()
        self._process: subprocess.Popen[bytes] | None = None
        self._cgroup: Cgroup | None = None
        self._dummies: set[str] = set()

    # -- life ------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        with ExitStack() as stack:  # undone at once if the daemon does not start
            self.directory.mkdir(parents=True, exist_ok=True)
            if self._cold:
                stack.enter_context(sandbox.bpffs(self.bpffs))
            else:
                max_leases = self._config.get("dns", {}).get("max_leases_total", Dns().max_leases_total)
                stack.enter_context(warm.bpffs(self.bpffs, self.directory / "data", max_leases))
            self._cgroup = Cgroup(f"netfenced-{id(self):x}")
            stack.callback(self._cgroup.remove)
            self._dummies = self._dummy_interfaces()
            if self._policy is not None:
                self.policy_file.write_text(yaml.safe_dump(dict(self._policy)))
            self.write_config(self._config)
            self.running.append(self)
            stack.callback(self.running.remove, self)
            stack.callback(self.kill)
            self.start()
            self._close = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._close:
            if kind is None and self.alive:  # a test that has failed already is not judged once more
                for info in self.attachments():
                    self.detach(info.id)
                status = self.stop()
                assert status == 0, f"netfenced ended with {status}:\n{self.log_tail()}"
                left = self.leftovers()
                assert not left, f"netfenced left behind: {left}\n{self.log_tail()}"

    def write_config(self, changes: Mapping[str, Any]) -> None:
        """Write the configuration file: the harness's own settings with `changes` merged over them."""
        base: dict[str, Any] = {
            "socket": str(self.socket),
            "data_dir": str(self.directory / "data"),
            "bpffs_dir": str(self.pins),
            "log_format": "json",
            "log_level": "debug",
            "dns": {
                "listen_addr": topology.DNS4,
                "upstreams": [topology.NAMESERVER4],
                "allow_private": ALLOW_PRIVATE,
                "timeout": 0.5,
            },
        }
        if self._policy is not None:
            base["policy_file"] = str(self.policy_file)
        self.config_file.write_text(yaml.safe_dump(_merged(base, changes)))

    def start(self) -> None:
        """Start the process and wait until it serves; RuntimeError with its log if it ends instead."""
        self.launch()
        wait_for(self._serves, f"netfenced to serve {self.socket}", START_TIMEOUT_S)

    def launch(self) -> None:
        """Start the process without waiting for it."""
        assert not self.alive
        env = {key: value for key, value in os.environ.items() if not key.startswith("NETFENCE_")} | self._env
        with self.log_file.open("ab") as log:
            self._process = spawn(
                [str(PROGRAM), "start", "--config", str(self.config_file)],
                netns=self.netns, cgroup=self._cgroup, env=env, stdout=log, stderr=log,
            )  # fmt: skip

    def _serves(self) -> bool:
        if not self.alive:
            message = f"netfenced ended with {self.wait()} instead of serving:\n{self.log_tail()}"
            raise RuntimeError(message)
        try:
            with DaemonClient(self.socket) as client:
                client.status()
        except (UnreachableError, RefusedError):
            return False
        return True

    @property
    def alive(self) -> bool:
        """Tell whether the process runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The daemon's process id."""
        assert self._process is not None
        return self._process.pid

    def descriptors(self) -> int:
        """Count the daemon's open files."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))  # noqa: PTH208 - descriptors, not files

    def memory_kb(self) -> int:
        """Tell the daemon's resident memory."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))

    def stop(self) -> int:
        """Ask it to end (SIGTERM); return its exit status."""
        assert self._process is not None
        return stop(self._process, STOP_TIMEOUT_S)

    def wait(self) -> int:
        """Wait for it to end by itself; return its exit status."""
        assert self._process is not None
        return self._process.wait(STOP_TIMEOUT_S)

    def kill(self) -> None:
        """End it without a chance to clean up, by its process id (kill -9)."""
        if self._process is not None and self.alive:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()

    def restart(self) -> None:
        """End it cleanly and start it again on the same files and pins."""
        self.stop()
        self.start()

    def hang_up(self) -> None:
        """Send SIGHUP: read policy and TLS files again."""
        assert self._process is not None
        self._process.send_signal(signal.SIGHUP)

    # -- the local API ---------------------------------------------------------------------------------------------

    def attach(
        self,
        *,
        interface: str | None = None,
        cgroup: Cgroup | Path | None = None,
        metadata: Mapping[str, str] | None = None,
        hook: HookWish = "auto",
        direction: DirectionWish = "auto",
    ) -> Attached:
        """Attach through the API. RefusedError with the daemon's words if it will not."""
        path = cgroup.path if isinstance(cgroup, Cgroup) else cgroup
        spec = AttachSpec(interface, None if path is None else str(path), metadata or {}, hook, direction)
        with DaemonClient(self.socket) as client:
            answer = client.attach(spec)
        return Attached(answer.id, host_port(answer.dns_address))

    def detach(self, attachment_id: str) -> None:
        """Detach through the API."""
        with DaemonClient(self.socket) as client:
            client.detach(attachment_id)

    def attachments(self) -> list[daemon_pb2.AttachmentInfo]:
        """List every attachment through the API."""
        with DaemonClient(self.socket) as client:
            return [*client.list_all()]

    def info(self, attachment_id: str) -> daemon_pb2.AttachmentInfo:
        """List one attachment."""
        return next(info for info in self.attachments() if info.id == attachment_id)

    def status(self) -> daemon_pb2.DaemonStatus:
        """Ask for the daemon's status through the API."""
        with DaemonClient(self.socket) as client:
            return client.status()

    # -- the kernel's own counters, with the daemon or without it ------------------------------------------------

    def counters(self, attachment_id: str) -> Counters:
        """Read the attachment's counters from the pinned map."""
        layout = Layout.load(next((self.directory / "data").glob("layout-*.json")))
        spec = next(spec for spec in map_specs(layout, 1) if spec.name == "counters")
        with closing(Map(obj_get(next(self.pins.glob("maps-*")) / spec.name), spec)) as pinned:
            return CounterMap(pinned, layout).read(self.slot(attachment_id))

    def reasons(self, attachment_id: str) -> collections.Counter[Reason]:
        """Count packets per reason since the attach; subtract an earlier count to see what moved."""
        packets = self.counters(attachment_id).packets
        return collections.Counter({reason: packets[reason] for reason in Reason if packets[reason]})

    def slot(self, attachment_id: str) -> int:
        """Look up the attachment's slot in the stored state."""
        with closing(sqlite3.connect(f"file:{self.directory / 'data' / DATABASE}?mode=ro", uri=True)) as database:
            found = database.execute("SELECT slot FROM attachments WHERE id = ?", (attachment_id,)).fetchone()
        return int(found[0])

    # -- the command line ------------------------------------------------------------------------------------------

    def cli(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run `netfenced --socket … <arguments>` as an operator would; with `check` it must succeed."""
        done = self.netns.run(str(PROGRAM), "--socket", str(self.socket), *arguments, check=False)
        said = f"netfenced {arguments}: {done.returncode}\n{done.stdout}{done.stderr}"
        assert not check or done.returncode == 0, said
        return done

    def cli_json(self, *arguments: str) -> Any:
        """Run a command with --json and parse what it prints."""
        return json.loads(self.cli(*arguments, "--json").stdout)

    # -- policy ----------------------------------------------------------------------------------------------------

    def set_policy(self, policy: Mapping[str, Any]) -> None:
        """Replace the policy file and wait until it is in force, also for what is not attached yet."""
        text = yaml.safe_dump(dict(policy))
        digest = digest_of(text.encode())
        self.write_policy(text)
        wait_for(lambda: self._policy_read() == digest, "the new policy file to be read")
        wait_for(self.policy_in_force, "the new policy file to be in force")

    def _policy_read(self) -> str:
        told = self.events("policy_file_loaded")
        return str(told[-1]["digest"]) if told else ""

    def write_policy(self, text: str) -> None:
        """Replace the policy file at once, as a careful operator does; do not wait."""
        new = self.policy_file.with_suffix(".new")
        new.write_text(text)
        new.rename(self.policy_file)

    def policy_in_force(self) -> bool:
        """Tell whether every attachment has the version of its rule in the policy file."""
        file = load_policy_file(self.policy_file)
        for info in self.attachments():
            kind = "cgroup" if info.target.startswith("/") else "interface"
            view = AttachmentView(info.id, info.target, kind, dict(info.metadata))
            if file.decide(view).version != info.policy_version:
                return False
        return True

    # -- what it says and leaves -----------------------------------------------------------------------------------

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        """Parse the log's JSON lines; with `name` only those of one event."""
        found = []
        for line in self.log_file.read_text().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # a traceback of the interpreter itself: log_tail shows it
            if name is None or entry.get("event") == name:
                found.append(entry)
        return found

    def wait_event(self, name: str, timeout_s: float = DEFAULT_TIMEOUT_S) -> dict[str, Any]:
        """Wait for an event in the log and return its first occurrence."""
        return wait_for(lambda: self.events(name), f"event {name} in {self.log_file}", timeout_s)[0]

    def log_tail(self) -> str:
        """Give the last lines of the log."""
        text = self.log_file.read_text() if self.log_file.exists() else ""
        return "\n".join(text.splitlines()[-LOG_TAIL_LINES:])

    def link_pins(self) -> list[str]:
        """Name what is pinned under links/: one or more per attachment in force, none without."""
        links = self.pins / "links"
        return sorted(entry.name for entry in links.iterdir()) if links.exists() else []

    def _dummy_interfaces(self) -> set[str]:
        """Name the interfaces of the only kind that netfenced makes (for a CIDR as dns.listen_addr)."""
        return {str(link["ifname"]) for link in self.netns.ip_json("link", "show", "type", "dummy")}

    def leftovers(self) -> dict[str, Any]:
        """Tell what is left of what a stopped daemon without attachments must not leave."""
        filters = {
            f"{ifname} {side}": shown
            for ifname in self.netns.interfaces()
            for side in ("ingress", "egress")
            if "bpf" in (shown := self.netns.run("tc", "filter", "show", "dev", ifname, side, check=False).stdout)
        }
        assert self._cgroup is not None
        found = {
            "link pins": self.link_pins(),
            "tc filters": filters,
            "interfaces": sorted(self._dummy_interfaces() - self._dummies),
            "processes": self._cgroup.pids(),
            "socket": self.socket.exists(),
        }
        return {what: value for what, value in found.items() if value}


def host_port(text: str) -> tuple[str, int]:
    """Split ``host:port`` or ``[v6]:port``."""
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = _merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged
