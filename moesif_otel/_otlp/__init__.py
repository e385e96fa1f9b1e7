"""The same calls through somebody else's span exporter."""
