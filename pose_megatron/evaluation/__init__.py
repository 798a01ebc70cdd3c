"""What a model can do with its window: perplexity, passkeys, and parity with transformers."""
