"""What a model can do with its window: perplexity, passkeys, RULER's tasks; and parity with
transformers."""
