"""Capture with no code change: entry points of OpenTelemetry, and the table of what is patched."""
