"""One step: all micro-batches of a batch forward and backward, then one update.

megatron-core's schedules call `forward_step` for each micro-batch and its `loss_func` on the last
pipeline stage.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import unwrap_model

from pose_megatron.data.batch import get_batch
from pose_megatron.data.dataset import PoseDataset, TrainingSet
from pose_megatron.runtime.device import device
from pose_megatron.training.optimizer import update
from pose_megatron.training.stop import Stop
from pose_megatron.training.trainer import Trainer


@dataclass(frozen=True)
class Step:
    """A step's results; all but `rows` are the same on every rank.

    Attributes:
        loss: mean per token of the whole batch, nats.
        grad_norm: before clipping.
        updated: whether the weights changed; they do not when loss or gradient is not finite.
        first, samples: the batch is samples [first, first + samples) of the run.
        rows: for each micro-batch on this rank [b, 2]: each sample's loss sum and tokens, or those
            of this context-parallel rank's slice. Empty but on the last pipeline stage.
    """

    loss: float
    grad_norm: float
    updated: bool
    first: int
    samples: int
    rows: list[torch.Tensor]


def train_step(trainer: Trainer, data, stop: Stop | None = None) -> Step | None:
    """One step: all micro-batches forward and backward, then one update.

    Args:
        data: this rank's micro-batches, from `Trainer.data_iterator`.
        stop: asked before each micro-batch.

    Returns:
        None if the step was called off: it has changed nothing, and no other can follow.
    """
    first = trainer.consumed_samples
    samples = trainer.layout.batch_size(first)
    for model in trainer.models:
        model.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    rows = _forward_backward(trainer, data, samples, forward_only=False, stop=stop)
    if stop and stop.reason:
        return None
    loss = _over_ranks(rows)
    grad_norm, updated = update(
        trainer.optimizer, trainer.args.training.clip_grad, math.isfinite(loss)
    )
    if updated:
        trainer.scheduler.step(increment=samples)
    trainer.iteration += 1
    trainer.consumed_samples += samples
    trainer.consumed_tokens += samples * trainer.args.data.seq_length
    return Step(loss, grad_norm, updated, first, samples, rows)


@torch.no_grad()
def evaluate(
    trainer: Trainer, valid_set: PoseDataset | None, stop: Stop | None = None
) -> float | None:
    """Mean loss per token over --eval-iters batches, the same on every rank.

    Args:
        stop: asked before each micro-batch.

    Returns:
        None if it was called off.
    """
    data = trainer.data_iterator(valid_set, 0, num_workers=0)
    for model in trainer.models:
        model.eval()
    rows: list[torch.Tensor] = []
    with trainer.whole_weights():
        for _ in range(trainer.args.logging.eval_iters):
            rows += _forward_backward(
                trainer, data, trainer.layout.global_batch_size, forward_only=True, stop=stop
            )
            if stop and stop.reason:
                return None
    for model in trainer.models:
        model.train()
    return _over_ranks(rows)


def sample_losses(trainer: Trainer, step: Step) -> list[float]:
    """Each sample's mean loss in a step, in order; all ranks call it and get all of them."""
    micro = trainer.layout.micro_batch_size
    total = torch.zeros(step.samples, 2, dtype=torch.float64, device=device())
    ranks, own = (
        parallel_state.get_data_parallel_world_size(),
        parallel_state.get_data_parallel_rank(),
    )
    for i, rows in enumerate(step.rows):
        start = (i * ranks + own) * micro
        total[start : start + micro] += rows
    # Each tensor-parallel rank adds the same sums, which leaves the means as they are.
    dist.all_reduce(total)
    return (total[:, 0] / total[:, 1]).tolist()


