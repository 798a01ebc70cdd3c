"""A model in a Hugging Face folder, read and written without transformers' model classes.

    config.json          <-> ModelConfig, in the spelling of its family (models/families)
    tokenizer.*, ...     sidecars.py's, which are copied
    model*.safetensors   weights: shards.py

rope_check.py compares the rope that transformers reads from config.json.
"""

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pose_megatron.errors import ConfigError
from pose_megatron.models.families import FAMILIES, REFUSED, family_named
from pose_megatron.models.families.family import Family
from pose_megatron.models.shape import ModelConfig, check_number
from pose_megatron.rope.huggingface import from_hf, rotary_percent, to_hf
from pose_megatron.runtime.json_files import naming, read_json, write_json


def read_config(folder: Path, make_vocab_size_divisible_by: int = 128) -> ModelConfig:
    """The model that a folder's config.json describes.

    Raises:
        ConfigError: it is missing or broken, or it describes a model that no family in FAMILIES is.
    """
    config = read_json(folder / "config.json")
    with naming(folder):
        family = _family_of(config)
        config = {**family.defaults, **_respelled(family, config)}
        _check_only(family, config)
        config = {name: value for name, value in config.items() if value is not None}
        sizes = _read_sizes(family, config)
        base, scaling = from_hf(config)
        if rotary_percent(config) != 1:
            raise ConfigError(
                "config.json: a rotary share other than 1 is not supported for "
                f"{family.architecture}"
            )
        percent = 1.0
        if family.rotary_dim_key:
            percent = _percent(_whole(config, family.rotary_dim_key), sizes["kv_channels"])
        normalizes = family.normalizes_key is None or _flag(config, family.normalizes_key)
        return ModelConfig(
            num_layers=sizes["num_layers"],
            hidden_size=sizes["hidden_size"],
            ffn_hidden_size=sizes["ffn_hidden_size"],
            num_attention_heads=sizes["num_attention_heads"],
            num_query_groups=sizes["num_query_groups"],
            kv_channels=sizes["kv_channels"],
            vocab_size=sizes["vocab_size"],
            max_position_embeddings=sizes["max_position_embeddings"],
            make_vocab_size_divisible_by=make_vocab_size_divisible_by,
            untie_embeddings_and_output_weights=not _flag(config, "tie_word_embeddings"),
            norm_epsilon=_number(config, *family.epsilon),
            rotary_base=base,
            rotary_percent=percent,
            rope_scaling=scaling,
            family=family.name,
            add_qkv_bias=family.add_qkv_bias,
            qk_layernorm=family.qk_layernorm,
            num_experts=sizes.get("num_experts"),
            moe_ffn_hidden_size=sizes.get("moe_ffn_hidden_size"),
            moe_router_topk=sizes.get("moe_router_topk"),
            moe_router_pre_softmax=not normalizes,
        )


def _family_of(config: Mapping[str, Any]) -> Family:
    architecture, kind = next(iter(_words(config, "architectures")), None), config.get("model_type")
    by_architecture = {family.architecture: family for family in FAMILIES.values()}
    if architecture not in by_architecture:
        of_kind = f" of model_type {kind}" if architecture is None else ""
        reason = f": {REFUSED[str(kind)]}" if str(kind) in REFUSED else ""
        raise ConfigError(
            f"config.json: architecture {architecture}{of_kind} is not supported{reason}; "
            f"supported are {', '.join(by_architecture)}"
        )
    family = by_architecture[architecture]
    if kind not in (None, family.model_type):
        raise ConfigError(
            f"config.json contradicts itself: architectures says {architecture}, and model_type "
            f"{kind!r}, by which transformers chooses the class, is not its {family.model_type!r}: "
            "correct the wrong one"
        )
    return family


