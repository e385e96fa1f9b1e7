"""Delivery through another OpenTelemetry span exporter."""
