"""A model in a Hugging Face folder, read and written without transformers' model classes.

    config.json          shape and rope  <-> ModelConfig
    tokenizer.*, ...     SIDECARS: what accompanies the weights and is copied
    model*.safetensors   weights: shards.py

What transformers will make of the rope in config.json is asked of transformers itself:
rope_check.py.
"""

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from pose_megatron.errors import ConfigError
from pose_megatron.models.shape import ModelConfig
from pose_megatron.preprocessing.tokenizer import FOLDER_FILES
from pose_megatron.rope.huggingface import from_hf, rotary_percent, to_hf
from pose_megatron.runtime.json_files import naming, read_json, write_json

# config.json goes along for the ids of special tokens.
SIDECARS = (*FOLDER_FILES, "chat_template.json", "generation_config.json", "config.json")
_NAMES = {  # config.json's name: ModelConfig's
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "head_dim": "kv_channels",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
}


@dataclass(frozen=True)
class Family:
    """How config.json spells a family of models.

    Attributes:
        only: keys with the one value that our layers compute; absent is the same.
        defaults: what transformers takes for an absent key, where it is not `only`'s.
        names: of sizes, as in _NAMES.
        epsilon: name of the norms' epsilon and its default.
        traits: of ModelConfig.
    """

    architecture: str
    model_type: str
    only: dict
    defaults: dict = field(default_factory=dict)
    names: dict = field(default_factory=lambda: _NAMES)
    epsilon: tuple[str, float] = ("rms_norm_eps", 1e-6)
    traits: dict = field(default_factory=dict)


_SILU = {"hidden_act": "silu"}
_FULL = {"use_sliding_window": False}
FAMILIES = {  # by the names of pose_megatron.checkpoints.mapping.TABLES
    "llama": Family(
        "LlamaForCausalLM", "llama", {**_SILU, "attention_bias": False, "mlp_bias": False}
    ),
    "mistral": Family(
        "MistralForCausalLM",
        "mistral",
        {**_SILU, "sliding_window": None},
        {"sliding_window": 4096, "num_key_value_heads": 8},
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        "qwen2",
        _SILU | _FULL,
        {"num_key_value_heads": 32},
        traits={"add_qkv_bias": True},
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        "qwen3",
        {**_SILU, **_FULL, "attention_bias": False},
        {"num_key_value_heads": 32, "head_dim": 128},
        traits={"qk_layernorm": True},
    ),
    # Baichuan2-7B; the 13B model has ALiBi, and its config.json no max_position_embeddings.
    "baichuan": Family("BaichuanForCausalLM", "baichuan", {**_SILU, "tie_word_embeddings": False}),
    "gptj": Family(
        "GPTJForCausalLM",
        "gptj",
        {
            "activation_function": "gelu_new",
            "tie_word_embeddings": False,
            "scale_attn_weights": True,
        },
        {"rotary_dim": 64},
        {
            "n_layer": "num_layers",
            "n_embd": "hidden_size",
            "n_inner": "ffn_hidden_size",
            "n_head": "num_attention_heads",
            "vocab_size": "vocab_size",
            "n_positions": "max_position_embeddings",
        },
        ("layer_norm_epsilon", 1e-5),
    ),
}
_ROPELESS = ("baichuan", "gptj")  # their own code reads no rope keys: base 10000, not interpolated


