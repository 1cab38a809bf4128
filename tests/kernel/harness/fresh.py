"""Topologies, daemons, name servers and agents for one test alone, each in one call."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from harness.agent import Agent
from harness.daemon import Netfenced
from harness.topology import NAMESERVER4, NAMESERVER6, Topology
from harness.unbound import Unbound


class Fresh:
    """Makes what a test wants for itself alone; all of it is closed when the test ends, newest first."""

    def __init__(self, stack: ExitStack, directory: Path) -> None:
        self._stack = stack
        self._directory = directory
        self._made = 0

    def topology(self) -> Topology:
        """Make namespaces."""
        made = Topology()
        self._stack.callback(made.close)
        return made

    def daemon(self, topology: Topology, **arguments: Any) -> Netfenced:
        """Start a daemon in the topology's host; arguments as for `Netfenced`."""
        return self._stack.enter_context(self.stopped_daemon(topology, **arguments))

    def stopped_daemon(self, topology: Topology, **arguments: Any) -> Netfenced:
        """Prepare a daemon that the test enters itself."""
        self._made += 1
        return Netfenced(topology.host, self._directory / f"netfenced{self._made}", **arguments)

    def names(self, topology: Topology, *records: str) -> Unbound:
        """Start a name server in the topology's internet."""
        self._made += 1
        server = Unbound(
            topology.internet, self._directory / f"unbound{self._made}", [NAMESERVER4, NAMESERVER6], records
        )
        return self._stack.enter_context(server)

    def agent(self, **where: Any) -> Agent:
        """Start an agent; arguments as for `Agent`."""
        return self._stack.enter_context(Agent(**where))
