"""The forward step that pretrain() calls for every micro-batch."""

from functools import partial

import torch
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_args, get_timers

from pose_megatron.megatron.batch import get_batch

SPIKE_FACTOR = 10  # of the largest loss seen, as in Megatron-LM


def forward_step(data_iterator, model, return_schedule_plan: bool = False):
    """The forward pass of one micro-batch.

    Args:
        return_schedule_plan: for the overlapped 1F1B schedule of experts, which runs it later.

    Returns:
        (this pipeline stage's output, the loss function to apply to the last stage's).
    """
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    timers("batch-generator").stop()
    forward = model.build_schedule_plan if return_schedule_plan else model
    mask = batch["loss_mask"]
    # No attention mask: causal by token index is what the kernels do without one.
    output = forward(
        batch["tokens"],
        batch["position_ids"],
        None,
        labels=batch["labels"],
        loss_mask=None if mask is None else mask.float(),
    )
    return output, partial(loss_func, mask)


def loss_func(
    loss_mask: torch.Tensor | None, losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of one micro-batch, on the last pipeline stage.

    Args:
        loss_mask: [b, L / cp], 1 for tokens that count.
        losses: [b, L / cp], nats.

    Returns:
        (loss sum, tokens, {"lm loss": both, in float32}).
    """
    assert loss_mask is not None, "only middle pipeline stages have no mask"
    args, rerun = get_args(), get_rerun_state_machine()
    mask = loss_mask.float()
    loss = (losses.float() * mask).sum()
    tokens = mask.sum()
    if args.check_for_nan_in_loss_and_grad:
        for rejected in (torch.isnan, torch.isinf):
            rerun.validate_result(
                result=loss,
                rejection_func=rejected,
                message=f"{rejected.__name__} in the loss of a micro-batch",
                tolerance=0.0,  # forward passes are deterministic
                fatal=True,
            )
    if args.check_for_spiky_loss:
        rerun.validate_result(
            result=loss,
            rejection_func=partial(
                rerun.is_unexpectedly_large, threshold=SPIKE_FACTOR, context="loss"
            ),
            message="spike of the loss",
            tolerance=0.0,
            fatal=False,
        )
    return loss, tokens.int(), {"lm loss": torch.stack([loss.detach(), tokens])}
