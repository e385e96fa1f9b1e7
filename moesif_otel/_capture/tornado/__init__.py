"""Capture of the calls of Tornado handlers."""
