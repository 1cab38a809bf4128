"""The local policy file: YAML text → rules with their bulk updates, or every error as ``file:line: key: message``.

Owns the file's schema and the choice of a rule for an attachment. The policies in it go through
`netfence.policy.commands` like those of a remote control plane, so that they are refused for the same reasons. It knows
no kernel and no event loop; loading is plain blocking code for a thread.

Decisions: an entry without a condition in `match` is refused (it would hide all entries below it, and `default` says
the same on purpose); `interface` and `cgroup` together are refused (no target is both); globs are `fnmatch` ones, whose
``*`` also matches ``/``; DNS mode `proxy` is refused, because there is nobody to ask.
"""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from netfence.control.port import AttachmentView
from netfence.control.yamltree import Map, Node, Scalar, Seq, parse
from netfence.errors import InvalidError, NetfenceError
from netfence.policy.commands import BulkUpdate, CidrSpec, DnsSpec, DomainSpec, apply
from netfence.policy.modes import DnsMode, Mode
from netfence.policy.policy import EMPTY

MAX_FILE_BYTES = 256 << 20  # a million rules need about 50 MB; more is not a policy file

ENTRY_KEYS = ("match", "mode", "audit", "allow_cidrs", "deny_cidrs", "dns")
DNS_KEYS = ("mode", "allow", "deny", "upstreams")
MATCH_KEYS = ("metadata", "interface", "cgroup")
DNS_MODES = tuple(mode.name.lower() for mode in DnsMode if mode is not DnsMode.PROXY)
MODES = tuple(mode.name.lower() for mode in Mode)

# How the policy core names a fault in a list of a bulk update.
_INDEXED = re.compile(
    r"(allow_cidrs|deny_cidrs|dns\.allow_domains|dns\.deny_domains|dns\.upstream_servers)\[(\d+)\]: (.*)", re.DOTALL
)
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|h|d)?")
_UNITS_S = {None: 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True, slots=True)
class Match:
    """The conditions of an entry; all that are given must hold."""

    metadata: tuple[tuple[str, str], ...] = ()
    interface: str | None = None
    cgroup: str | None = None

    def holds(self, view: AttachmentView) -> bool:
        """Tell whether the entry is for this attachment."""
        if any(view.metadata.get(key) != value for key, value in self.metadata):
            return False
        for kind, pattern in (("interface", self.interface), ("cgroup", self.cgroup)):
            if pattern is not None and not (view.kind == kind and fnmatch.fnmatchcase(view.target, pattern)):
                return False
        return True


@dataclass(frozen=True, slots=True)
class Rule:
    """One entry; `version` changes whenever what it says of the policy changes (its place in the file is no part)."""

    match: Match
    update: BulkUpdate
    version: str
    line: int


@dataclass(frozen=True, slots=True)
class PolicyFile:
    """A valid policy file. `warnings` are findings that do not make it invalid, in the form of the errors.

    `digest` is the begin of the SHA-256 of its octets: which content it was.
    """

    path: Path
    rules: tuple[Rule, ...] = ()
    default: Rule | None = None
    warnings: tuple[str, ...] = ()
    digest: str = ""

    def decide(self, view: AttachmentView) -> Rule:
        """Return the first rule that matches, else `default`, else block_all (semantics.md 27)."""
        for rule in self.rules:
            if rule.match.holds(view):
                return rule
        return self.default or NO_RULE


def load_policy_file(path: Path) -> PolicyFile:
    """Read and check a policy file. Blocks. Raises InvalidError with every error, each with file, line and key."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise InvalidError(f"{path}: read policy file: {error.strerror}; check policy_file") from error
    if len(data) > MAX_FILE_BYTES:
        raise InvalidError(f"{path}: read policy file: larger than {MAX_FILE_BYTES >> 20} MiB")
    return parse_policy_file(data, path)


def parse_policy_file(data: bytes, path: Path) -> PolicyFile:
    """Check the text of a policy file; `path` is for messages. Raises InvalidError with every error."""
    tree = parse(data, str(path))
    if tree is None:
        raise InvalidError(f"{path}:1: file: empty; to block everything write: default: {{mode: block_all}}")
    reader = _Reader(str(path))
    found = reader.file(tree, path)
    if reader.faults:
        raise InvalidError([text for _, text in sorted(reader.faults, key=lambda fault: fault[0])])
    return replace(found, digest=digest_of(data))


def digest_of(data: bytes) -> str:
    """Return the digest of a policy file's octets, 16 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()[:16]


