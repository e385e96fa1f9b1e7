"""What Moesif configures: sampling rates and governance rules."""
