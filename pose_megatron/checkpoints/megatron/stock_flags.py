"""The flags that stock Megatron-LM needs with one of our checkpoints.

Its `--use-checkpoint-args` (load_args_from_checkpoint, megatron/training/checkpointing.py, read in
core_v0.16.1 to core_v0.19.0) takes the sizes, the rotary base and the experts from a checkpoint,
and neither the norms' epsilon, nor --qk-layernorm, nor any rope scaling. Of the scalings, its
pretrain_gpt.py passes on --use-rope-scaling, but no --rope-scaling-factor, so that it is always 8;
and --rotary-seq-len-interpolation-factor, a whole number, from 0.19 on.
"""

from pose_megatron.checkpoints.megatron.args import to_args
from pose_megatron.models.families import family_named
from pose_megatron.models.shape import ModelConfig

_EPSILON = 1e-5  # its defaults
_LLAMA3_FACTOR = 8.0
_OURS = "train with pretrain_pose.py, or with the plugin pose_megatron.megatron"


def notes(model: ModelConfig) -> list[str]:
    """What a user of stock Megatron-LM must know about a checkpoint of this model, in sentences;
    none where --use-checkpoint-args suffices."""
    family = family_named(model.family)
    if not family.in_megatron_lm:
        return [f"stock Megatron-LM does not compute {family.title}: {_OURS}"]
    rope, expressible = _rope_flags(model)
    said = []
    if flags := _layer_flags(model) + (rope if expressible else []):
        said.append(
            "stock Megatron-LM needs, beside --use-checkpoint-args, which does not set them: "
            + " ".join(flags)
        )
    if not expressible:
        scaling = model.rope_scaling
        said.append(
            f"stock Megatron-LM has no flags for this model's {scaling.method} scaling by "
            f"{scaling.factor:g}, and takes its rope for a plain one: {_OURS}"
        )
    elif "--rotary-seq-len-interpolation-factor" in rope:
        said.append(
            "pretrain_gpt.py of Megatron-LM before 0.19 ignores "
            f"--rotary-seq-len-interpolation-factor: {_OURS}"
        )
    return said


def _layer_flags(model: ModelConfig) -> list[str]:
    flags = []
    if model.norm_epsilon != _EPSILON:
        flags += ["--norm-epsilon", f"{model.norm_epsilon:g}"]
    if family_named(model.family).qk_layernorm:
        flags += ["--qk-layernorm"]
    return flags


def _rope_flags(model: ModelConfig) -> tuple[list[str], bool]:
    """Flags that give the model's rope, and whether any would."""
    scaling, args = model.rope_scaling, to_args(model, 0, 0)
    if args.use_rope_scaling:
        return ["--use-rope-scaling"], args.rope_scaling_factor == _LLAMA3_FACTOR
    if linear := args.rotary_seq_len_interpolation_factor:
        return ["--rotary-seq-len-interpolation-factor", f"{linear:g}"], linear == int(linear)
    another_base = scaling.method == "ntk" and scaling.over is None
    return [], scaling.method == "none" or another_base
