"""Tests of the capture of httpx."""
