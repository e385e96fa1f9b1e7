"""What the Moesif server tells us: sampling rates and governance rules."""
