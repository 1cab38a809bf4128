"""Unit tests run without bcc, which is a distribution package: importing it fails here, wherever it is installed."""

from __future__ import annotations

import sys

sys.modules["bcc"] = None  # type: ignore[assignment]  # what Python itself puts there to say "no such module"
