"""A Moesif of your own on this machine: for trying moesif_otel and for its tests."""
