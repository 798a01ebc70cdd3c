"""Hugging Face folders: config.json, safetensors, and the rope that transformers reads there."""
