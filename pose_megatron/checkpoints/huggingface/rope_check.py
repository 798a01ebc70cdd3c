"""The rope that transformers makes of a config.json, held to the one that Megatron trains with."""

from pathlib import Path

import torch

from pose_megatron.errors import ConfigError
from pose_megatron.models.shape import ModelConfig
from pose_megatron.rope.scaling import RopeScaling, attention_factor, inverse_frequencies


def rope_errors(folder: Path, model: ModelConfig) -> dict[str, float]:
    """How far the rope that transformers makes of config.json is from the one Megatron trains with.

    Returns:
        Relative errors of `inv_freq` (the largest) and `attention_factor`, both within `bounds`.

    Raises:
        ConfigError: transformers refuses config.json, or reads another rope from it.
    """
    if model.family == "baichuan":  # transformers has no class of it
        return {}
    from transformers import AutoConfig

    if model.is_gptj:
        plain = inverse_frequencies(model.rotary_dim, model.rotary_base, model.rope_scaling)
        return _gptj_rope_errors(folder, plain)
    scaling, errors = model.rope_scaling, {"inv_freq": 0.0, "attention_factor": 0.0}
    factor = attention_factor(scaling)
    window = scaling.original_max_position_embeddings
    lengths = {1, model.max_position_embeddings}
    if scaling.depends_on_length:  # transformers chooses by the largest position
        lengths |= {window, window + 1, 4 * window}
    try:
        config = AutoConfig.from_pretrained(folder)
        ropes = {length: _rope_of(config, length) for length in sorted(lengths)}
    except Exception as error:  # of many classes, for what it finds wrong in the file
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


def _rope_of(config, length: int) -> tuple[torch.Tensor, float]:
    """Inverse frequencies and attention factor for sequences of `length`, by the functions that
    transformers' rotary module calls: to import the module itself takes seconds."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = config.rope_parameters
    if rope["rope_type"] != "default":
        return ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu", seq_len=length)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 1.0 / rope["rope_theta"] ** (torch.arange(0, width, 2).float() / width), 1.0


def _gptj_rope_errors(folder: Path, ours: torch.Tensor) -> dict[str, float]:
    """GPT-J's table at position 1 is the sine and cosine of its inverse frequencies."""
    from transformers import AutoConfig
    from transformers.models.gptj.modeling_gptj import create_sinusoidal_positions

    config = AutoConfig.from_pretrained(folder)
    sine, cosine = create_sinusoidal_positions(2, config.rotary_dim)[1].double().chunk(2)
    theirs = torch.atan2(sine, cosine)
    same = theirs.shape == ours.shape
    errors = {"inv_freq": ((theirs - ours).abs() / ours).max().item() if same else float("inf")}
    if not errors["inv_freq"] <= 1e-6:
        raise ConfigError(f"{folder}: transformers reads another rope from config.json; {errors}")
    return errors
