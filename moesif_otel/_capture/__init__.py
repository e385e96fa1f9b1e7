"""Captures: they record what passes between a server and an application in an Exchange."""
