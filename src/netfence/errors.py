"""The error table: every failure that leaves a module is one of these kinds.

Each kind has one gRPC status code (by name, so that nothing but `api` needs grpc). A message says what was tried, on
what, why it failed and what to do: ``attach tc ingress on veth3: operation not permitted; needs CAP_NET_ADMIN``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar


class NetfenceError(Exception):
    """Base of every error we raise on purpose; `code` is the gRPC status code's name."""

    code: ClassVar[str] = "INTERNAL"


class InvalidError(NetfenceError):
    """The request or configuration is wrong; `errors` lists every fault, not only the first."""

    code = "INVALID_ARGUMENT"

    def __init__(self, errors: str | Sequence[str]) -> None:
        self.errors: tuple[str, ...] = (errors,) if isinstance(errors, str) else tuple(errors)
        super().__init__("; ".join(self.errors))


class NotFoundError(NetfenceError):
    """No such interface, cgroup or attachment."""

    code = "NOT_FOUND"


class ExistsError(NetfenceError):
    """The target is attached already."""

    code = "ALREADY_EXISTS"


class ExhaustedError(NetfenceError):
    """A table with a named limit is full (DNS ports, slots, leases, rules)."""

    code = "RESOURCE_EXHAUSTED"


class PreconditionError(NetfenceError):
    """The host or its configuration lacks what is needed; names the feature and the first kernel that has it."""

    code = "FAILED_PRECONDITION"


class UnavailableError(NetfenceError):
    """No control plane, or it went away."""

    code = "UNAVAILABLE"


class DeadlineError(NetfenceError):
    """The control plane did not answer in time."""

    code = "DEADLINE_EXCEEDED"


class PermissionDeniedError(NetfenceError):
    """A capability is missing; the message names it."""

    code = "PERMISSION_DENIED"
