"""Capture of the calls of ASGI applications."""
