"""What leaves the process, end to end: secrets planted everywhere, every byte read."""
