"""Tests of the capture of aiohttp."""
