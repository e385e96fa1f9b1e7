"""Pure functions from a span and its capture to a Moesif event."""
