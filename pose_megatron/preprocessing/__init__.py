"""From text to token files: readers, tokenizers, encoding in parallel, .bin and .idx."""
