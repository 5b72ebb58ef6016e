"""Processes, and what they print."""
