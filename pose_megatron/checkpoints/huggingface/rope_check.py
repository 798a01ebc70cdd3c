"""Compares the rope that transformers reads from config.json with the one that Megatron trains."""

from pathlib import Path

from pose_megatron.errors import ConfigError
from pose_megatron.models.families import family_named
from pose_megatron.models.shape import ModelConfig
from pose_megatron.rope.scaling import RopeScaling, attention_factor, inverse_frequencies


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

    scaling, errors = model.rope_scaling, {"inv_freq": 0.0, "attention_factor": 0.0}
    factor = attention_factor(scaling)
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
    for length, (theirs, their_factor) in ropes.items():
        ours = inverse_frequencies(
            model.rotary_dim,
            model.rotary_base,
            scaling,
            length if scaling.depends_on_length else None,
        )
        theirs = theirs.double()
        same = theirs.shape == ours.shape
        wrong = ((theirs - ours).abs() / ours).max().item() if same else float("inf")
        errors["inv_freq"] = max(errors["inv_freq"], wrong)
        wrong = abs(their_factor - factor) / factor
        errors["attention_factor"] = max(errors["attention_factor"], wrong)
    if not all(errors[name] <= limit for name, limit in bounds(scaling).items()):
        raise ConfigError(
            f"{folder}: transformers reads another rope from config.json than "
            f"{scaling}; relative errors {errors}"
        )
    return errors


def bounds(scaling: RopeScaling) -> dict[str, float]:
    """The largest relative errors that transformers' float32 explains.

    1e-6 covers eight roundings (6e-8 each) and that of the exponent in b^(2i/d), which becomes
    2^-25 ln b (5e-7 for b = 10^7); the method adds its own. A scaling over another is written as
    lists, which add nothing.
    """
    added = scaling.interpolation.float32_error if scaling.over is None else 0.0
    return {"inv_freq": 1e-6 + added, "attention_factor": 1e-6}
