"""TLS, mutual TLS and token towards a control plane on another host, and files that rotate under a running daemon."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import control_commands as commands
from control_pki import Authority, Pair, put
from control_stage import BOTH, NET4, NONE, ONLY4, Stage, daemon_of, refused_attach
from harness.controlplane import ControlPlaneProcess, ServerTls
from harness.fresh import Fresh
from harness.topology import Topology, Workload
from netfence.api.client import RefusedError

pytestmark = [pytest.mark.userspace, pytest.mark.timeout(150)]  # a reconnect may take 30 s

SERVER = "203.0.113.80"
ADDRESS = f"{SERVER}:50051"


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> tuple[Authority, Authority]:
    """Give two authorities that know nothing of each other."""
    directory = tmp_path_factory.mktemp("pki")
    return Authority(directory, "one"), Authority(directory, "two")


@dataclass
class Files:
    """What the daemon's configuration names."""

    directory: Path

    def config(self, **more: Any) -> dict[str, Any]:
        paths = {name: str(self.directory / f"{name}.pem") for name in ("ca", "cert", "key")}
        return {"tls": {**paths, **more}, "token_file": str(self.directory / "token")}

    def rotate(self, authority: Authority, client: Pair, token: str) -> None:
        """Replace all of them, one after the other."""
        for name, source in (("ca", authority.ca), ("cert", client.cert), ("key", client.key)):
            put(self.directory / f"{name}.pem", source.read_bytes())
        put(self.directory / "token", f"{token}\n".encode())


@contextmanager
def secured(topology: Topology, directory: Path, server: ServerTls, **control_plane: Any) -> Iterator[Stage]:
    with (
        ControlPlaneProcess(topology.internet, ADDRESS, tls=server) as plane,
        daemon_of(plane, topology, directory, **control_plane) as daemon,
    ):
        yield Stage(topology, plane, daemon)


def mutual(authority: Authority, clients: Authority) -> ServerTls:
    server = authority.issue("server", f"IP:{SERVER}")
    return ServerTls(server.key, server.cert, clients.ca)


def test_mutual_tls_with_a_token_and_rotation(fresh: Fresh, tmp_path: Path, pki: tuple[Authority, Authority]) -> None:
    """Both sides get a new authority while the daemon runs: it comes back with its new certificate and token."""
    topology = fresh.topology()
    workload = topology.add_veth()
    one, two = pki
    files = Files(tmp_path)
    files.rotate(one, one.issue("daemon-1", "DNS:daemon"), "secret-1")
    with secured(topology, tmp_path / "daemon", mutual(one, one), **files.config()) as stage:
        stage.connected()
        attached = stage.attach(workload, commands.ack(allow=[NET4]))
        assert stage.reach(workload) == ONLY4
        (opened,) = stage.plane.streams
        assert (opened.identity, opened.metadata["authorization"]) == (["daemon-1"], "Bearer secret-1")

        stage.plane.on_query({}, commands.decision(ips=["203.0.113.99"]))
        stage.good(commands.bulk(attached.id, "allowlist", [NET4], dns=commands.dns("proxy")))
        with fresh.agent(netns=workload.netns) as agent:
            agent.query(attached.dns, "any.test")
        assert stage.plane.wait_queries(1)[0].metadata["authorization"] == "Bearer secret-1"

        pid = stage.daemon.pid
        files.rotate(one, one.issue("daemon-2", "DNS:daemon"), "secret-2")
        opened = stage.plane.wait_streams(2)
        assert (opened.identity, opened.metadata["authorization"]) == (["daemon-2"], "Bearer secret-2")
        assert [told.id for told in stage.plane.wait_event("sync", stream=1).attachments] == [attached.id]

        stage.plane.kill()
        stage.plane.tls = mutual(two, two)
        files.rotate(two, two.issue("daemon-3", "DNS:daemon"), "secret-3")
        stage.plane.start()
        stage.hurry(topology.add_veth())
        assert stage.plane.streams[-1].identity == ["daemon-3"]
        assert stage.plane.streams[-1].metadata["authorization"] == "Bearer secret-3"
        stage.good(commands.set_mode(attached.id, "disabled"))
        assert stage.reach(workload) == BOTH
        assert stage.daemon.pid == pid


