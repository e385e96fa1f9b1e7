"""Delivery of prepared payloads: bounded, in batches, with retry, once."""
