"""Workloads, a host that forwards, and an internet that owns every address.

    workload ── veth, tap or tun ── host (netfenced, forwarding) ── veth ── internet (name server, web servers, sinks)
    workload ── veth ── bridge in host ── veth ── internet                    (frames of any shape arrive unchanged)

The internet namespace answers on *every* address (a local default route), so that "it does not answer" always means
that something in between dropped it. Neighbours are static: no packet waits for address resolution, order is kept.
Addresses are those reserved for documentation.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass

from harness.netns import NetNs, veth
from harness.packets import Shape
from harness.tuntap import TunTap
from harness.wire import Meter, PacketSender, Sender, Sniffer, Tag, arp_sentinel, on_harness_cpu

# The way out of the host.
UP_IF, INTERNET_IF = "up0", "eth0"
UP4, INTERNET4 = "203.0.113.1", "203.0.113.2"
UP6, INTERNET6 = "2001:db8:ffff::1", "2001:db8:ffff::2"
# Where netfenced's DNS servers listen: an address of the host that every workload reaches.
DNS4, DNS6 = "198.51.100.254", "2001:db8:fe::53"
# Services of the internet (also any other address; these can be bound to).
NAMESERVER4, NAMESERVER6 = "192.0.2.53", "2001:db8:a::53"
METADATA4, METADATA6 = "169.254.169.254", "fd00:ec2::254"
SERVICE_ADDRESSES = (
    NAMESERVER4, NAMESERVER6, METADATA4, METADATA6,
    "203.0.113.80", "203.0.113.81", "203.0.113.82", "2001:db8:b::80", "2001:db8:b::81", "2001:db8:b::82",
)  # fmt: skip
# The bridge, its ports and who is behind them.
BRIDGE_IF, BRIDGE_UP_IF, SINK_IF = "br0", "brup0", "sink0"
BRIDGE_MAC = "02:00:00:00:fe:01"
BRIDGE4, BRIDGE6 = "198.51.100.193", "2001:db8:c::1"
WORKLOADS4, WORKLOADS6 = "198.51.100", "2001:db8:1"
MAX_WORKLOADS = 44  # /30 networks in 198.51.100.0–.175; the bridge's network begins at .192


@dataclass
class Workload:
    """Something to be fenced: `host_if` is the target to attach; `netns` is where it runs (None behind tap and tun)."""

    host_if: str
    address4: str
    address6: str
    sender: Sender
    host_mac: bytes  # where its frames go
    netns: NetNs | None = None
    device: TunTap | None = None
    bridged: bool = False

    @property
    def inside(self) -> NetNs:
        """The namespace where it runs; a tap or tun has none."""
        assert self.netns is not None, f"{self.host_if} has no namespace: the test is the VM"
        return self.netns

    def bytes_of(self, shape: Shape, destination: str, tag: Tag) -> bytes:
        """Build the packet of this shape as this workload sends it."""
        source = self.address4 if shape.family == 4 else self.address6
        if self.device is not None and not self.device.tap:
            return shape.packet(source, destination, tag)
        return shape.frame(source, destination, tag, self.host_mac)


class Topology:
    """The namespaces and what is in them. Close it at the end."""

    def __init__(self, *, forward: bool = True) -> None:
        self._close = contextlib.ExitStack()
        self.workloads: list[Workload] = []
        self.host = self._namespace("host")
        self.internet = self._namespace("internet")
        if forward:
            self.host.sysctl("net/ipv4/ip_forward", "1")
            self.host.sysctl("net/ipv6/conf/all/forwarding", "1")
        self._make_uplink()
        self.host.ip(f"addr add {DNS4}/32 dev lo", f"addr add {DNS6}/128 dev lo")
        self._own_every_address()
        self._sentinels = self._sender(self.host, UP_IF)
        self._sniffer = self._listen(self.internet, INTERNET_IF)
        self._sink: Sniffer | None = None
        self._queued: set[str] = set()

    def _namespace(self, name: str) -> NetNs:
        namespace = NetNs(name)
        self._close.callback(namespace.close)
        return namespace

    def _sender(self, netns: NetNs, ifname: str) -> PacketSender:
        sender = PacketSender(netns, ifname)
        self._close.callback(sender.close)
        return sender

    def _listen(self, netns: NetNs, ifname: str) -> Sniffer:
        sniffer = Sniffer(netns, ifname)
        self._close.callback(sniffer.close)
        return sniffer

    def _make_uplink(self) -> None:
        veth((self.host, UP_IF), (self.internet, INTERNET_IF))
        self.host.ip(f"addr add {UP4}/30 dev {UP_IF}", f"addr add {UP6}/64 dev {UP_IF}", f"link set dev {UP_IF} up")
        self.internet.ip(
            f"addr add {INTERNET4}/30 dev {INTERNET_IF}",
            f"addr add {INTERNET6}/64 dev {INTERNET_IF}",
            f"link set dev {INTERNET_IF} up",
        )
        _static_neighbours(self.host, UP_IF, self.internet.mac(INTERNET_IF), INTERNET4, INTERNET6)
        _static_neighbours(self.internet, INTERNET_IF, self.host.mac(UP_IF), UP4, UP6)
        self.host.ip(f"route add default via {INTERNET4}", f"-6 route add default via {INTERNET6}")

    def _own_every_address(self) -> None:
        # Routes to the workloads are looked up first (table 100), then "everything is local" (table local).
        self.internet.ip(
            *[f"addr add {address}/{128 if ':' in address else 32} dev lo" for address in SERVICE_ADDRESSES],
            "rule add pref 10 lookup 100",
            "rule add pref 20 lookup local",
            "rule del pref 0",
            "-6 rule add pref 10 lookup 100",
            "-6 rule add pref 20 lookup local",
            "-6 rule del pref 0",
            f"route add {UP4}/32 dev {INTERNET_IF} table 100",
            f"route add {WORKLOADS4}.0/24 via {UP4} dev {INTERNET_IF} table 100",
            f"-6 route add {UP6}/128 dev {INTERNET_IF} table 100",
            f"-6 route add fe80::/64 dev {INTERNET_IF} table 100",
            f"-6 route add {WORKLOADS6}::/48 via {UP6} dev {INTERNET_IF} table 100",
            f"-6 route add {DNS6}/128 via {UP6} dev {INTERNET_IF} table 100",
            f"-6 route add {BRIDGE6[:-1]}/64 via {UP6} dev {INTERNET_IF} table 100",
            "route add local default dev lo table local",
            "-6 route add local default dev lo table local",
        )

    def add_veth(self, name: str = "veth") -> Workload:
        """Add a workload in a namespace of its own, routed through the host."""
        number, host_if = self._next(name)
        netns = self._namespace(f"workload-{host_if}")
        veth((self.host, host_if), (netns, "eth0"))
        gateway4, address4, gateway6, address6 = _addresses(number)
        self.host.ip(f"addr add {gateway4}/30 dev {host_if}", f"addr add {gateway6}/64 dev {host_if}",
                     f"link set dev {host_if} up")  # fmt: skip
        netns.ip(f"addr add {address4}/30 dev eth0", f"addr add {address6}/64 dev eth0", "link set eth0 up",
                 f"route add default via {gateway4}", f"-6 route add default via {gateway6}")  # fmt: skip
        _static_neighbours(self.host, host_if, netns.mac("eth0"), address4, address6)
        _static_neighbours(netns, "eth0", self.host.mac(host_if), gateway4, gateway6)
        return self._add(
            Workload(host_if, address4, address6, self._sender(netns, "eth0"), _mac(self.host, host_if), netns=netns)
        )

    def add_bridged(self, name: str = "port") -> Workload:
        """Add a workload behind a bridge: its frames come out at the other port as they went in, whatever they are."""
        if self._sink is None:
            self._make_bridge()
        number, host_if = self._next(name)
        netns = self._namespace(f"workload-{host_if}")
        veth((self.host, host_if), (netns, "eth0"))
        address4, address6 = f"{WORKLOADS4}.{194 + number}", f"2001:db8:c::{2 + number:x}"
        self.host.ip(f"link set dev {host_if} master {BRIDGE_IF}", f"link set dev {host_if} up")
        netns.ip(f"addr add {address4}/26 dev eth0", f"addr add {address6}/64 dev eth0", "link set eth0 up",
                 f"route add default via {BRIDGE4}", f"-6 route add default via {BRIDGE6}")  # fmt: skip
        _static_neighbours(netns, "eth0", self.host.mac(BRIDGE_IF), BRIDGE4, BRIDGE6)
        _static_neighbours(self.host, BRIDGE_IF, netns.mac("eth0"), address4, address6)
        sink_mac = _mac(self.internet, SINK_IF)
        return self._add(
            Workload(host_if, address4, address6, self._sender(netns, "eth0"), sink_mac, netns=netns, bridged=True)
        )

    def _make_bridge(self) -> None:
        # An address of its own: else it takes the lowest of its ports', and changes it when a port joins.
        self.host.ip(f"link add {BRIDGE_IF} address {BRIDGE_MAC} type bridge mcast_snooping 0 forward_delay 0")
        for family in ("ip", "ip6"):  # where br_netfilter is loaded it would drop what is not valid IP before the sink
            with contextlib.suppress(FileNotFoundError):
                self.host.sysctl(f"net/bridge/bridge-nf-call-{family}tables", "0")
        veth((self.host, BRIDGE_UP_IF), (self.internet, SINK_IF))
        self.host.ip(f"link set dev {BRIDGE_UP_IF} master {BRIDGE_IF}", f"link set dev {BRIDGE_UP_IF} up",
                     f"addr add {BRIDGE4}/26 dev {BRIDGE_IF}", f"addr add {BRIDGE6}/64 dev {BRIDGE_IF}",
                     f"link set dev {BRIDGE_IF} up")  # fmt: skip
        self.internet.ip(f"link set dev {SINK_IF} up promisc on")
        self._sink = self._listen(self.internet, SINK_IF)

    def add_tap(self, name: str = "tap") -> Workload:
        """Add a workload behind a tap device; the test is the VM (`workload.device`)."""
        return self._add_device(name, tap=True)

    def add_tun(self, name: str = "tun") -> Workload:
        """Add a workload behind a tun device: no Ethernet header; the test is the VM (`workload.device`)."""
        return self._add_device(name, tap=False)

    def _add_device(self, name: str, *, tap: bool) -> Workload:
        number, host_if = self._next(name)
        device = TunTap(self.host, host_if, tap=tap)
        self._close.callback(device.close)
        gateway4, address4, gateway6, address6 = _addresses(number)
        self.host.ip(f"addr add {gateway4}/30 dev {host_if}", f"addr add {gateway6}/64 dev {host_if}")
        if tap:
            _static_neighbours(self.host, host_if, "02:00:00:00:00:01", address4, address6)
        host_mac = _mac(self.host, host_if) if tap else b""
        return self._add(Workload(host_if, address4, address6, device, host_mac, device=device))

    def host_workload(self) -> Workload:
        """Give the host itself as a workload, for filters on its own way out (direction host)."""
        sender = self._sender(self.host, UP_IF)
        return Workload(UP_IF, UP4, UP6, sender, _mac(self.internet, INTERNET_IF), netns=self.host)

    def _next(self, name: str) -> tuple[int, str]:
        number = len(self.workloads)
        assert number < MAX_WORKLOADS, "no more addresses: see MAX_WORKLOADS"
        return number, f"{name}{number}"

    def _add(self, workload: Workload) -> Workload:
        self.workloads.append(workload)
        return workload

    def ignore(self, *lengths: int) -> None:
        """Do not look at frames of these lengths (bytes) at the internet's end."""
        self._sniffer.ignore(*lengths)

    def meter(self, workload: Workload | None = None) -> Meter:
        """Give what counts arrivals at the internet's end; for a bridged workload, at the sink."""
        if workload is not None and workload.bridged:
            assert self._sink is not None
            return Meter(self._sink, workload.sender)
        if workload is not None and workload.host_if in self._queued and workload.netns is not None:
            return Meter(self._sniffer, self._sentinels, functools.partial(self._pass_queue, workload))
        return Meter(self._sniffer, self._sentinels)

    def queues(self, host_if: str) -> None:
        """Note that an interface has XDP: what comes in by a veth then waits in a queue of its own."""
        self._queued.add(host_if)

    def _pass_queue(self, workload: Workload) -> None:
        tag = Tag()
        with contextlib.closing(Sniffer(self.host, workload.host_if)) as sniffer, on_harness_cpu():
            workload.sender.send(arp_sentinel(tag))
            sniffer.wait(tag)

    def arrived(self, workload: Workload, shape: Shape, destination: str, count: int = 3) -> int:
        """Send `count` packets of a shape from the workload and count those that arrive."""
        tag = Tag()
        packet = workload.bytes_of(shape, destination, tag)
        return self.meter(workload).transmit(workload.sender, tag, [packet] * count)

    def close(self) -> None:
        """Take everything away."""
        self._close.close()


def _addresses(number: int) -> tuple[str, str, str, str]:
    """Give gateway and workload address of both families for the n-th workload."""
    first = 4 * number
    network6 = f"{WORKLOADS6}:{number:x}"
    return f"{WORKLOADS4}.{first + 1}", f"{WORKLOADS4}.{first + 2}", f"{network6}::1", f"{network6}::2"


def _mac(netns: NetNs, ifname: str) -> bytes:
    return bytes.fromhex(netns.mac(ifname).replace(":", ""))


def _static_neighbours(netns: NetNs, ifname: str, mac: str, *addresses: str) -> None:
    netns.ip(*[f"neigh replace {address} lladdr {mac} dev {ifname} nud permanent" for address in addresses])
