"""Taps: they see what passes between a server and an application, and note it in an Exchange."""
