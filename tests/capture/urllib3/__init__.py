"""Tests of the capture of urllib3."""