def test_only_the_authority_is_given(fresh: Fresh, tmp_path: Path, pki: tuple[Authority, Authority]) -> None:
    topology = fresh.topology()
    workload = topology.add_veth()
    one, _ = pki
    server = one.issue("named", "DNS:cp.test")
    config = {"tls": {"ca": str(one.ca), "server_name": "cp.test"}}
    with secured(topology, tmp_path, ServerTls(server.key, server.cert), **config) as stage:
        stage.attach(workload, commands.ack(allow=[NET4]))
        assert stage.reach(workload) == ONLY4
        assert stage.plane.streams[0].identity == []
        assert "authorization" not in stage.plane.streams[0].metadata


CASES = ["wrong-authority", "wrong-name", "no-client-certificate", "plaintext-server"]


@pytest.mark.parametrize("case", CASES)
def test_without_trust_there_is_no_connection(
    fresh: Fresh, tmp_path: Path, pki: tuple[Authority, Authority], case: str
) -> None:
    topology = fresh.topology()
    workload = topology.add_veth()
    one, two = pki
    tls: ServerTls | None = mutual(one, one)
    config: dict[str, Any] = {"tls": {"ca": str(one.ca)}}
    if case == "wrong-authority":
        tls = mutual(two, two)
    elif case == "wrong-name":
        server = one.issue("other", "IP:203.0.113.81")
        tls = ServerTls(server.key, server.cert)
    elif case == "plaintext-server":
        tls = None
    with (
        ControlPlaneProcess(topology.internet, ADDRESS, tls=tls) as plane,
        daemon_of(plane, topology, tmp_path / "daemon", subscribe_ack_timeout=1, **config) as daemon,
    ):
        stage = Stage(topology, plane, daemon)
        plane.on_subscribed(commands.ack(mode="disabled"))
        assert daemon.wait_event("control_plane_not_reached")["address"] == ADDRESS
        code, said = refused_attach(daemon, workload.host_if)
        assert code == "UNAVAILABLE"
        assert ADDRESS in said
        assert plane.events() == []
        assert stage.reach(workload) == BOTH


def test_plaintext_to_another_host_is_refused(fresh: Fresh, tmp_path: Path) -> None:
    topology = fresh.topology()
    workload = topology.add_veth()
    with ControlPlaneProcess(topology.internet, ADDRESS) as plane:
        with (
            pytest.raises(RuntimeError, match=r"plaintext to another host is not allowed"),
            daemon_of(plane, topology, tmp_path / "refused"),
        ):
            pass
        with daemon_of(plane, topology, tmp_path / "insecure", insecure=True) as daemon:
            stage = Stage(topology, plane, daemon)
            stage.attach(workload, commands.ack())
            assert stage.reach(workload) == NONE


@pytest.mark.timeout(120)
def test_a_rotation_fails_no_attach(fresh: Fresh, tmp_path: Path) -> None:
    """Attaches that wait for their ack while the daemon connects anew of its own accord are not its victims."""
    topology = fresh.topology()
    workloads = [topology.add_veth() for _ in range(4)]
    authority = Authority(tmp_path / "pki", "one")
    files = Files(tmp_path)
    files.rotate(authority, authority.issue("daemon-1", "DNS:daemon"), "secret-1")
    with secured(topology, tmp_path / "daemon", mutual(authority, authority), **files.config()) as stage:
        stage.connected()
        stage.plane.on_subscribed(commands.ack(), delay_s=0.15)
        over = threading.Event()
        failed: list[str] = []

        def attach(workload: Workload) -> None:
            while not over.is_set():
                try:
                    stage.daemon.detach(stage.attach(workload).id)
                except RefusedError as error:
                    failed.append(str(error))

        with ThreadPoolExecutor(len(workloads)) as pool:
            for workload in workloads:
                pool.submit(attach, workload)
            for number in (2, 3):
                streams = len(stage.plane.streams)
                files.rotate(authority, authority.issue(f"daemon-{number}", "DNS:daemon"), f"secret-{number}")
                stage.plane.wait_streams(streams + 1)
                stage.connected()
            over.set()
        assert failed == []
