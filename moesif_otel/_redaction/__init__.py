"""What counts as a secret, and one module for each form of text that may hold one."""