def read_config(folder: Path, make_vocab_size_divisible_by: int = 128) -> ModelConfig:
    """The model that a folder's config.json describes.

    Raises:
        ConfigError: it is missing, broken, or says what none of FAMILIES has.
    """
    config = read_json(folder / "config.json")
    with naming(folder):
        architecture = (config.get("architectures") or [None])[0]
        named = {f.architecture: name for name, f in FAMILIES.items()}
        if architecture not in named:
            raise ConfigError(
                f"config.json: architecture {architecture} is not supported; supported are "
                f"{', '.join(named)}"
            )
        family = FAMILIES[named[architecture]]
        config = family.defaults | config
        for name, only in (family.only | {"quantization_config": None}).items():
            if (value := config.get(name, only)) != only:
                raise ConfigError(
                    f"config.json: {name} {value!r} is not supported, only {only!r} is"
                )
        if other := set(config.get("layer_types") or ()) - {"full_attention"}:
            raise ConfigError(f"config.json: layer_types {min(other)!r} is not supported")
        config = {name: value for name, value in config.items() if value is not None}

        def whole(name: str) -> int:
            if not isinstance(value := config.get(name), int):
                raise ConfigError(f"config.json: {name} must be a whole number, not {value!r}")
            return value

        names = {ours: theirs for theirs, ours in family.names.items()}
        heads, hidden = whole(names["num_attention_heads"]), whole(names["hidden_size"])
        sizes = {
            "num_query_groups": heads,
            "kv_channels": hidden // max(heads, 1),
            "ffn_hidden_size": 4 * hidden,
        }  # of GPT-J; the others say theirs
        for ours, theirs in names.items():
            if theirs in config or ours not in sizes or theirs == "intermediate_size":
                sizes[ours] = whole(theirs)
        if architecture == "GPTJForCausalLM":
            sizes["rotary_percent"] = _percent(whole("rotary_dim"), sizes["kv_channels"])
        base, scaling = from_hf(config)
        if rotary_percent(config) != 1:
            raise ConfigError(
                f"config.json: a rotary share other than 1 is no layout of {architecture}"
            )
        name, epsilon = family.epsilon
        return ModelConfig(
            **sizes,
            **family.traits,
            family=named[architecture],
            make_vocab_size_divisible_by=make_vocab_size_divisible_by,
            untie_embeddings_and_output_weights=not config.get("tie_word_embeddings", False),
            norm_epsilon=float(config.get(name, epsilon)),
            rotary_base=base,
            rope_scaling=scaling,
        )


def stored_dtype(folder: Path) -> torch.dtype:
    """The precision that config.json says the weights have."""
    config = read_json(folder / "config.json")
    return getattr(torch, config.get("dtype") or config.get("torch_dtype") or "float32")


def _percent(rotary_dim: int, kv_channels: int) -> float:
    """The share of a head of which ModelConfig makes exactly rotary_dim again."""
    percent = rotary_dim / kv_channels
    return percent if int(kv_channels * percent) == rotary_dim else math.nextafter(percent, 1)


def sizes(model: ModelConfig) -> dict:
    """What pose_megatron.checkpoints.mapping asks for to convert this model.

    Raises:
        ConfigError: Hugging Face has no model like it.
    """
    if model.family is None:
        raise ConfigError("no Hugging Face family has --add-qkv-bias and --qk-layernorm both")
    names = (
        "family",
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "kv_channels",
        "vocab_size",
        "padded_vocab_size",
    )
    tied = not model.untie_embeddings_and_output_weights
    return {name: getattr(model, name) for name in names} | {"tied": tied}


def find_sidecars(source: Path) -> dict[str, Path]:
    """Files of a tokenizer and its like, by the names that a Hugging Face folder gives them.

    Args:
        source: a folder, or the tokenizer's file; a .model, or a file that is alone, may have any
            name.
    """
    files = [source] if source.is_file() else sorted(source.glob("*"))
    own = [file for file in files if file.name not in SIDECARS]
    found = {
        f"tokenizer{file.suffix}": file
        for file in own
        if file.suffix == ".model" or len(files) == 1
    }
    return found | {file.name: file for file in files if file not in own}