def worst_samples(
    losses: list[float], first: int, dataset: TrainingSet | None, count: int = 4
) -> list[tuple[str, float]]:
    """Names and losses of the samples with the highest loss, NaN first; [] without the dataset.

    Args:
        losses: of samples `first`, `first` + 1, ... of the dataset.
        count: how many to name.
    """
    if dataset is None:
        return []

    def key(i: int) -> float:
        return losses[i] if math.isfinite(losses[i]) else math.inf

    worst = sorted(range(len(losses)), key=key, reverse=True)[:count]
    return [(dataset.name(first + i), losses[i]) for i in worst]


def _forward_backward(
    trainer: Trainer, data, samples: int, forward_only: bool, stop: Stop | None
) -> list[torch.Tensor]:
    """Runs megatron-core's schedule over a batch; returns `Step.rows`."""
    t, length = trainer.args.training, trainer.args.data.seq_length
    reports = get_forward_backward_func()(
        forward_step_func=partial(
            forward_step, micro_batch_size=t.micro_batch_size, seq_length=length, stop=stop
        ),
        data_iterator=data,
        model=trainer.models if len(trainer.models) > 1 else trainer.models[0],
        num_microbatches=trainer.layout.num_microbatches(samples),
        seq_length=length,
        micro_batch_size=t.micro_batch_size,
        forward_only=forward_only,
    )
    return [report["rows"] for report in reports]


def forward_step(
    data_iterator, model, micro_batch_size: int, seq_length: int, stop: Stop | None = None
):
    """The forward pass of one micro-batch; megatron-core's schedules give the first two arguments.

    Returns:
        (this pipeline stage's output, the loss function to apply to the last stage's).
    """
    if stop and stop.before_micro_batch():
        return _called_off(model, micro_batch_size, seq_length)
    batch = get_batch(data_iterator, micro_batch_size, seq_length)
    # No attention mask: causal by token index is what the kernels do without one.
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return output, partial(loss_func, batch["loss_mask"])


def _called_off(model, micro_batch_size: int, seq_length: int):
    """What `forward_step` returns for the rest of a step that counts no more: zeros of the right
    shape, as megatron-core's schedules still send them from stage to stage and back."""
    stage = unwrap_model(model)
    config = stage.config
    config.finalize_model_grads_func = None  # an overlapped reduction was perhaps not begun
    hidden = stage.decoder.input_tensor
    if hidden is None:  # the first stage
        length = seq_length // config.context_parallel_size
        if config.sequence_parallel:
            length //= config.tensor_model_parallel_size
        shape = (length, micro_batch_size, config.hidden_size)
        hidden = torch.zeros(
            shape, dtype=config.params_dtype, device=device(), requires_grad=torch.is_grad_enabled()
        )

    def no_loss(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict]:
        tokens = torch.ones((), dtype=torch.int32, device=device())
        return output.float().sum(), tokens, {"rows": output.new_zeros(0, 2)}

    return hidden * 0, no_loss


def loss_func(
    loss_mask: torch.Tensor | None, losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of one micro-batch, on the last pipeline stage.

    megatron-core sums loss and tokens over micro-batches and ranks, and divides once, by the tokens
    of the whole batch.

    Args:
        loss_mask: [b, L / cp], 1 for tokens that count.
        losses: [b, L / cp], nats.

    Returns:
        (loss sum, tokens, {"rows": each sample's loss sum and tokens [b, 2]}).
    """
    assert loss_mask is not None, "only middle pipeline stages have no mask"
    mask = loss_mask.to(losses.dtype)
    rows = torch.stack([(losses.float() * mask).sum(1), mask.sum(1)], dim=1)
    loss, tokens = rows.sum(0)
    return loss, tokens.int(), {"rows": rows.detach()}


def _over_ranks(rows: list[torch.Tensor]) -> float:
    """Mean loss per token over all ranks' rows.

    Only the last pipeline stage has rows, and its tensor-parallel ranks have the same ones, which
    leaves the mean as it is.
    """
    total = torch.zeros(2, dtype=torch.float64, device=device())
    for row in rows:
        total += row.sum(0, dtype=torch.float64)
    dist.all_reduce(total)
    loss, tokens = total.tolist()
    return loss / tokens
