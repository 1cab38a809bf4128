"""The embedded control plane: the local policy file decides, and is read again when it changes.

Owns which version of which rule every attachment was given. The schema is in `policyfile`, the watching in `filewatch`.

A reload gives an attachment its rule again only when what the rule says has changed; so a TTL keeps running over edits
elsewhere in the file and over restarts of the daemon, and begins anew when the rule itself was edited. A file with
errors changes nothing. One attachment's failure does not keep the others from their update, and is tried again with the
next reload.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import structlog

from netfence.control.filewatch import FileWatch, Signature, signature
from netfence.control.policyfile import PolicyFile, Rule, load_policy_file
from netfence.control.port import (
    AttachmentView,
    ConnectionState,
    FirstPolicy,
    NameDecision,
    PolicyHost,
    UnsubscribeReason,
)
from netfence.errors import InvalidError, NetfenceError, NotFoundError, PreconditionError, UnavailableError

__all__ = ["LocalControl", "NoControl", "PolicyFile", "load_policy_file"]

MAX_LOGGED_ERRORS = 50  # per reload; `netfenced policy check` prints them all

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Given:
    view: AttachmentView
    version: str


class _OnThisHost:
    """What is the same for every `ControlPort` without a connection: it is never away, and nobody is told anything."""

    @property
    def stale(self) -> bool:
        """Return False: nobody is awaited."""
        return False

    def introduce(self, daemon_id: str, away_s: float | None) -> None:
        """Do nothing."""

    async def drain(self) -> None:
        """Do nothing."""


class LocalControl(_OnThisHost):
    """A `ControlPort` on a policy file."""

    def __init__(self, file: PolicyFile) -> None:
        self._file = file
        self._given: dict[str, _Given] = {}
        self._host: PolicyHost | None = None
        self._reloading, self._reading = asyncio.Lock(), asyncio.Lock()
        self._seen: Signature = signature(file.path)  # when it was last read
        _warn(file)

    @property
    def state(self) -> ConnectionState:
        """Return CONNECTED: the file has been read."""
        return ConnectionState.CONNECTED

    @property
    def address(self) -> str:
        """Return ``file:`` and the path."""
        return f"file:{self._file.path}"

    def check(self, target: str) -> None:
        """Accept every target: one that no rule matches gets block_all."""

    async def run(self, host: PolicyHost) -> None:
        """Watch the file and keep every attachment at its rule until cancelled."""
        self._host = host
        for view in host.attachments():  # restored ones: the file may have changed while no daemon ran
            self._given.setdefault(view.id, _Given(view, view.policy_version))
        watch = FileWatch(self._file.path)
        try:
            await self.reload()
            while True:
                await watch.changed()
                await self.reload()
        finally:
            watch.close()

    async def reload(self) -> None:
        """Read the file again and bring every attachment whose rule changed up to it; errors are logged."""
        async with self._reloading:
            if not await self._read():
                return
            file = self._file
            changed, failed = await self._update_all()
            counts = {"rules": len(file.rules), "updated": changed, "failed": failed}
            log.info("policy_file_loaded", file=str(file.path), digest=file.digest, **counts)

    async def _read(self) -> bool:
        """Read the file again; False when it has errors, which are logged."""
        async with self._reading:
            path = self._file.path
            self._seen = signature(path)
            try:
                file = await asyncio.to_thread(load_policy_file, path)
            except InvalidError as error:
                _report(path, error.errors)
                return False
            self._file = self._merged(file)
            _warn(file)
            return True

    async def subscribe(self, view: AttachmentView) -> FirstPolicy:
        """Return the policy of the first matching rule of the file as it is now."""
        if signature(self._file.path) != self._seen:  # a moment ago, which `run` waits for to pass
            await self._read()
        rule = self._file.decide(view)
        self._given[view.id] = _Given(view, rule.version)
        return FirstPolicy(rule.update, rule.version)

    async def unsubscribe(self, attachment_id: str, reason: UnsubscribeReason, error: str = "") -> None:
        """Forget an attachment."""
        del reason, error
        self._given.pop(attachment_id, None)

    async def query_dns(self, attachment_id: str, name: str, qtype: str) -> NameDecision:
        """Refuse: a file decides no single names (`policyfile` accepts no DNS mode `proxy`)."""
        del attachment_id
        raise UnavailableError(f"ask about {name} {qtype}: DNS mode proxy needs control_plane.url")

    def _merged(self, file: PolicyFile) -> PolicyFile:
        """Return the new file with the old update of each rule that says the same: attachments share policies by it."""
        old = (*self._file.rules, *([self._file.default] if self._file.default else []))
        known = {rule.version: rule.update for rule in old}

        def kept(rule: Rule) -> Rule:
            return replace(rule, update=known.get(rule.version, rule.update))

        default = kept(file.default) if file.default else None
        return replace(file, rules=tuple(kept(rule) for rule in file.rules), default=default)

    async def _update_all(self) -> tuple[int, int]:
        """Apply what differs, one attachment after the other; return how many were updated and how many failed."""
        if self._host is None:
            return 0, 0
        current = {view.id: view for view in self._host.attachments()}
        for view in current.values():  # one whose detach failed is back
            self._given.setdefault(view.id, _Given(view, view.policy_version))
        changed = failed = 0
        for attachment_id, given in list(self._given.items()):
            given.view = current.get(attachment_id, given.view)  # an interface may have a new name
            rule = self._file.decide(given.view)
            if rule.version == given.version or attachment_id not in self._given:
                continue
            try:
                await self._host.apply(attachment_id, rule.update, rule.version)
            except NotFoundError:
                self._given.pop(attachment_id, None)
            except Exception as error:  # noqa: BLE001 - one attachment must not stop the others
                failed += 1
                say = log.bind(attachment=attachment_id, target=given.view.target, error=str(error))
                say.warning("policy_not_applied", exc_info=not isinstance(error, NetfenceError))
            else:
                given.version = rule.version
                changed += 1
        return changed, failed


class NoControl(_OnThisHost):
    """The `ControlPort` of a daemon with neither control plane nor policy file (semantics.md 27)."""

    REMEDY = "set control_plane.url, or policy_file for a local policy"

    @property
    def state(self) -> ConnectionState:
        """Return DISCONNECTED."""
        return ConnectionState.DISCONNECTED

    @property
    def address(self) -> str:
        """Return nothing."""
        return ""

    def check(self, target: str) -> None:
        """Refuse."""
        raise PreconditionError(
            f"attach {target}: nobody decides its policy: neither control_plane.url nor policy_file is set;"
            f" {self.REMEDY}, and restart netfenced"
        )

    async def run(self, host: PolicyHost) -> None:
        """Warn once, then wait."""
        del host
        log.warning("no_policy_source", remedy=self.REMEDY, effect="attach is refused")
        await asyncio.Event().wait()

    async def reload(self) -> None:
        """Do nothing."""

    async def subscribe(self, view: AttachmentView) -> FirstPolicy | None:
        """Refuse."""
        self.check(view.target)
        return None

    async def unsubscribe(self, attachment_id: str, reason: UnsubscribeReason, error: str = "") -> None:
        """Do nothing."""

    async def query_dns(self, attachment_id: str, name: str, qtype: str) -> NameDecision:
        """Refuse."""
        raise UnavailableError(f"ask about {name} {qtype} for {attachment_id}: no control plane; {self.REMEDY}")


def _warn(file: PolicyFile) -> None:
    for warning in file.warnings:
        log.warning("policy_file_warning", warning=warning)


def _report(path: Path, errors: Sequence[str]) -> None:
    for error in errors[:MAX_LOGGED_ERRORS]:
        log.error("policy_file_error", error=error)
    log.error("policy_file_refused", file=str(path), errors=len(errors), effect="the policies in force stay")
