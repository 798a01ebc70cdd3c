"""From token files to micro-batches: sources, skip-wise samples, blends, one batch on every rank.

Start with spans.py.
"""
