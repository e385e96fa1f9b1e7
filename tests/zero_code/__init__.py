"""Programs that know nothing of Moesif, started by the real commands."""
