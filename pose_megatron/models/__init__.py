"""Models on megatron-core whose positions are their position ids, and the families they come from.

Start with gpt.py; shape.py and families/ are light, the rest imports megatron-core.
"""
