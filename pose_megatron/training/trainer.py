"""What a rank takes steps with: model, optimizer and schedule, built once, saved and loaded."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from pose_megatron.checkpoints.megatron.directory import Checkpoint
from pose_megatron.config.flags import Arguments, CheckpointFlags
from pose_megatron.config.layout import Layout
from pose_megatron.data.batch import batches
from pose_megatron.data.dataset import PoseDataset
from pose_megatron.errors import DamagedCheckpoint
from pose_megatron.models.build import build_model, initialize, transformer_config
from pose_megatron.models.gpt import PoseGPTModel
from pose_megatron.models.shape import ModelConfig
from pose_megatron.training import checkpointing
from pose_megatron.training.optimizer import build_optimizer, build_scheduler
from pose_megatron.training.run import Run, fall_back


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
        self.continue_from(self.iteration, self.consumed_samples)

    def continue_from(self, iteration: int, consumed_samples: int) -> None:
        self.iteration, self.consumed_samples = iteration, consumed_samples
        self.iterations, _ = self.layout.end(self.args.training, iteration, consumed_samples)

    def data_iterator(self, dataset: PoseDataset | None, consumed: int, num_workers: int):
        """This rank's micro-batches; a list of iterators, one per model chunk, when interleaved."""
        iterators = [
            batches(dataset, consumed, self.args.training.micro_batch_size, num_workers)
            for _ in self.models
        ]
        return iterators if len(iterators) > 1 else iterators[0]

    @contextlib.contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Within it every rank holds all weights of its stage, as evaluation and saving need them;
        with --overlap-param-gather they would come only with the next forward pass."""
        if not self.args.parallel.overlap_param_gather:
            yield
            return
        for model in self.models:
            model.disable_forward_pre_hook()  # and gathers
        try:
            yield
        finally:
            for model in self.models:
                model.enable_forward_pre_hook()


def setup(run: Run, layout: Layout) -> Trainer:
    """Model, optimizer and schedule of this rank, from fresh weights or from `run.loaded`: only its
    weights, or all of its training state if `run.resume`.

    Raises:
        ConfigError: the checkpoint is whole and does not fit the run.
        DamagedCheckpoint: it is not whole, and --load-fallback finds no other.
    """
    args, config, loaded = run.args, run.model, run.loaded
    t, impl = args.training, args.model.transformer_impl
    core = core_transformer_config_from_args(args, config)
    chunks = core.virtual_pipeline_model_parallel_size
    stages = [build_model(core, config, impl, i) for i in (range(chunks) if chunks else [None])]
    if loaded is None:
        for stage in stages:
            initialize(stage, t.seed, args.model.init_method_std, config.num_layers)
    elif not run.resume:
        loaded = _load(args.checkpoint, loaded, stages)
    reduction = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=args.parallel.use_distributed_optimizer,
        overlap_grad_reduce=args.parallel.overlap_grad_reduce,
        overlap_param_gather=args.parallel.overlap_param_gather,
    )
    models = [
        DistributedDataParallel(
            core,
            reduction,
            Float16Module(core, stage) if t.bf16 else stage,
            disable_bucketing=i > 0,
        )
        for i, stage in enumerate(stages)
    ]
    for model in models:
        model.broadcast_params()
    _overlap(core, reduction, models)
    optimizer = build_optimizer(t, args.parallel, models)
    scheduler = build_scheduler(t, layout, optimizer)
    core.grad_scale_func = optimizer.scale_loss
    if run.tokenizer:
        files = run.tokenizer.files
    else:
        files = loaded.tokenizer_files if loaded else []
    trainer = Trainer(args, config, layout, stages, models, optimizer, scheduler, files)
    if loaded and run.resume:
        loaded = _load(args.checkpoint, loaded, stages, optimizer, scheduler)
        trainer.continue_from(loaded.iteration, loaded.consumed_samples)
    return trainer


def core_transformer_config_from_args(args: Arguments, model: ModelConfig) -> TransformerConfig:
    """megatron-core's configuration of a model for what the flags say of layout and precision."""
    t = args.training
    return transformer_config(
        model,
        bf16=t.bf16,
        transformer_impl=args.model.transformer_impl,
        **args.parallel.sizes(model.num_layers),
        sequence_parallel=args.parallel.sequence_parallel,
        recompute_granularity=t.recompute_granularity,
        recompute_method=t.recompute_method,
        recompute_num_layers=t.recompute_num_layers,
        recompute_modules=t.recompute_modules,
    )


def save(trainer: Trainer, queue: AsyncCallsQueue | None = None, done=lambda path: None) -> Path:
    """Writes a checkpoint into --save; arguments as checkpointing.save."""
    args = trainer.args
    assert args.checkpoint.save, "--save is checked by the caller"
    if queue:
        queue.maybe_finalize_async_calls(blocking=True)  # one at a time
    with trainer.whole_weights():
        return checkpointing.save(
            args.checkpoint.save,
            trainer.iteration,
            trainer.consumed_samples,
            trainer.config,
            trainer.stages,
            trainer.optimizer,
            trainer.scheduler,
            trainer.tokenizer_files,
            args.checkpoint.save_retain,
            queue,
            done,
        )


def _load(flags: CheckpointFlags, loaded: Checkpoint, *into) -> Checkpoint:
    """Loads it, or with --load-fallback the next earlier one that can be loaded; returns which."""
    while True:
        try:
            checkpointing.load(loaded, *into)
            return loaded
        except DamagedCheckpoint as error:
            loaded = fall_back(flags, error, loaded.iteration)


def _overlap(
    core: TransformerConfig,
    reduction: DistributedDataParallelConfig,
    models: list[DistributedDataParallel],
) -> None:
    """Tells the schedules when to exchange gradients and weights beside their own work."""
    if reduction.overlap_grad_reduce:
        hold = [model.no_sync for model in models]
        core.no_sync_func = hold if len(models) > 1 else hold[0]
        if len(models) > 1:  # of an interleaved pipeline: all stages at the same time
            core.grad_sync_func = [model.start_grad_sync for model in models]
            if reduction.overlap_param_gather:
                core.param_sync_func = [model.start_param_sync for model in models]
