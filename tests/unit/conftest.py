"""Unit tests run without bcc, which is a distribution package: importing it fails here, wherever it is installed."""

from __future__ import annotations

import signal
import sys

sys.modules["bcc"] = None  # type: ignore[assignment]  # what Python itself puts there to say "no such module"

# A shell without job control starts what runs in its background deaf to Ctrl-C, and so would be all that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
