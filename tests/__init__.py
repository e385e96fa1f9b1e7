"""Tests of moesif_otel; they mirror the package."""
