"""Checkpoints of every format, and conversion between them; start with formats.py."""
