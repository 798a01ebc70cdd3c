"""The loop: megatron-core's schedules, optimizer and gradient reduction, over skip-wise batches."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module

from pose_megatron import checkpoint
from pose_megatron.batch import batches, get_batch
from pose_megatron.checkpoint import Checkpoint
from pose_megatron.dataset import PoseDataset
from pose_megatron.distributed import device, print_rank_0
from pose_megatron.flags import Arguments, CheckpointFlags, TrainingFlags
from pose_megatron.layout import Layout
from pose_megatron.lifetime import Stop
from pose_megatron.log import Log, Watch
from pose_megatron.model import PoseGPTModel, build_model, initialize, transformer_config
from pose_megatron.model_config import ModelConfig
from pose_megatron.optimizer import build_optimizer, build_scheduler, learning_rate, update
from pose_megatron.tokenizer import build_tokenizer


@dataclass
class Trainer:
    """What a step needs; `setup` makes it."""

    args: Arguments
    config: ModelConfig
    layout: Layout
    stages: list[PoseGPTModel]  # this rank's pipeline stage, or its chunks when interleaved
    models: list[DistributedDataParallel]  # the same, wrapped
    optimizer: object
    scheduler: object
    tokenizer_files: list[Path]  # of --tokenizer-model, else of the checkpoint started from
    iteration: int = 0  # steps done
    consumed_samples: int = 0  # in them
    iterations: int = field(init=False)  # of the whole run

    def __post_init__(self):
        self.go_on_from(self.iteration, self.consumed_samples)

    def go_on_from(self, iteration: int, consumed_samples: int) -> None:
        self.iteration, self.consumed_samples = iteration, consumed_samples
        self.iterations, _ = self.layout.end(self.args.training, iteration, consumed_samples)


@dataclass(frozen=True)
class Step:
    """What a step came to; the same on every rank, but for `rows`.

    Attributes:
        loss: per token of the whole batch.
        grad_norm: before clipping.
        updated: whether the weights changed; not where a value was not finite.
        first, samples: the batch is samples [first, first + samples) of the run.
        rows: [b, 2] of each micro-batch here: loss sum and tokens of each sample, or of this
            context-parallel rank's part of it. Only on the last pipeline stage.
        votes: those of `train_step`, summed over the ranks.
    """

    loss: float
    grad_norm: float
    updated: bool
    first: int
    samples: int
    rows: list[torch.Tensor]
    votes: list[float]


def starting_point(flags: CheckpointFlags) -> tuple[Checkpoint | None, bool]:
    """The checkpoint to start from, if any, and whether to go on with its training.

    Raises:
        ValueError: --load holds none and nothing takes its place, or one is damaged.
    """
    if flags.pretrained_checkpoint and not (flags.load and checkpoint.exists(flags.load)):
        return checkpoint.find(flags.pretrained_checkpoint), False
    if not flags.load:
        return None, False
    if flags.load == flags.save and not (checkpoint.exists(flags.load) or flags.finetune):
        print_rank_0(f"{flags.load} holds no checkpoint yet: starting from fresh weights")
        return None, False
    try:
        return checkpoint.find(flags.load), not flags.finetune
    except ValueError as error:
        return _fall_back(flags, error), not flags.finetune


def _fall_back(flags: CheckpointFlags, error: ValueError, below: int | None = None) -> Checkpoint:
    if not flags.load_fallback:
        raise error
    earlier = checkpoint.fall_back(flags.load, error, below)
    print_rank_0(f"{error}; falling back to {earlier.path}")
    return earlier


def samples_needed(t: TrainingFlags, layout: Layout, resumed: Checkpoint | None) -> int:
    """Length of a training set that lasts to the end, also should --load-fallback take an earlier
    checkpoint than `resumed`."""
    from_start = layout.end(t)[1]
    if resumed is None:
        return from_start
    return max(from_start, layout.end(t, resumed.iteration, resumed.consumed_samples)[1])


def setup(
    args: Arguments, config: ModelConfig, layout: Layout, loaded: Checkpoint | None, resume: bool
) -> "Trainer":
    """Model, optimizer and schedule of this rank; from `loaded` the weights, and all if `resume`.
    """
    core = transformer_config(config, args)
    chunks = args.parallel.virtual_pipeline_size(config.num_layers)
    stages = [build_model(core, config, args, i) for i in range(chunks)] if chunks else [
        build_model(core, config, args)]
    if loaded is None:
        for stage in stages:
            initialize(stage, args.training.seed, args.model.init_method_std, config.num_layers)
    elif not resume:
        loaded = _load(args.checkpoint, loaded, stages)
    reduction = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=args.parallel.use_distributed_optimizer,
        overlap_grad_reduce=args.parallel.overlap_grad_reduce,
        overlap_param_gather=args.parallel.overlap_param_gather,
    )
    models = [
        DistributedDataParallel(
            core, reduction, Float16Module(core, stage) if args.training.bf16 else stage,
            disable_bucketing=i > 0,
        )
        for i, stage in enumerate(stages)
    ]
    for model in models:
        model.broadcast_params()
    _overlap(core, reduction, models)
    optimizer = build_optimizer(args.training, args.parallel, models)
    scheduler = build_scheduler(args.training, layout, optimizer)
    core.grad_scale_func = optimizer.scale_loss
    if args.data.tokenizer_model:
        files = build_tokenizer(args.data.tokenizer_type, args.data.tokenizer_model).files
    else:
        files = loaded.tokenizer_files if loaded else []
    trainer = Trainer(args, config, layout, stages, models, optimizer, scheduler, files)
    if resume:
        loaded = _load(args.checkpoint, loaded, stages, optimizer, scheduler)
        trainer.go_on_from(loaded.iteration, loaded.consumed_samples)
    return trainer


def _overlap(core, reduction, models: list[DistributedDataParallel]) -> None:
    """Tells the schedules when to exchange gradients and weights beside their own work."""
    if reduction.overlap_grad_reduce:
        hold = [model.no_sync for model in models]
        core.no_sync_func = hold if len(models) > 1 else hold[0]
        if len(models) > 1:  # of an interleaved pipeline: all stages at the same time
            core.grad_sync_func = [model.start_grad_sync for model in models]
            if reduction.overlap_param_gather:
                core.param_sync_func = [model.start_param_sync for model in models]


@contextlib.contextmanager
def _whole_weights(trainer: Trainer):
    """Within it every rank holds all weights of its stage, as evaluation and saving need them; with
    --overlap-param-gather they would come only with the next forward pass."""
    if not trainer.args.parallel.overlap_param_gather:
        yield
        return
    for model in trainer.models:
        model.disable_forward_pre_hook()  # and gathers
    try:
        yield
    finally:
        for model in trainer.models:
            model.enable_forward_pre_hook()


def _load(flags: CheckpointFlags, loaded: Checkpoint, *into) -> Checkpoint:
    """Loads it, or with --load-fallback the next earlier one that can be loaded; returns which."""
    while True:
        try:
            checkpoint.load(loaded, *into)
            return loaded
        except ValueError as error:
            loaded = _fall_back(flags, error, loaded.iteration)


def train(
    trainer: Trainer, train_set: PoseDataset | None, valid_set: PoseDataset | None,
    test_set: PoseDataset | None = None,
) -> None:
    """Trains to the end, with validations and checkpoints on the way and at the end; then, with
    --test-data-path, reports the loss of --eval-iters batches of it.

    SIGTERM, SIGUSR1 and --exit-duration-in-mins end it after the step in hand, with a checkpoint.

    Raises:
        ValueError: --max-skipped-iterations steps in a row were not finite.
    """
    args, t = trainer.args, trainer.args.training
    if trainer.iteration >= trainer.iterations:
        print_rank_0(f"nothing to do: {trainer.iteration} of {trainer.iterations} steps done")
        return
    data = _streams(trainer, train_set, trainer.consumed_samples, args.data.num_workers)
    log, stop = Log(trainer), Stop(t.exit_duration_in_mins)
    watch = Watch(t.loss_spike_factor, t.max_skipped_iterations)
    queue = AsyncCallsQueue() if args.checkpoint.async_save else None
    for model in trainer.models:
        model.train()
    while trainer.iteration < trainer.iterations:
        lr = learning_rate(trainer.optimizer)
        step = train_step(trainer, data, stop.votes())
        log.step(step, lr)
        if wrong := watch.judge(step):
            losses = sample_losses(trainer, step)
            log.anomaly(wrong, worst_samples(losses, step.first, train_set))
        if watch.gives_up:
            if queue:
                queue.maybe_finalize_async_calls(blocking=True)
            raise ValueError(
                f"{watch.skipped} steps in a row had a loss or gradient that is not finite "
                f"(--max-skipped-iterations {t.max_skipped_iterations}), the last at "
                f"{trainer.iteration}: see their samples above; lower --lr, or start again from "
                "an earlier checkpoint"
            )
        at = trainer.iteration
        reason = stop.reason(step.votes)
        last = at == trainer.iterations or reason is not None
        if args.logging.eval_interval and (at % args.logging.eval_interval == 0 or last):
            log.validation(evaluate(trainer, valid_set))
        every = args.checkpoint.save_interval
        if args.checkpoint.save and (last or (every and at % every == 0)):
            save(trainer, queue, log.saved)
        if queue:
            queue.maybe_finalize_async_calls(blocking=last)
        if reason:
            print_rank_0(f"stopped at {at} by {reason}")
            break
    if args.data.test_data_path and trainer.iteration == trainer.iterations:
        log.validation(evaluate(trainer, test_set), "test")
    log.close()


def save(trainer: Trainer, queue: AsyncCallsQueue | None = None, done=lambda path: None) -> Path:
    args = trainer.args
    if queue:
        queue.maybe_finalize_async_calls(blocking=True)  # one at a time
    with _whole_weights(trainer):
        return checkpoint.save(
            args.checkpoint.save, trainer.iteration, trainer.consumed_samples, trainer.config,
            trainer.stages, trainer.optimizer, trainer.scheduler, trainer.tokenizer_files,
            args.checkpoint.save_retain, queue, done,
        )


def train_step(trainer: Trainer, data: Iterator | None, votes: Sequence[float] = ()) -> Step:
    """One step: all micro-batches forward and backward, then one update.

    Args:
        data: this rank's micro-batches.
        votes: of this rank; the ranks sum them in the same exchange as the loss.
    """
    first = trainer.consumed_samples
    samples = trainer.layout.batch_size(first)
    for model in trainer.models:
        model.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    rows = _forward_backward(trainer, data, samples, forward_only=False)
    loss, votes = _over_ranks(rows, votes)
    grad_norm, updated = update(
        trainer.optimizer, trainer.args.training.clip_grad, math.isfinite(loss)
    )
    if updated:
        trainer.scheduler.step(increment=samples)
    trainer.iteration += 1
    trainer.consumed_samples += samples
    return Step(loss, grad_norm, updated, first, samples, rows, votes)


@torch.no_grad()
def evaluate(trainer: Trainer, valid_set: PoseDataset | None) -> float:
    """Mean loss per token over --eval-iters batches of plain positions; on every rank."""
    data = _streams(trainer, valid_set, 0, num_workers=0)
    for model in trainer.models:
        model.eval()
    with _whole_weights(trainer):
        rows = [
            row
            for _ in range(trainer.args.logging.eval_iters)
            for row in _forward_backward(
                trainer, data, trainer.layout.global_batch_size, forward_only=True)
        ]
    for model in trainer.models:
        model.train()
    return _over_ranks(rows)[0]


def sample_losses(trainer: Trainer, step: Step) -> list[float]:
    """Mean loss of each sample of a step, in order; all ranks call it and get all."""
    micro = trainer.layout.micro_batch_size
    total = torch.zeros(step.samples, 2, dtype=torch.float64, device=device())
    ranks, own = (parallel_state.get_data_parallel_world_size(),
                  parallel_state.get_data_parallel_rank())
    for i, rows in enumerate(step.rows):
        start = (i * ranks + own) * micro
        total[start : start + micro] += rows
    dist.all_reduce(total)  # once for each tensor-parallel rank: the mean does not change
    return (total[:, 0] / total[:, 1]).tolist()


def worst_samples(
    losses: list[float], first: int, dataset: PoseDataset | None, count: int = 4
) -> list[tuple[str, float]]:
    """Names and losses of the samples that stand out, where this rank has the dataset."""
    if dataset is None:
        return []
    worst = sorted(range(len(losses)), key=lambda i: _badness(losses[i]), reverse=True)[:count]
    return [(dataset.name(first + i), losses[i]) for i in worst]


def _badness(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


def _streams(trainer: Trainer, dataset: PoseDataset | None, consumed: int, num_workers: int):
    """The micro-batches of this rank; interleaved, each model chunk reads a stream of its own."""
    streams = [
        batches(dataset, consumed, trainer.args.training.micro_batch_size, num_workers)
        for _ in trainer.models
    ]
    return streams if len(streams) > 1 else streams[0]


def _forward_backward(
    trainer: Trainer, data, samples: int, forward_only: bool
) -> list[torch.Tensor]:
    """All micro-batches of a batch; returns the rows of `Step`."""
    t, length = trainer.args.training, trainer.args.data.seq_length
    reports = get_forward_backward_func()(
        forward_step_func=_forward_step(t.micro_batch_size, length),
        data_iterator=data,
        model=trainer.models if len(trainer.models) > 1 else trainer.models[0],
        num_microbatches=trainer.layout.num_microbatches(samples),
        seq_length=length,
        micro_batch_size=t.micro_batch_size,
        forward_only=forward_only,
    )
    return [report["rows"] for report in reports]


def _forward_step(micro_batch_size: int, seq_length: int):
    def loss_of(mask, losses):
        mask = mask.to(losses.dtype)
        rows = torch.stack([(losses.float() * mask).sum(1), mask.sum(1)], dim=1)
        loss, tokens = rows.sum(0)
        # Three values: megatron-core sums both and divides once, by the tokens of the whole batch.
        return loss, tokens.int(), {"rows": rows.detach()}

    def forward_step(data, model):
        batch = get_batch(data, micro_batch_size, seq_length)
        # No attention mask: causal by token index is what the kernels do without one.
        out = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
        return out, lambda losses: loss_of(batch["loss_mask"], losses)

    return forward_step


def _over_ranks(
    rows: list[torch.Tensor], votes: Sequence[float] = ()
) -> tuple[float, list[float]]:
    """Loss per token of the rows of all ranks, and the votes' sums; the same on every rank.

    Only the last pipeline stage has rows, each tensor-parallel rank the same: the mean is theirs.
    """
    own = torch.zeros(2 + len(votes), dtype=torch.float64, device=device())
    for row in rows:
        own[:2] += row.sum(0, dtype=torch.float64)
    own[2:] = torch.tensor(votes, dtype=torch.float64)
    dist.all_reduce(own)
    loss, tokens, *votes = own.tolist()
    return loss / tokens, votes
