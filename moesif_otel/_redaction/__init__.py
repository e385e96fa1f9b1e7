"""Finds secrets: the names that count, and one module for each form of text that may hold them."""
