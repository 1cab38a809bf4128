"""Turn an OSError of the kernel into the error table, with what was tried, on what, why and the remedy.

Owns the choice of kind by errno for everything in `dataplane` that attaches or loads.
"""

from __future__ import annotations

import errno
import os

from netfence.dataplane import probe
from netfence.errors import (
    ExhaustedError,
    ExistsError,
    NetfenceError,
    NotFoundError,
    PermissionDeniedError,
    PreconditionError,
)

_ENOTSUPP = 524  # the kernel's own, never meant for user space; BPF returns it all the same

_DENIED = frozenset({errno.EPERM, errno.EACCES})
_FULL = frozenset({errno.ENOSPC, errno.ENOMEM, errno.ERANGE, errno.E2BIG, errno.EMFILE, errno.ENFILE})
_UNSUPPORTED = frozenset({errno.EINVAL, errno.EOPNOTSUPP, _ENOTSUPP, errno.ENOSYS, errno.EBUSY})


def why(error: OSError) -> str:
    """Tell an OSError in lower-case words, without errno's number."""
    if error.errno == _ENOTSUPP:
        return "not supported by this kernel"
    reason = error.strerror or os.strerror(error.errno or 0)
    _, marker, tail = reason.partition(": ") if reason.startswith("bpf ") else ("", "", "")
    reason = tail if marker else reason
    return reason[:1].lower() + reason[1:]


def explain(tried: str, error: OSError, remedy: str = "") -> NetfenceError:
    """Make the error for `tried` ("attach tc ingress on veth3"); `remedy` stands where errno gives no better one."""
    head = f"{tried}: {why(error)}"
    code = error.errno or 0
    if code in _DENIED:
        missing = probe.missing_capabilities()
        if missing:
            return PermissionDeniedError(f"{head}; needs {' and '.join(missing)}")
        return PermissionDeniedError(
            f"{head}; {remedy or 'a security module, a user namespace or kernel lockdown forbids it'}"
        )
    if code in (errno.ENODEV, errno.ENOENT, errno.ENXIO):
        return NotFoundError(f"{head}; {remedy or 'it is gone'}")
    if code == errno.EEXIST:
        return ExistsError(f"{head}; {remedy or 'detach what is there first'}")
    if code in _FULL:
        return ExhaustedError(f"{head}; {remedy or 'free memory or raise the limit'}")
    if code in _UNSUPPORTED:
        return PreconditionError(f"{head}; {remedy or 'the kernel or the device does not allow it'}")
    return NetfenceError(f"{head}; {remedy}" if remedy else head)
