"""The command `moesif-otel` in a process of its own, as a user starts it."""

from __future__ import annotations

import os
import re
import subprocess
import sys

# `-X dev` brings asyncio's debug mode, which tells of a busy machine.
_SLOW = re.compile(r"^Executing .* took [\d.]+ seconds\n", re.MULTILINE)


def start(*arguments):
    """Start the command, its output unbuffered, in text, and as wide as a usual terminal; every warning is an error."""
    command = [sys.executable, "-X", "dev", "-W", "error", "-m", "moesif_otel", *arguments]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "120"},
    )


def complaints(errors):
    """Return what was written to the standard error, without what only tells how fast the machine was."""
    return _SLOW.sub("", errors)
