"""Compares the rope that transformers reads from config.json with the one that Megatron trains."""

from pathlib import Path

import torch
from torch import Tensor

from pose_megatron.errors import ConfigError
from pose_megatron.models.families import family_named
from pose_megatron.models.shape import ModelConfig
from pose_megatron.rope.interpolation import Pairs
from pose_megatron.rope.scaling import attention_factor, inverse_frequencies
from pose_megatron.runtime.json_files import naming


def rope_errors(folder: Path, model: ModelConfig) -> dict[str, float]:
    """How far the rope that transformers reads from config.json is from the model's.

    Returns:
        Relative errors of `inv_freq` (the largest) and `attention_factor`, both within `bounds`;
        empty where transformers has no class for the family.

    Raises:
        ConfigError: transformers refuses config.json, or reads another rope from it.
    """
    family = family_named(model.family)
    if not family.in_transformers:
        return {}
    from transformers import AutoConfig

    scaling = model.rope_scaling
    window = scaling.original_max_position_embeddings
    lengths = {1, model.max_position_embeddings}
    if scaling.depends_on_length and window is not None:
        lengths |= {window, window + 1, 4 * window}  # transformers chooses by the largest position
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        ropes = {length: family.transformers_rope(config, length) for length in sorted(lengths)}
    except Exception as error:  # transformers raises many classes for a config.json it refuses
        reason = " ".join(str(error).split())
        raise ConfigError(f"{folder}: transformers refuses config.json: {reason}") from error
    errors = {"inv_freq": 0.0, "attention_factor": 0.0}
    with naming(folder):
        for length, rope in ropes.items():
            found = compare(model, *rope, length)
            errors = {name: max(error, found[name]) for name, error in errors.items()}
    return errors


def compare(
    model: ModelConfig, inv_freq: Tensor, factor: float, length: int | None
) -> dict[str, float]:
    """Relative errors of a rope of transformers: of `inv_freq` (the largest) and
    `attention_factor`.

    Args:
        length: what a scaling that depends on it is compared at.

    Raises:
        ConfigError: it is another rope than the model's.
    """
    scaling = model.rope_scaling
    ours = inverse_frequencies(
        model.rotary_dim,
        model.rotary_base,
        scaling,
        length if scaling.depends_on_length else None,
    )
    if inv_freq.shape != ours.shape:
        raise ConfigError(
            f"transformers reads a rope of {len(inv_freq)} frequencies, where {scaling} has "
            f"{len(ours)}"
        )
    own_factor = attention_factor(scaling)
    errors = {
        "inv_freq": (inv_freq.double().cpu() - ours).abs() / ours,
        "attention_factor": torch.tensor(abs(factor - own_factor) / own_factor),
    }
    for name, limit in bounds(model).items():
        if not (errors[name] <= limit).all():
            raise ConfigError(
                f"transformers reads another rope than {scaling}: {name} is off by "
                f"{errors[name].max().item():.1e} of itself, more than its float32 explains"
            )
    return {name: error.max().item() for name, error in errors.items()}


def bounds(model: ModelConfig) -> dict[str, Tensor]:
    """The largest relative errors that transformers' float32 explains, of `inv_freq` for each pair.

    1e-6 covers eight roundings (6e-8 each) and that of the exponent in b^(2i/d), which becomes
    2^-25 ln b (5e-7 for b = 10^7); the method adds its own. A scaling over another is written as
    lists, which add nothing.
    """
    scaling, pairs = model.rope_scaling, Pairs.unscaled(model.rotary_dim, model.rotary_base)
    inv_freq = torch.full_like(pairs.frequencies, 1e-6)
    if scaling.over is None:
        inv_freq += scaling.interpolation.float32_error(pairs)
    return {"inv_freq": inv_freq, "attention_factor": torch.tensor(1e-6)}
