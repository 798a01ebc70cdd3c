"""Which tokens and positions a sample has: random draws, laws, samplers, and what they cover.

Mathematics over numpy alone; start with laws.py.
"""
