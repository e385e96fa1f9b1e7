"""API analytics for Python services: captured with OpenTelemetry, delivered to Moesif."""
