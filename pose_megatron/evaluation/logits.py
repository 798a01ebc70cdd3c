"""A checkpoint's logits, computed in one process."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pose_megatron.checkpoints.megatron.directory import Checkpoint
from pose_megatron.evaluation.stage import load_stage
from pose_megatron.models.gpt import PoseModel
from pose_megatron.models.shape import ModelConfig


def logits_function(stage: PoseModel, vocab_size: int) -> Callable[..., Tensor]:
    """`logits(tokens [b, s], last, position_ids [b, s]) -> float32 [b, last, vocab_size]`.

    Positions are 0 to s - 1 when not given. Only the last tokens' hidden states go through the
    output layer, so memory stays small at long contexts. Where frequencies depend on the length,
    it is the largest position plus 1, as in transformers.

    Args:
        stage: the whole model (one pipeline stage, one tensor-parallel rank).
        vocab_size: columns beyond it, which pad the vocabulary, are left out.
    """
    rotary = stage.rotary_pos_emb

    @torch.no_grad()
    def logits(tokens: Tensor, last: int, position_ids: Tensor | None = None) -> Tensor:
        if position_ids is None:
            position_ids = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
        if rotary.scaling.depends_on_length:
            rotary.set_length(int(position_ids.max()) + 1)
        hook = stage.output_layer.register_forward_pre_hook(
            lambda _, args: (args[0][-last:], *args[1:])  # hidden states are [s, b, h]
        )
        try:
            return stage(tokens, position_ids, None)[..., :vocab_size].float()
        finally:
            hook.remove()

    return logits


def load_logits(
    found: Checkpoint,
    model: ModelConfig | None = None,
    rounded_to: Mapping[str, torch.dtype] | None = None,
) -> Callable[..., Tensor]:
    """`logits_function` of a checkpoint, in float32; arguments as in load_stage."""
    stage = load_stage(found, model, rounded_to=rounded_to)
    return logits_function(stage, (model or found.model).vocab_size)
