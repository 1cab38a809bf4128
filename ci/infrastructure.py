"""What went wrong around the tests and not in them: no package, no mirror, no virtual machine.

Owns that kind of error and its exit status, so that nobody takes a missing kernel for a failed test, or for a pass
(style.md 17). Exit statuses of scripts in ci/: 0 good, 1 a test failed, 2 called wrongly, 3 infrastructure.
"""

from __future__ import annotations

EXIT_STATUS = 3


class InfrastructureError(Exception):
    """Something that the tests need is not to be had; the message says what was tried, why it failed, what to do."""

    def __str__(self) -> str:
        return f"infrastructure: {super().__str__()}"
