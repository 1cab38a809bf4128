"""A whole control plane: serves the policies of a YAML file, and brings every attachment up to date when it changes.

    python control_plane.py policies.yaml --listen 127.0.0.1:7443
    netfenced start --config netfence.yaml        # with control_plane: {url: 127.0.0.1:7443}

Take it as a start: put your data base in the place of `Directory`, and call `plane.update` when it changes.
"""
# ruff: noqa: INP001, T201 - a program, not a package, and it talks to its terminal

from __future__ import annotations

import argparse
import asyncio
import pathlib
from typing import Any

import yaml

from netfence.controlplane import Attachment, Cidr, ControlPlane, Dns, Domain, NameAnswer, Policy


class Directory:
    """The file's contents: policies by name, and which attachment gets which."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self.load()

    def load(self) -> None:
        """Read the file. Nothing changes when it raises."""
        tree = yaml.safe_load(self.path.read_text())
        policies = {name: make_policy(entry) for name, entry in tree["policies"].items()}
        rules = [(entry["metadata"], policies[entry["policy"]]) for entry in tree.get("attachments") or ()]
        self.default, self.rules = policies[tree["default"]], rules
        self.names: dict[str, Any] = tree.get("names") or {}

    async def policy_for(self, attachment: Attachment) -> Policy:
        """Return the policy of the first entry whose metadata the attachment has."""
        has = attachment.metadata.items()
        return next((policy for wanted, policy in self.rules if wanted.items() <= has), self.default)

    async def answer_dns(self, _attachment: Attachment, name: str, _qtype: str) -> NameAnswer:
        """Decide a name for attachments in DNS mode proxy."""
        allow = name in self.names
        return NameAnswer(allow=allow, add_to_filter=allow, ips=self.names.get(name) or (), ttl_s=60)


def make_policy(entry: dict[str, Any]) -> Policy:
    """Make a policy of an entry; the constructor tells all that is wrong with it."""
    dns = entry.get("dns")
    return Policy(
        entry["mode"],
        allow=[Cidr(**one) if isinstance(one, dict) else one for one in entry.get("allow", ())],
        deny=[Cidr(**one) if isinstance(one, dict) else one for one in entry.get("deny", ())],
        dns=dns and Dns(dns["mode"], names(dns, "allow"), names(dns, "deny"), dns.get("upstreams", ())),
        audit=entry.get("audit", False),
    )


def names(dns: dict[str, Any], key: str) -> list[Domain | str]:
    """Return a list of domains, plain or with their subdomains."""
    return [Domain(**one) if isinstance(one, dict) else one for one in dns.get(key, ())]


async def follow(directory: Directory, plane: ControlPlane) -> None:
    """Load the file again whenever it changes, and say what the daemons make of it."""
    seen = directory.path.stat().st_mtime_ns
    while True:
        await asyncio.sleep(0.5)
        try:
            if (now := directory.path.stat().st_mtime_ns) == seen:
                continue
            seen = now
            directory.load()
        except Exception as error:  # noqa: BLE001 - whatever is wrong with the file, what is in force stays
            print(f"{directory.path}: {error}", flush=True)
            continue
        results = await plane.update()
        print(f"{directory.path}: {results}", flush=True)
        for result in results.failed:
            print(f"  {result.attachment.target}: {result.outcome.value}: {'; '.join(result.errors)}", flush=True)


async def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=pathlib.Path)
    parser.add_argument("--listen", default="127.0.0.1:7443", help="host:port, or unix:/path")
    options = parser.parse_args()
    directory = Directory(options.file)
    plane = ControlPlane(directory.policy_for, answer_dns=directory.answer_dns)
    async with plane.serving(options.listen):
        print(f"serving at {plane.address}", flush=True)
        await follow(directory, plane)


if __name__ == "__main__":
    asyncio.run(main())
