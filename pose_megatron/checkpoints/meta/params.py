"""params.json: the sizes and the rope of a LLaMA in Meta's own format."""

import json
import math
from pathlib import Path

import torch

from pose_megatron.checkpoints.stored_weights import StoredWeights
from pose_megatron.errors import ConfigError, DamagedCheckpoint
from pose_megatron.models.families import family_named
from pose_megatron.models.shape import MOST_LAYERS, ModelConfig, check_number, check_size
from pose_megatron.rope.huggingface import from_hf, to_hf
from pose_megatron.runtime.json_files import naming, read_json

# Windows that params.json leaves unsaid, by (rope_theta, norm_eps).
_WINDOWS = {(1e4, 1e-6): 2048, (1e4, 1e-5): 4096, (1e6, 1e-5): 16384, (5e5, 1e-5): 8192}
_OF_SCALED = {"rope_scaling_factor", "rope_high_freq_factor"}
_SIZES = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim")
_NUMBERS = _OF_SCALED | {"norm_eps", "rope_theta"}
_KNOWN = {
    *_SIZES,
    *_NUMBERS,
    *("vocab_size", "multiple_of", "ffn_dim_multiplier", "use_scaled_rope"),
    *("max_seq_len", "max_batch_size"),  # of the program that runs it
}
_SCALED = {  # what `use_scaled_rope` means in Meta's code
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def read_params(folder: Path) -> dict:
    """params.json, its sizes and epsilon checked.

    Raises:
        DamagedCheckpoint: it is missing or no JSON object.
        ConfigError: it is not that of a LLaMA.
    """
    path = folder / "params.json"
    said = read_json(path, DamagedCheckpoint)
    params = {name: value for name, value in said.items() if value is not None}
    for name in ("dim", "n_layers", "n_heads", "norm_eps"):
        if name not in params:
            raise ConfigError(f"{path} is not the params.json of a LLaMA: it has no {name}")
    with naming(path):
        for name in _SIZES:
            if name in params:
                check_size(name, params[name])
        for name in _NUMBERS & params.keys():
            check_number(name, params[name], math.ulp(0.0), "a positive number")
        if not isinstance(params.get("use_scaled_rope", False), bool):
            raise ConfigError(f"use_scaled_rope {params['use_scaled_rope']!r} is not true or false")
        if params["n_layers"] > MOST_LAYERS:  # tensors are looked up layer by layer
            raise ConfigError(f"n_layers {params['n_layers']} is more than {MOST_LAYERS:,}")
        if params["dim"] % params["n_heads"]:
            raise ConfigError(f"n_heads {params['n_heads']} does not divide dim {params['dim']}")
    for name, value in params.items():
        if name not in _KNOWN and value is not False:
            raise ConfigError(
                f"{path}: {name} {value!r} is not supported, and may change what the model "
                "computes: convert such a model from its Hugging Face folder"
            )
    if not params.get("use_scaled_rope") and (ropes := params.keys() & _OF_SCALED):
        raise ConfigError(
            f"{path}: {min(ropes)} {params[min(ropes)]!r} has no meaning without use_scaled_rope"
        )
    heads = params.get("head_dim")
    if heads is not None and heads * params["n_heads"] != params["dim"]:
        raise ConfigError(
            f"{path}: head_dim {heads} with n_heads {params['n_heads']} does not give dim "
            f"{params['dim']}, which is all that is supported"
        )
    return params


def read_config(
    folder: Path,
    weights: StoredWeights,
    window: int | None = None,
    make_vocab_size_divisible_by: int = 128,
) -> ModelConfig:
    """The model of a folder.

    Args:
        weights: the folder's, for the sizes that params.json leaves out.
        window: max_position_embeddings, which params.json leaves out; None for the window of the
            published model with this rope.

    Raises:
        ConfigError: params.json says too little, or describes a model that is no LLaMA.
    """
    params, where = read_params(folder), folder / "params.json"
    base, epsilon = float(params.get("rope_theta", 1e4)), float(params["norm_eps"])
    scaled = params.get("use_scaled_rope", False)
    if window is None:
        window = guessed_window(params)
        if window is not None:
            weights.warnings.append(
                f"{where} does not say the window of the model: taken for {window}, as of the "
                "published model with this rope; another (LLaMA 1 has 2048, LLaMA 2 4096) is said "
                "with --max-position-embeddings"
            )
    if window is None:
        raise ConfigError(
            f"{where} does not say the window of the model: give --max-position-embeddings"
        )
    rope: dict = {"rope_theta": base}
    if scaled:
        factor = float(params.get("rope_scaling_factor", _SCALED["factor"]))
        high = float(params.get("rope_high_freq_factor", _SCALED["high_freq_factor"]))
        rope["rope_scaling"] = _SCALED | {"factor": factor, "high_freq_factor": high}
    base, scaling = from_hf(rope)
    heads, width = params["n_heads"], params["dim"]
    ffn = weights.shapes["model.layers.0.mlp.up_proj.weight"][0]
    if params.get("hidden_dim") not in (None, ffn):
        raise ConfigError(f"{where}: hidden_dim {params['hidden_dim']} is {ffn} in the weights")
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    rows = weights.shapes[embedding][0]
    if params.get("vocab_size") not in (None, -1, rows):  # -1 in LLaMA 1 and 2: the tokenizer's
        raise ConfigError(f"{where}: vocab_size {params['vocab_size']} is {rows} in the weights")
    tied = weights.shapes[embedding] == weights.shapes[head] and torch.equal(
        weights[embedding], weights[head]
    )
    return ModelConfig(
        num_layers=params["n_layers"],
        hidden_size=width,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=params.get("n_kv_heads") or heads,
        kv_channels=width // heads,
        vocab_size=rows,
        max_position_embeddings=window,
        make_vocab_size_divisible_by=make_vocab_size_divisible_by,
        untie_embeddings_and_output_weights=not tied,
        norm_epsilon=epsilon,
        rotary_base=base,
        rope_scaling=scaling,
    )


def guessed_window(params: dict) -> int | None:
    """The window of the published model with these parameters, which do not say it."""
    if params.get("use_scaled_rope"):
        return 131072
    kind = float(params.get("rope_theta", 1e4)), float(params["norm_eps"])
    # LLaMA 65B, the only one of LLaMA 1 with LLaMA 2's epsilon; LLaMA 2's widest has n_kv_heads.
    if kind == (1e4, 1e-5) and params["dim"] == 8192 and params.get("n_kv_heads") in (None, 64):
        return 2048
    return _WINDOWS.get(kind)


def write_params(folder: Path, model: ModelConfig, ranks: int) -> None:
    """Writes params.json.

    Raises:
        ConfigError: Meta's code has no such model, rope or number of ranks.
    """
    plain_llama = family_named(model.family).in_meta_format and model.rotary_percent == 1.0
    if not plain_llama or model.kv_channels * model.num_attention_heads != model.hidden_size:
        raise ConfigError(
            f"Meta's format has LLaMA only, not {model.family} with heads of "
            f"{model.kv_channels} of {model.hidden_size} channels"
        )
    for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size", "vocab_size"):
        if getattr(model, name) % ranks:
            raise ConfigError(
                f"--target-tensor-parallel-size {ranks} does not divide {name} "
                f"{getattr(model, name)}"
            )
    rope = to_hf(
        model.rope_scaling,
        base=model.rotary_base,
        rotary_dim=model.rotary_dim,
        max_position_embeddings=model.max_position_embeddings,
    )
    scaled = rope["rope_scaling"] or {}
    factor, high = scaled.get("factor"), scaled.get("high_freq_factor")
    if scaled and {k: scaled.get(k) for k in _SCALED} != _SCALED | {
        "factor": factor,
        "high_freq_factor": high,
    }:
        raise ConfigError(
            f"--rope-scaling {model.rope_scaling.method} cannot be said in Meta's "
            "format; save as hf"
        )
    multiple, multiplier = ffn_parameters(model.hidden_size, model.ffn_hidden_size)
    params = {
        "dim": model.hidden_size,
        "n_layers": model.num_layers,
        "n_heads": model.num_attention_heads,
        "n_kv_heads": model.num_query_groups,
        "vocab_size": model.vocab_size,
        "multiple_of": multiple,
        **({"ffn_dim_multiplier": multiplier} if multiplier else {}),
        "norm_eps": model.norm_epsilon,
        "rope_theta": rope["rope_theta"],
    }
    if scaled:
        params |= {
            "use_scaled_rope": True,
            "rope_scaling_factor": factor,
            "rope_high_freq_factor": high,
        }
    (folder / "params.json").write_text(json.dumps(params) + "\n", encoding="utf-8")


def ffn_hidden_size(width: int, multiple: int, multiplier: float | None) -> int:
    """The MLP's width as Meta's code computes it from params.json."""
    hidden = int(2 * 4 * width / 3)
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return multiple * math.ceil(hidden / multiple)


def ffn_parameters(width: int, ffn: int) -> tuple[int, float | None]:
    """(multiple_of, ffn_dim_multiplier) from which Meta's code computes a width of `ffn`."""
    for multiple in (256, 1024, 4096):
        if ffn_hidden_size(width, multiple, None) == ffn:
            return multiple, None
    multiple = math.gcd(ffn, 4096)
    multiplier = ffn / int(2 * 4 * width / 3)
    while ffn_hidden_size(width, multiple, multiplier) < ffn:
        multiplier = math.nextafter(multiplier, math.inf)
    while ffn_hidden_size(width, multiple, multiplier) > ffn:
        multiplier = math.nextafter(multiplier, 0)
    return multiple, multiplier
