"""Capture of WSGI calls (PEP 3333)."""
