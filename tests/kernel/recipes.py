"""What the recipes of docs/recipes.md share: the DNS addresses of attachments, and how a workload fetches."""

from __future__ import annotations

from collections.abc import Callable

from demo import STRANGER, STRANGER6
from harness.topology import METADATA4, METADATA6, Topology
from netfence.endpoints import DUMMY
from shells import Said

DNS_NETWORK = "169.254.100.0/24"
DNS_OF_ITS_OWN = {"dns": {"listen_addr": DNS_NETWORK}}
ANSWER_S = 30  # for what must come: a thousand times what it takes
SILENCE_S = 2  # for what must not come
TRIES = 10

EPERM = "Operation not permitted"  # what `curl -v` says when connect() is refused, before there is any packet

# Exit statuses of curl.
NO_NAME, TIMED_OUT = 6, 28

# Addresses of no allowed name, as URLs have them, and what answers there where no fence is in between (ci/demo.py).
STRANGERS = {STRANGER: "who are you?", f"[{STRANGER6}]": "who are you?"}
METADATA = {METADATA4: "cloud credentials", f"[{METADATA6}]": "cloud credentials"}
UNKNOWN = STRANGERS | METADATA

Run = Callable[[str], Said]


def fetch(run: Run, host: str, *options: str, patience_s: int = ANSWER_S) -> Said:
    """GET http://<host>/ once; a refused name, too, is an answer: the resolver waits longer than we do."""
    words = " ".join(options)
    return run(f"RES_OPTIONS='timeout:600 attempts:1' curl -sS --max-time {patience_s} {words} http://{host}/")


def dropped(run: Run, host: str, drops: Callable[[], int]) -> bool:
    """Tell whether a GET has no answer and `drops` has counted packets of it.

    Where the machine is busy an emulated guest may send nothing before it gives up: then again.
    """
    for _ in range(TRIES):
        before = drops()
        if fetch(run, host, patience_s=SILENCE_S).status != TIMED_OUT:
            return False
        if drops() > before:
            return True
    return False


def can_have_addresses(topology: Topology) -> None:
    """Let the daemon give each attachment a DNS address of its own, also on a kernel without dummy interfaces.

    It puts them on its dummy interface; one of that name that is there already will do, and stays.
    """
    made = topology.host.run("ip", "link", "add", "probe0", "type", "dummy", check=False).returncode == 0
    if made:
        topology.host.ip("link del probe0")
    else:
        topology.host.ip(f"link add {DUMMY} type bridge", f"link set {DUMMY} up")
