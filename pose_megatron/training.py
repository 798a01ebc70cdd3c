"""The loop: megatron-core's schedules, optimizer and gradient reduction, over skip-wise batches."""

import json
import math
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module

from pose_megatron import checkpoint
from pose_megatron.arguments import Arguments, CheckpointFlags, Layout
from pose_megatron.batch import batches, get_batch
from pose_megatron.checkpoint import Checkpoint
from pose_megatron.dataset import PoseDataset
from pose_megatron.distributed import device, print_rank_0, rank, world_size
from pose_megatron.model import PoseGPTModel, build_model, initialize, transformer_config
from pose_megatron.model_config import ModelConfig
from pose_megatron.optimizer import build_optimizer, build_scheduler, learning_rate
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

    @property
    def consumed_samples(self) -> int:
        return self.iteration * self.layout.global_batch_size


def starting_point(flags: CheckpointFlags) -> tuple[Checkpoint | None, bool]:
    """The checkpoint to start from, if any, and whether to go on with its training.

    Raises:
        ValueError: --load holds none and nothing takes its place, or one is damaged.
    """
    if flags.pretrained_checkpoint and not (flags.load and checkpoint.exists(flags.load)):
        return checkpoint.find(flags.pretrained_checkpoint), False
    if not flags.load:
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
        trainer.iteration = loaded.iteration
        if loaded.consumed_samples != trainer.consumed_samples:
            raise ValueError(
                f"checkpoint {loaded.path} was trained on {loaded.consumed_samples} samples in "
                f"{loaded.iteration} steps; --global-batch-size {layout.global_batch_size} "
                "contradicts that: resume with the same, or start anew with --finetune"
            )
    return trainer


def _load(flags: CheckpointFlags, loaded: Checkpoint, *into) -> Checkpoint:
    """Loads it, or with --load-fallback the next earlier one that can be loaded; returns which."""
    while True:
        try:
            checkpoint.load(loaded, *into)
            return loaded
        except ValueError as error:
            loaded = _fall_back(flags, error, loaded.iteration)


def train(trainer: Trainer, train_set: PoseDataset | None, valid_set: PoseDataset | None) -> None:
    """Trains to --train-iters, with validations and checkpoints on the way and at the end.

    SIGTERM, SIGUSR1 and --exit-duration-in-mins end it after the step in hand, with a checkpoint.
    """
    args, t = trainer.args, trainer.args.training
    if trainer.iteration >= t.train_iters:
        print_rank_0(f"nothing to do: --train-iters {t.train_iters}, {trainer.iteration} done")
        return
    data = _streams(trainer, train_set, trainer.consumed_samples, args.data.num_workers)
    log, stop = Log(trainer), Stop(t.exit_duration_in_mins)
    queue = AsyncCallsQueue() if args.checkpoint.async_save else None
    for model in trainer.models:
        model.train()
    while trainer.iteration < t.train_iters:
        lr = learning_rate(trainer.optimizer)
        loss, grad_norm = train_step(trainer, data)
        log.step(loss, grad_norm, lr)
        at = trainer.iteration
        reason = stop.agreed()
        last = at == t.train_iters or reason is not None
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
    log.close()


class Stop:
    """Whether to end before --train-iters: by a signal to any rank, or by the clock."""

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, minutes: float | None):
        self.deadline = time.monotonic() + 60 * minutes if minutes else math.inf
        self.caught = 0
        for number in self.SIGNALS:
            signal.signal(number, self._catch)

    def _catch(self, number: int, frame) -> None:
        self.caught = number

    def agreed(self) -> str | None:
        """The reason, the same on every rank; None to go on."""
        votes = torch.tensor([self.caught, time.monotonic() > self.deadline], device=device())
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        number, late = votes.tolist()
        if number:
            return signal.Signals(number).name
        return "--exit-duration-in-mins" if late else None


def save(trainer: Trainer, queue: AsyncCallsQueue | None = None, done=lambda path: None) -> Path:
    args = trainer.args
    if queue:
        queue.maybe_finalize_async_calls(blocking=True)  # one at a time
    return checkpoint.save(
        args.checkpoint.save, trainer.iteration, trainer.consumed_samples, trainer.config,
        trainer.stages, trainer.optimizer, trainer.scheduler, trainer.tokenizer_files,
        args.checkpoint.save_retain, queue, done,
    )


def train_step(trainer: Trainer, data: Iterator | None) -> tuple[torch.Tensor, float]:
    """One step. Returns ([loss sum, tokens] over the whole batch, gradient norm before clipping).

    The sum is complete on the last pipeline stage and zero on the others.
    """
    for model in trainer.models:
        model.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    loss = _forward_backward(trainer, data, forward_only=False)
    ok, grad_norm, _ = trainer.optimizer.step()
    if ok:
        trainer.scheduler.step(increment=trainer.layout.global_batch_size)
    trainer.iteration += 1
    return loss, float(grad_norm or 0.0)


@torch.no_grad()
def evaluate(trainer: Trainer, valid_set: PoseDataset | None) -> float:
    """Mean loss per token over --eval-iters batches of plain positions; on every rank."""
    data = _streams(trainer, valid_set, 0, num_workers=0)
    for model in trainer.models:
        model.eval()
    total = sum(
        _forward_backward(trainer, data, forward_only=True)
        for _ in range(trainer.args.logging.eval_iters)
    )
    for model in trainer.models:
        model.train()
    total = _from_last_stage(total)
    return (total[0] / total[1]).item()


