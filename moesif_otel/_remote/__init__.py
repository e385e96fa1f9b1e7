"""Sampling rates and governance rules, which are set in Moesif."""
