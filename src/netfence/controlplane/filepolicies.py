"""Policies out of the local policy file's format, for many daemons: the `policy_for` of `netfenced controlplane`.

Owns which file is in force and what was wrong with the last one. The format is `netfence.control.policyfile`'s, and so
is the choice of a rule, so that a file means the same here and in a daemon. Loading blocks: do it in a thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from netfence.control.policyfile import NO_RULE, PolicyFile, Rule, load_policy_file
from netfence.control.port import AttachmentView
from netfence.controlplane.policy import Policy
from netfence.controlplane.views import Attachment
from netfence.errors import InvalidError

MAX_LOGGED_ERRORS = 50  # per load; `netfenced policy check` prints them all

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A good file and the policy of each of its rules, by the rule's version."""

    file: PolicyFile
    policies: Mapping[str, Policy] = field(repr=False)


class FilePolicies:
    """The policy file in force. Raises InvalidError with every error when the first one is bad."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.errors: tuple[str, ...] = ()
        """What is wrong with the file as it is now; then the one before is in force."""
        self._loaded = _load(path, {})
        self._warn()

    @property
    def rules(self) -> int:
        """Number of entries of the file in force, without `default`."""
        return len(self._loaded.file.rules)

    def read(self) -> Loaded | InvalidError:
        """Read the file again; blocks. The outcome is for `take`."""
        try:
            return _load(self.path, self._loaded.policies)
        except InvalidError as error:
            return error

    def take(self, outcome: Loaded | InvalidError) -> bool:
        """Put what was read in force; a bad file changes nothing and is logged. Tell whether it was good."""
        if isinstance(outcome, InvalidError):
            self.errors = outcome.errors
            for error in outcome.errors[:MAX_LOGGED_ERRORS]:
                log.error("policy_file_error", error=error)
            effect = "the policies in force stay"
            log.error("policy_file_refused", file=str(self.path), errors=len(outcome.errors), effect=effect)
            return False
        self.errors = ()
        self._loaded = outcome
        self._warn()
        return True

    async def policy_for(self, attachment: Attachment) -> Policy:
        """Return the policy of the first rule that matches, else of `default`, else block_all (semantics.md 27)."""
        loaded = self._loaded
        return loaded.policies[loaded.file.decide(_view(attachment)).version]

    def _warn(self) -> None:
        for warning in self._loaded.file.warnings:
            log.warning("policy_file_warning", warning=warning)


def _load(path: Path, known: Mapping[str, Policy]) -> Loaded:
    """Read a file; rules that say the same keep their policy, which is shared and encoded already."""
    file = load_policy_file(path)
    rules: list[Rule] = [*file.rules, file.default or NO_RULE, NO_RULE]
    policies: dict[str, Policy] = {}
    for rule in rules:
        if rule.version not in policies:
            old = known.get(rule.version)
            policies[rule.version] = Policy.from_update(rule.update, rule.version) if old is None else old
    return Loaded(file, policies)


def _view(attachment: Attachment) -> AttachmentView:
    return AttachmentView(attachment.id, attachment.target, attachment.kind, attachment.metadata)