@dataclass(slots=True)
class _Lines:
    """Where the entries of one rule stand in the file, in the order of the update's lists."""

    entry: int
    allow_cidrs: list[int] = field(default_factory=list)
    deny_cidrs: list[int] = field(default_factory=list)
    allow: list[int] = field(default_factory=list)
    deny: list[int] = field(default_factory=list)
    upstreams: list[int] = field(default_factory=list)

    def of(self, theirs: str) -> tuple[str, list[int]]:
        """Return our key and the lines of a list that the policy core calls `theirs`."""
        return {
            "allow_cidrs": ("allow_cidrs", self.allow_cidrs),
            "deny_cidrs": ("deny_cidrs", self.deny_cidrs),
            "dns.allow_domains": ("dns.allow", self.allow),
            "dns.deny_domains": ("dns.deny", self.deny),
            "dns.upstream_servers": ("dns.upstreams", self.upstreams),
        }[theirs]


class _Reader:
    """Turns the tree into rules and collects errors; a faulty part yields a harmless value, so that reading goes on."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.faults: list[tuple[int, str]] = []  # line, whole text
        self.warnings: list[str] = []

    def file(self, tree: Node, path: Path) -> PolicyFile:
        top = self._map(tree, "file", ("attachments", "default"))
        rules = []
        if top is not None and (entries := self._get(top, "attachments")) is not None:
            for index, node in enumerate(self._seq(entries, "attachments")):
                rules.append(self._rule(node, f"attachments[{index}]", with_match=True))
        default = None
        if top is not None and (fallback := self._get(top, "default")) is not None:
            default = self._rule(fallback, "default", with_match=False)
        if top is not None and not top.items:
            self._error(top.line, "file", "neither `attachments` nor `default`")
        return PolicyFile(path, tuple(rules), default, tuple(self.warnings))

    def _rule(self, node: Node, key: str, *, with_match: bool) -> Rule:
        keys = ENTRY_KEYS if with_match else ENTRY_KEYS[1:]
        entry = self._map(node, key, keys) or Map(node.line)
        match = self._match(entry, key) if with_match else Match()
        lines = _Lines(entry.line)
        mode = self._mode(entry, key, MODES)
        update = BulkUpdate(
            mode=Mode[mode.upper()] if mode else Mode.BLOCK_ALL,
            allow_cidrs=self._cidrs(entry, key, "allow_cidrs", lines.allow_cidrs),
            deny_cidrs=self._cidrs(entry, key, "deny_cidrs", lines.deny_cidrs),
            dns=self._dns(entry, key, lines),
            audit=self._bool(entry, key, "audit"),
        )
        self._check(update, key, lines)
        if update.dns is None and update.mode == Mode.ALLOWLIST:
            self.warnings.append(f"{self._name}:{entry.line}: {key}: no `dns`: names resolve, but open no addresses")
        return Rule(match, update, update_version(update), entry.line)

    def _match(self, entry: Map, key: str) -> Match:
        node = self._get(entry, "match")
        if node is None:
            self._error(entry.line, f"{key}.match", "missing; for everything that no entry matches write `default:`")
            return Match()
        found = self._map(node, f"{key}.match", MATCH_KEYS) or Map(node.line)
        metadata = []
        if (labels := self._get(found, "metadata")) is not None:
            table = self._map(labels, f"{key}.match.metadata", None) or Map(labels.line)
            for name, (_, value) in table.items.items():
                metadata.append((name, self._text(value, f"{key}.match.metadata.{name}")))
        globs: dict[str, str | None] = {"interface": None, "cgroup": None}
        for name in globs:
            if (glob := self._get(found, name)) is not None:
                globs[name] = self._text(glob, f"{key}.match.{name}")
        if globs["interface"] is not None and globs["cgroup"] is not None:
            self._error(found.line, f"{key}.match", "`interface` and `cgroup` together match nothing; make two entries")
        if not metadata and globs["interface"] is None and globs["cgroup"] is None:
            self._error(
                found.line,
                f"{key}.match",
                "no condition, so it would hide every entry below; for everything else write `default:`",
            )
        return Match(tuple(metadata), globs["interface"], globs["cgroup"])

    def _dns(self, entry: Map, key: str, lines: _Lines) -> DnsSpec | None:
        node = self._get(entry, "dns")
        if node is None:
            return None
        key = f"{key}.dns"
        dns = self._map(node, key, DNS_KEYS) or Map(node.line)
        mode = self._mode(dns, key, DNS_MODES)
        upstreams = []
        if (servers := self._get(dns, "upstreams")) is not None:
            for index, server in enumerate(self._seq(servers, f"{key}.upstreams")):
                upstreams.append(self._text(server, f"{key}.upstreams[{index}]"))
                lines.upstreams.append(server.line)
        return DnsSpec(
            mode=DnsMode[mode.upper()] if mode else DnsMode.DISABLED,
            allow=self._domains(dns, key, "allow", lines.allow),
            deny=self._domains(dns, key, "deny", lines.deny),
            upstreams=tuple(upstreams),
        )

    def _cidrs(self, entry: Map, key: str, name: str, lines: list[int]) -> tuple[CidrSpec | str, ...]:
        if (node := self._get(entry, name)) is None:
            return ()
        specs: list[CidrSpec | str] = []
        for index, item in enumerate(self._seq(node, f"{key}.{name}")):
            lines.append(item.line)
            if isinstance(item, Scalar) and not item.null:  # the hot path of large files
                specs.append(item.text)
                continue
            where = f"{key}.{name}[{index}]"
            table = self._map(item, where, ("cidr", "ttl")) or Map(item.line)
            cidr, ttl = self._get(table, "cidr"), self._get(table, "ttl")
            if cidr is None and isinstance(item, Map):
                self._error(item.line, f"{where}.cidr", "missing")
            text = self._text(cidr, f"{where}.cidr") if cidr is not None else "0.0.0.0/32"
            specs.append(CidrSpec(text, self._duration(ttl, f"{where}.ttl") if ttl is not None else 0.0))
        return tuple(specs)

    def _domains(self, dns: Map, key: str, name: str, lines: list[int]) -> tuple[DomainSpec, ...]:
        if (node := self._get(dns, name)) is None:
            return ()
        specs = []
        for index, item in enumerate(self._seq(node, f"{key}.{name}")):
            lines.append(item.line)
            if isinstance(item, Scalar) and not item.null:
                specs.append(DomainSpec(item.text))
                continue
            where = f"{key}.{name}[{index}]"
            table = self._map(item, where, ("domain", "include_subdomains")) or Map(item.line)
            domain = self._get(table, "domain")
            if domain is None and isinstance(item, Map):
                self._error(item.line, f"{where}.domain", "missing")
            text = self._text(domain, f"{where}.domain") if domain is not None else "invalid"
            specs.append(DomainSpec(text, include_subdomains=self._bool(table, where, "include_subdomains")))
        return tuple(specs)

    def _check(self, update: BulkUpdate, key: str, lines: _Lines) -> None:
        """Let the policy core judge the update as a whole, and put its faults to the lines they are about."""
        try:
            apply(EMPTY, update, 0.0)
        except NetfenceError as error:
            faults = error.errors if isinstance(error, InvalidError) else (str(error),)
            for fault in faults:
                if match := _INDEXED.fullmatch(fault):
                    ours, at = lines.of(match[1])
                    index = int(match[2])
                    self._error(at[index], f"{key}.{ours}[{index}]", match[3])
                else:
                    self._error(lines.entry, key, fault)

    # -- leaves ----------------------------------------------------------------------------------------------------

    def _map(self, node: Node, key: str, allowed: Sequence[str] | None) -> Map | None:
        if not isinstance(node, Map):
            self._error(node.line, key, f"must be a mapping, not {_kind(node)}")
            return None
        if allowed is not None:
            for name, (line, _) in node.items.items():
                if name not in allowed:
                    near = difflib.get_close_matches(name, allowed, n=1)
                    hint = f"did you mean `{near[0]}`?" if near else f"allowed: {', '.join(allowed)}"
                    self._error(line, f"{key}.{name}" if key != "file" else name, f"unknown key; {hint}")
        return node

    def _get(self, table: Map, name: str) -> Node | None:
        found = table.items.get(name)
        if found is None or (isinstance(found[1], Scalar) and found[1].null):
            return None
        return found[1]

    def _seq(self, node: Node, key: str) -> list[Node]:
        if isinstance(node, Seq):
            return node.items
        self._error(node.line, key, f"must be a list, not {_kind(node)}")
        return []

    def _text(self, node: Node, key: str) -> str:
        if isinstance(node, Scalar):
            return node.text
        self._error(node.line, key, f"must be text, not {_kind(node)}")
        return ""

    def _mode(self, table: Map, key: str, allowed: Sequence[str]) -> str | None:
        node = self._get(table, "mode")
        if node is None:
            self._error(table.line, f"{key}.mode", f"missing; one of {', '.join(allowed)}")
            return None
        text = self._text(node, f"{key}.mode")
        if isinstance(node, Scalar) and text not in allowed:
            extra = "needs control_plane.url; " if text == "proxy" and allowed is DNS_MODES else ""
            self._error(node.line, f"{key}.mode", f"{text!r}: {extra}one of {', '.join(allowed)}")
        return text if text in allowed else None

    def _bool(self, table: Map, key: str, name: str) -> bool:
        node = self._get(table, name)
        if node is None:
            return False
        if isinstance(node, Scalar) and node.plain and node.text in ("true", "false"):
            return node.text == "true"
        shown = repr(node.text) if isinstance(node, Scalar) else _kind(node)
        self._error(node.line, f"{key}.{name}", f"{shown}: true or false")
        return False

    def _duration(self, node: Node, key: str) -> float:
        text = self._text(node, key)
        if match := _DURATION.fullmatch(text):
            return float(match[1]) * _UNITS_S[match[2]]
        if isinstance(node, Scalar):
            self._error(node.line, key, f"{text!r}: a duration as 90, 90s, 5m, 1h or 1d")
        return 0.0

    def _error(self, line: int, key: str, message: str) -> None:
        self.faults.append((line, f"{self._name}:{line}: {key}: {message}"))


def _kind(node: Node) -> str:
    if isinstance(node, Scalar):
        return "nothing" if node.null else "text"
    return "a list" if isinstance(node, Seq) else "a mapping"


def update_version(update: BulkUpdate) -> str:
    """Return ``file:`` and a digest of everything the update says; equal updates have equal versions."""
    digest = hashlib.sha256(f"{int(update.mode)} {update.audit}\n".encode())
    for name in ("allow_cidrs", "deny_cidrs"):
        for cidr in getattr(update, name):
            text, ttl_s = (cidr, 0.0) if isinstance(cidr, str) else cidr
            digest.update(f"{name} {text!r} {ttl_s}\n".encode())
    if update.dns is not None:
        digest.update(f"dns {int(update.dns.mode)} {list(update.dns.upstreams)!r}\n".encode())
        for name in ("allow", "deny"):
            for domain in getattr(update.dns, name):
                digest.update(f"{name} {domain.domain!r} {domain.include_subdomains}\n".encode())
    return f"file:{digest.hexdigest()[:16]}"


_BLOCK_ALL = BulkUpdate(mode=Mode.BLOCK_ALL, allow_cidrs=(), deny_cidrs=(), dns=None, audit=False)
NO_RULE = Rule(Match(), _BLOCK_ALL, update_version(_BLOCK_ALL), 0)
