"""This rank's stage of a checkpoint's model, ready to compute with."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from megatron.core import parallel_state

from pose_megatron.checkpoints.megatron.directory import Checkpoint
from pose_megatron.models.build import build_model, transformer_config
from pose_megatron.models.gpt import PoseModel
from pose_megatron.models.shape import ModelConfig
from pose_megatron.runtime import distributed
from pose_megatron.training import checkpointing


def meet(**layout: Any) -> None:
    """Joins the ranks of the job, where the program has not yet."""
    if not parallel_state.model_parallel_is_initialized():
        distributed.initialize(**layout)


def load_stage(
    found: Checkpoint,
    model: ModelConfig | None = None,
    bf16: bool = False,
    rounded_to: Mapping[str, torch.dtype] | None = None,
    **layout: Any,
) -> PoseModel:
    """The stage, in evaluation mode, in float32 or bfloat16.

    Args:
        model: shape and rope to use in place of the checkpoint's own.
        rounded_to: precisions by the names of Megatron's tensors; the weights are rounded to them
            first, and computed with in the other.
        layout: tensor_, pipeline_model_parallel_size and context_parallel_size; one rank without.
    """
    model = model or found.model
    meet(**layout)
    stage = build_model(transformer_config(model, bf16=bf16, **layout), model)
    checkpointing.load(found, [stage])
    if rounded_to is not None:
        round_to(rounded_to, stage)
    return stage.eval()


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