def test(trainer: Trainer, test_set: PoseDataset | None) -> None:
    """Reports the mean loss over --eval-iters batches of --test-data-path."""
    log = Log(trainer)
    log.validation(evaluate(trainer, test_set), "test")
    log.close()


def _streams(trainer: Trainer, dataset: PoseDataset | None, consumed: int, num_workers: int):
    """The micro-batches of this rank; interleaved, each model chunk reads a stream of its own."""
    streams = [
        batches(dataset, consumed, trainer.args.training.micro_batch_size, num_workers)
        for _ in trainer.models
    ]
    return streams if len(streams) > 1 else streams[0]


def _forward_backward(trainer: Trainer, data, forward_only: bool) -> torch.Tensor:
    t, length = trainer.args.training, trainer.args.data.seq_length
    reports = get_forward_backward_func()(
        forward_step_func=_forward_step(t.micro_batch_size, length),
        data_iterator=data,
        model=trainer.models if len(trainer.models) > 1 else trainer.models[0],
        num_microbatches=trainer.layout.num_microbatches,
        seq_length=length,
        micro_batch_size=t.micro_batch_size,
        forward_only=forward_only,
    )
    total = torch.zeros(2, dtype=torch.float64, device=device())
    for report in reports:
        total += report["loss"]
    if reports:
        dist.all_reduce(
            total, group=parallel_state.get_data_parallel_group(with_context_parallel=True)
        )
    return total


def _forward_step(micro_batch_size: int, seq_length: int):
    def loss_of(mask, losses):
        mask = mask.to(losses.dtype)
        loss = (losses.float() * mask).sum()
        tokens = mask.sum()
        # Three values: megatron-core sums both and divides once, by the tokens of the whole batch.
        return loss, tokens.int(), {"loss": torch.stack([loss.detach(), tokens.float()])}

    def forward_step(data, model):
        batch = get_batch(data, micro_batch_size, seq_length)
        # No attention mask: causal by token index is what the kernels do without one.
        out = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
        return out, lambda losses: loss_of(batch["loss_mask"], losses)

    return forward_step


def _from_last_stage(total: torch.Tensor) -> torch.Tensor:
    """Hands [loss sum, tokens] to all pipeline stages."""
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        dist.broadcast(
            total, parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
    return total


class Log:
    """Rank 0's log lines, their JSON twins, and TensorBoard scalars."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        flags = trainer.args.logging
        self.interval = flags.log_interval
        self.sum = torch.zeros(2, dtype=torch.float64, device=device())
        self.mark, self.seconds, self.steps = time.perf_counter(), 0.0, 0
        self.json = self.board = None
        if rank() == 0 and flags.log_file:
            Path(flags.log_file).parent.mkdir(parents=True, exist_ok=True)
            self.json = open(flags.log_file, "a", buffering=1)
        if rank() == 0 and flags.tensorboard_dir:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(flags.tensorboard_dir)

    def step(self, loss: torch.Tensor, grad_norm: float, lr: float) -> None:
        self.sum += loss
        self.steps += 1
        self.seconds += time.perf_counter() - self.mark
        self.mark = time.perf_counter()
        trainer, t = self.trainer, self.trainer.args.training
        at = trainer.iteration
        if at % self.interval and at != t.train_iters:
            return
        total = _from_last_stage(self.sum)
        mean = (total[0] / total[1]).item()
        seconds = self.seconds / self.steps
        tokens = trainer.layout.global_batch_size * trainer.args.data.seq_length
        rate = tokens / seconds / world_size()
        left = seconds * (t.train_iters - at)
        width = len(str(t.train_iters))
        print_rank_0(
            f"iteration {at:{width}d}/{t.train_iters} | samples {trainer.consumed_samples} | "
            f"{rate:,.0f} tokens/s per rank | loss {mean:.4f} | grad norm {grad_norm:.3f} | "
            f"lr {lr:.3e} | left {_clock(left)}"
        )
        self._record(iteration=at, consumed_samples=trainer.consumed_samples, loss=mean,
                     grad_norm=grad_norm, lr=lr, tokens_per_second_per_rank=rate,
                     seconds_per_step=seconds)
        self.sum.zero_()
        self.mark, self.seconds, self.steps = time.perf_counter(), 0.0, 0

    def validation(self, loss: float, name: str = "validation") -> None:
        at = self.trainer.iteration
        # exp() of a fresh model's loss can overflow; infinity is then the honest figure.
        perplexity = math.exp(loss) if loss < 700 else math.inf
        print_rank_0(f"{name} at {at} | loss {loss:.4f} | perplexity {perplexity:.3f}")
        self._record(iteration=at, **{"test_loss" if name == "test" else "valid_loss": loss})
        self.mark = time.perf_counter()  # not a step's time

    def saved(self, path: Path) -> None:
        print_rank_0(f"saved {path}")
        self.mark = time.perf_counter()  # not a step's time

    def _record(self, **values) -> None:
        if self.json:
            self.json.write(json.dumps(values) + "\n")
        if self.board:
            for name, value in values.items():
                if name not in ("iteration", "consumed_samples"):
                    self.board.add_scalar(name, value, values["iteration"])

    def close(self) -> None:
        for sink in (self.json, self.board):
            if sink:
                sink.close()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