def write_config(
    folder: Path,
    model: ModelConfig,
    dtype: torch.dtype,
    sidecars: Mapping[str, Path],
    rope_as_longrope: bool = False,
) -> None:
    """Writes all that a folder holds beside the weights.

    tokenizer_config.json says the model's window, and is made where the tokenizer has none. A
    generation config that stopped at the window before stops at this one.

    Raises:
        ConfigError: the family's config cannot say what the model is.
    """
    if model.rotary_dim != model.kv_channels and not model.is_gptj:
        raise ConfigError(
            f"--rotary-percent {model.rotary_percent} has no Hugging Face form: LLaMA rotates "
            "whole heads"
        )
    for name in sidecars.keys() - {"config.json"}:
        shutil.copyfile(sidecars[name], folder / name)
    window = model.max_position_embeddings
    if tokenizer := _tokenizer_config(sidecars):
        write_json(folder / "tokenizer_config.json", tokenizer | {"model_max_length": window})
    if {"config.json", "generation_config.json"} <= sidecars.keys():
        before = read_json(sidecars["config.json"]).get("max_position_embeddings")
        generation = read_json(sidecars["generation_config.json"])
        if before is not None and generation.get("max_length") == before:
            write_json(folder / "generation_config.json", generation | {"max_length": window})
    family = FAMILIES[model.family]
    config = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **{theirs: getattr(model, ours) for theirs, ours in family.names.items()},
        **family.only,
        family.epsilon[0]: model.norm_epsilon,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "use_cache": True,
        # transformers 4 and vLLM read the first, transformers 5 the second.
        **dict.fromkeys(("torch_dtype", "dtype"), str(dtype).removeprefix("torch.")),
        **_special_tokens(folder, sidecars),
    }
    rope = to_hf(
        model.rope_scaling,
        base=model.rotary_base,
        rotary_dim=model.rotary_dim,
        max_position_embeddings=window,
        as_longrope=rope_as_longrope,
    )
    if model.family in _ROPELESS:
        if (rope["rope_theta"], rope["rope_scaling"]) != (10000.0, None):
            raise ConfigError(
                f"--rope-scaling {model.rope_scaling.method} with base {rope['rope_theta']:g} has "
                f"no Hugging Face form: the code of {family.architecture} reads no rope from its "
                "config.json; train this family with --rope-scaling none"
                + " or export it with --as-llama"
                * (model.family == "baichuan")
            )
        rope = {}
    if model.is_gptj:
        rope = {"rotary_dim": model.rotary_dim}
    write_json(folder / "config.json", config | rope)


def _tokenizer_config(sidecars: Mapping[str, Path]) -> dict:
    if "tokenizer_config.json" in sidecars:
        return read_json(sidecars["tokenizer_config.json"])
    if "tokenizer.json" in sidecars:
        return {"tokenizer_class": "PreTrainedTokenizerFast"}
    if "tokenizer.model" not in sidecars:
        return {}
    from sentencepiece import SentencePieceProcessor

    try:
        tokens = SentencePieceProcessor(model_file=str(sidecars["tokenizer.model"]))
    except RuntimeError:
        raise ConfigError(
            f"{sidecars['tokenizer.model']} is no SentencePiece model (LLaMA 3's is not); name the "
            "tokenizer of a Hugging Face folder with --tokenizer-model"
        ) from None
    special = {"bos": tokens.bos_id(), "eos": tokens.eos_id(), "unk": tokens.unk_id()}
    return {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": False,  # as tools/preprocess_data.py
        "add_prefix_space": tokens.encode("a", out_type=str)[0].startswith("\u2581"),
        **{f"{name}_token": tokens.id_to_piece(i) for name, i in special.items() if i >= 0},
    }


def _special_tokens(folder: Path, sidecars: Mapping[str, Path]) -> dict:
    """Their ids: those of the source's config.json, else the tokenizer's."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    if "config.json" in sidecars:
        source = read_json(sidecars["config.json"])
        return {name: source[name] for name in names if name in source}
    if not (folder / "tokenizer_config.json").is_file():
        return dict.fromkeys(names)  # transformers would fill in 1 and 2
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return {name: getattr(tokenizer, name) for name in names}
