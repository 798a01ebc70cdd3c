"""Checkpoints of Megatron-LM, Megatron-Bridge and ours: torch_dist, and the legacy layout."""
