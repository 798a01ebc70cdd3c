"""A checkpoint's logits, computed in one process."""

from collections import Counter
from collections.abc import Callable, Mapping

import torch
from megatron.core import parallel_state
from torch import Tensor

from pose_megatron.checkpoints.megatron.directory import Checkpoint
from pose_megatron.models.build import build_model, transformer_config
from pose_megatron.models.gpt import PoseModel
from pose_megatron.models.shape import ModelConfig
from pose_megatron.runtime import distributed
from pose_megatron.training import checkpointing


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
    bf16: bool = False,
    rounded_to: Mapping[str, torch.dtype] | None = None,
) -> Callable[..., Tensor]:
    """`logits_function` of a checkpoint, in float32 or bfloat16.

    Args:
        model: shape and rope to use in place of the checkpoint's own.
        rounded_to: precisions by the names of Megatron's tensors; the weights are rounded to them
            first, and computed with in the other.
    """
    model = model or found.model
    if not parallel_state.model_parallel_is_initialized():
        distributed.initialize()
    stage = build_model(transformer_config(model, bf16=bf16), model)
    checkpointing.load(found, [stage])
    if rounded_to is not None:
        round_to(rounded_to, stage)
    return logits_function(stage.eval(), model.vocab_size)


@torch.no_grad()
def round_to(dtypes: Mapping[str, torch.dtype], model: torch.nn.Module) -> None:
    """Rounds the weights to the values they would have in these precisions; keeps their own dtype.

    Args:
        dtypes: by the parameters' names. What is not among them is rounded as most of them are:
            libraries keep the experts of a layer in one parameter.
    """
    ((most, _),) = Counter(dtypes.values()).most_common(1)
    for name, parameter in model.named_parameters():
        parameter.copy_(parameter.to(dtypes.get(name, most)))
