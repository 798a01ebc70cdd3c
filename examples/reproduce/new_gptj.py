"""A GPT-J with fresh weights, as a Hugging Face folder: a second architecture to train."""

import argparse
import json
from pathlib import Path

import torch
from transformers import GPTJConfig, GPTJForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", help="folder")
    parser.add_argument("tokenizer", type=Path, help="folder with tokenizer.json")
    for name in ("num-layers", "hidden-size", "num-attention-heads", "ffn-hidden-size"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--window", type=int, required=True, help="L in tokens")
    flags = parser.parse_args()
    form = json.loads((flags.tokenizer / "tokenizer.json").read_text(encoding="utf-8"))
    torch.manual_seed(1234)
    config = GPTJConfig(
        vocab_size=max(form["model"]["vocab"].values()) + 1,
        n_positions=flags.window,
        n_embd=flags.hidden_size,
        n_layer=flags.num_layers,
        n_head=flags.num_attention_heads,
        n_inner=flags.ffn_hidden_size,
        rotary_dim=flags.hidden_size // flags.num_attention_heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=False,
    )
    GPTJForCausalLM(config).save_pretrained(flags.output)


if __name__ == "__main__":
    main()