def _respelled(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json under the names of `family.sizes`."""
    result = dict(config)
    for other, name in family.spellings.items():
        value = result.pop(other, None)
        if value is not None and result.setdefault(name, value) != value:
            raise ConfigError(
                f"config.json contradicts itself: {name} is {result[name]!r}, {other} {value!r}"
            )
    return result


def _check_only(family: Family, config: Mapping[str, Any]) -> None:
    """Refuses values that our layers do not compute."""
    for name, only in {**family.only, "quantization_config": None}.items():
        if (value := config.get(name, only)) != only:
            raise ConfigError(f"config.json: {name} {value!r} is not supported, only {only!r} is")
    if other := set(_words(config, "layer_types")) - {"full_attention"}:
        raise ConfigError(f"config.json: layer_types {min(other)!r} is not supported")


def _read_sizes(family: Family, config: Mapping[str, Any]) -> dict[str, int]:
    """The sizes in config.json, or the family's defaults, by ModelConfig's names."""
    keys = {ours: theirs for theirs, ours in family.sizes.items()}
    heads, hidden = _whole(config, keys["num_attention_heads"]), _whole(config, keys["hidden_size"])
    sizes = family.default_sizes(hidden, heads)
    for ours, theirs in keys.items():
        if theirs in config or ours not in sizes:
            sizes[ours] = _whole(config, theirs)
    if family.has_experts:  # a width that no layer has
        sizes.setdefault("ffn_hidden_size", sizes["moe_ffn_hidden_size"])
    return sizes


def _whole(config: Mapping[str, Any], name: str) -> int:
    if (value := config.get(name)) is None:
        raise ConfigError(f"config.json does not say {name}: write it there")
    if type(value) is not int:
        raise ConfigError(f"config.json: {name} must be a whole number, not {value!r}")
    return value


def _number(config: Mapping[str, Any], name: str, default: float) -> float:
    check_number(f"config.json: {name}", value := config.get(name, default))
    return float(value)


def _flag(config: Mapping[str, Any], name: str) -> bool:
    if type(value := config.get(name, False)) is not bool:
        raise ConfigError(f"config.json: {name} must be true or false, not {value!r}")
    return value


def _words(config: Mapping[str, Any], name: str) -> list[str]:
    value = config.get(name) or []
    if not (isinstance(value, list) and all(isinstance(word, str) for word in value)):
        raise ConfigError(f"config.json: {name} must be a list of names, not {value!r}")
    return value


def _percent(rotary_dim: int, kv_channels: int) -> float:
    """The rotary_percent from which ModelConfig computes exactly rotary_dim again."""
    percent = rotary_dim / kv_channels
    return percent if int(kv_channels * percent) == rotary_dim else math.nextafter(percent, 1)


def sizes(model: ModelConfig) -> dict:
    """The arguments of checkpoints.mapping.param_mappings for this model.

    Raises:
        ConfigError: Hugging Face has no such model.
    """
    _family(model)
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
        "num_experts",
        "moe_ffn_hidden_size",
    )
    tied = not model.untie_embeddings_and_output_weights
    return {name: getattr(model, name) for name in names} | {"tied": tied}


def _family(model: ModelConfig) -> Family:
    if model.family is None:
        raise ConfigError("no Hugging Face family has both --add-qkv-bias and --qk-layernorm")
    return family_named(model.family)


def _with_its_code(auto_map: Any, sidecars: Mapping[str, Path]) -> dict[str, Any]:
    """The key auto_map if the files that it names are copied along: transformers refuses to load a
    folder where one is missing. Nothing here runs them."""
    classes = auto_map.values() if isinstance(auto_map, dict) else ()
    names = [name for value in classes for name in (value if isinstance(value, list) else [value])]
    modules = {str(name).rpartition(".")[0] for name in names if name is not None}
    here = {f"{module}.py" for module in modules if "--" not in module}  # "repository--module"
    return {"auto_map": auto_map} if modules and here <= sidecars.keys() else {}


def write_config(
    folder: Path,
    model: ModelConfig,
    dtype: torch.dtype,
    sidecars: Mapping[str, Path],
    rope_as_longrope: bool = False,
) -> None:
    """Writes everything in a Hugging Face folder except the weights.

    tokenizer_config.json states the model's window, and is written also where the tokenizer has
    none. A generation config whose max_length was the old window gets the new one.

    Args:
        dtype: of the weights.
        sidecars: files to copy, as from `sidecars.find_sidecars`.
        rope_as_longrope: write yarn as longrope, which states the same frequencies in full.

    Raises:
        ConfigError: the family's config.json cannot describe the model.
    """
    family = _family(model)
    if model.rotary_dim != model.kv_channels and family.rotary_dim_key is None:
        raise ConfigError(
            f"--rotary-percent {model.rotary_percent} has no Hugging Face form: LLaMA rotates "
            "whole heads"
        )
    for name in sidecars.keys() - {"config.json"}:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(sidecars[name], folder / name)
    window = model.max_position_embeddings
    if tokenizer := _tokenizer_config(sidecars):
        write_json(folder / "tokenizer_config.json", tokenizer | {"model_max_length": window})
    if {"config.json", "generation_config.json"} <= sidecars.keys():
        before = read_json(sidecars["config.json"]).get("max_position_embeddings")
        generation = read_json(sidecars["generation_config.json"])
        if before is not None and generation.get("max_length") == before:
            write_json(folder / "generation_config.json", generation | {"max_length": window})
    config = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **{theirs: getattr(model, ours) for theirs, ours in family.sizes.items()},
        **family.only,
        family.epsilon[0]: model.norm_epsilon,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "use_cache": True,
        # transformers 4 and vLLM read the first, transformers 5 the second.
        **dict.fromkeys(("torch_dtype", "dtype"), str(dtype).removeprefix("torch.")),
        **_special_tokens(folder, sidecars),
        **_carried(family, sidecars),
    }
    if family.normalizes_key:
        config[family.normalizes_key] = not model.moe_router_pre_softmax
    rope = to_hf(
        model.rope_scaling,
        base=model.rotary_base,
        rotary_dim=model.rotary_dim,
        max_position_embeddings=window,
        as_longrope=rope_as_longrope,
    )
    if not family.reads_rope:
        if (rope["rope_theta"], rope["rope_scaling"]) != (10000.0, None):
            raise ConfigError(
                f"--rope-scaling {model.rope_scaling.method} with base {rope['rope_theta']:g} has "
                f"no Hugging Face form: the code of {family.architecture} reads no rope from its "
                "config.json; train this family with --rope-scaling none"
                + " or export it with --as-llama"
                * family.exports_as_llama
            )
        rope = {}
    if family.rotary_dim_key:
        rope[family.rotary_dim_key] = model.rotary_dim
    write_json(folder / "config.json", config | rope)


def _tokenizer_config(sidecars: Mapping[str, Path]) -> dict:
    if "tokenizer_config.json" in sidecars:
        config = read_json(sidecars["tokenizer_config.json"])
        if config.get("tokenizer_class") == "TokenizersBackend":  # which transformers 4 lacks
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
        return config | _with_its_code(config.pop("auto_map", None), sidecars)
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


def _carried(family: Family, sidecars: Mapping[str, Path]) -> dict:
    """What the source's config.json says of `family.carried`."""
    if not family.carried or "config.json" not in sidecars:
        return {}
    source = read_json(sidecars["config.json"])
    carried = {name: source[name] for name in family.carried if name in source}
    return carried | _with_its_code(carried.pop("auto_map", None), sidecars)


def _special_tokens(folder: Path, sidecars: Mapping[str, Path]) -> dict:
    """Ids of the special tokens, from the source's config.json, else from the tokenizer."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    if "config.json" in sidecars:
        source = read_json(sidecars["config.json"])
        return {name: source[name] for name in names if name in source}
    if not (folder / "tokenizer_config.json").is_file():
        return dict.fromkeys(names)  # transformers would fill in 1 and 2
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    return {name: getattr(tokenizer, name) for name in names}
