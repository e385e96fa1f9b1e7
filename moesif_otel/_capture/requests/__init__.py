"""Capture of outgoing calls made with requests."""
