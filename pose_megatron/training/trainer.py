"""Model, optimizer and schedule of one rank: built once, loaded and saved."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from pose_megatron.checkpoints.checksums import checksums
from pose_megatron.checkpoints.megatron.directory import AS_IT_LIES, RESHARDABLE, Checkpoint
from pose_megatron.checkpoints.sidecars import check_sidecars
from pose_megatron.config.flags import Arguments, CheckpointFlags
from pose_megatron.config.layout import Layout, check_batches
from pose_megatron.data.batch import batches
from pose_megatron.data.dataset import TrainingSet
from pose_megatron.errors import DamagedCheckpoint
from pose_megatron.models.build import build_model, initialize, transformer_config
from pose_megatron.models.gpt import PoseModel
from pose_megatron.models.shape import ModelConfig
from pose_megatron.training import checkpointing
from pose_megatron.training.checkpointing import SaveQueue
from pose_megatron.training.optimizer import build_optimizer, build_scheduler
from pose_megatron.training.resume import schedule_progress, settings, trained_tokens
from pose_megatron.training.run import Run, fall_back
from pose_megatron.training.save_folder import check_tokenizer_files


@dataclass
class Trainer:
    """What `train_step` works on; `setup` builds it."""

    args: Arguments
    config: ModelConfig
    layout: Layout
    stages: list[PoseModel]  # this rank's pipeline stage, or its chunks when interleaved
    models: list[DistributedDataParallel]  # the same, wrapped
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    tokenizer_files: list[Path]  # copied into checkpoints
    settings: dict  # what checkpoints say of the run (resume.py)
    iteration: int = 0  # steps done
    consumed_samples: int = 0  # by these steps
    consumed_tokens: int = 0
    iterations: int = field(init=False)  # steps of the whole run

    def __post_init__(self):
        self.continue_from(self.iteration, self.consumed_samples, self.consumed_tokens)

    def continue_from(
        self, iteration: int, consumed_samples: int, consumed_tokens: int = 0
    ) -> None:
        """Sets how far the run has come, and from that where it ends."""
        self.iteration, self.consumed_samples = iteration, consumed_samples
        self.consumed_tokens = consumed_tokens
        self.iterations, _ = self.layout.end(self.args.training, iteration, consumed_samples)

    def data_iterator(self, dataset: TrainingSet | None, consumed: int, num_workers: int):
        """This rank's micro-batches from sample `consumed` on; a list of iterators, one per model
        chunk, when interleaved."""
        iterators = [
            batches(dataset, consumed, self.args.training.micro_batch_size, num_workers)
            for _ in self.models
        ]
        return iterators if len(iterators) > 1 else iterators[0]

    @contextlib.contextmanager
    def whole_weights(self) -> Iterator[None]:
        """While it lasts, every rank holds all weights of its stage, as evaluating and saving need;
        with --overlap-param-gather they would otherwise arrive only in the next forward pass."""
        if not self.args.parallel.overlap_param_gather:
            yield
            return
        for model in self.models:
            model.disable_forward_pre_hook()  # which also gathers the weights
        try:
            yield
        finally:
            for model in self.models:
                model.enable_forward_pre_hook()


def setup(run: Run, layout: Layout) -> Trainer:
    """Builds this rank's model, optimizer and schedule: from fresh weights, from the weights of
    `run.loaded`, or from its whole training state if `run.resume`.

    Raises:
        ConfigError: the checkpoint is whole and does not fit the run.
        DamagedCheckpoint: it is not whole, and --load-fallback finds no other.
    """
    args, config, loaded = run.args, run.model, run.loaded
    t, impl = args.training, args.model.transformer_impl
    core = core_transformer_config_from_args(args, config)
    chunks = core.virtual_pipeline_model_parallel_size
    kernels = args.model.fused_rotary, args.model.fused_cross_entropy
    stages = [
        build_model(core, config, impl, i, args.model.model_class, *kernels)
        for i in (range(chunks) if chunks else [None])
    ]
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
        check_sidecars({file.name: file for file in files})  # now, and not when they are saved
    if args.checkpoint.save:
        check_tokenizer_files(args.checkpoint.save, files)
    trainer = Trainer(
        args, config, layout, stages, models, optimizer, scheduler, files, settings(run, layout)
    )
    if loaded and run.resume:
        loaded = _load(args.checkpoint, loaded, stages, optimizer, scheduler)
        check_batches(args, layout, loaded.consumed_samples)  # of an earlier one, perhaps
        batch = layout.global_batch_size
        scheduler.num_steps = schedule_progress(loaded, scheduler.num_steps, t, batch)
        scheduler.step(increment=0)
        trainer.continue_from(
            loaded.iteration, loaded.consumed_samples, trained_tokens(loaded, args.data.seq_length)
        )
    return trainer


def core_transformer_config_from_args(args: Arguments, model: ModelConfig) -> TransformerConfig:
    """megatron-core's configuration of the model, in the layout and precision of the flags."""
    t, p = args.training, args.parallel
    return transformer_config(
        model,
        bf16=t.bf16,
        transformer_impl=args.model.transformer_impl,
        attention_backend=args.model.attention_backend,
        bias_swiglu_fusion=args.model.bias_swiglu_fusion,
        gradient_accumulation_fusion=args.model.gradient_accumulation_fusion,
        model_class=args.model.model_class,
        tensor_model_parallel_size=p.tensor_model_parallel_size,
        pipeline_model_parallel_size=p.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=p.virtual_pipeline_size(model.num_layers),
        context_parallel_size=p.context_parallel_size,
        expert_model_parallel_size=p.expert_model_parallel_size,
        moe_aux_loss_coeff=t.moe_aux_loss_coeff,
        sequence_parallel=p.sequence_parallel,
        recompute_granularity=t.recompute_granularity,
        recompute_method=t.recompute_method,
        recompute_num_layers=t.recompute_num_layers,
        recompute_modules=t.recompute_modules,
    )


def save(
    trainer: Trainer, queue: SaveQueue | None = None, done=lambda path: None, last: bool = True
) -> Path:
    """Writes a checkpoint into --save; for `queue` and `done` see checkpointing.save.

    Args:
        last: whether it is the run's last, which every layout of ranks can resume from.
    """
    args = trainer.args
    assert args.checkpoint.save, "--save is checked by the caller"
    if queue:
        queue.maybe_finalize_async_calls(blocking=True)  # one save at a time
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
            {"settings": trainer.settings, "consumed_tokens": trainer.consumed_tokens},
            RESHARDABLE
            if last or args.checkpoint.dist_ckpt_optim_fully_reshardable
            else AS_IT_LIES,
        )


def _load(flags: CheckpointFlags, loaded: Checkpoint, *into) -> Checkpoint:
    """Loads a checkpoint, or with --load-fallback the newest earlier one that can be loaded.

    Returns:
        The checkpoint that was loaded.
    """
    while True:
        try:
            with checksums(flags.checksums):
                checkpointing.load(loaded, *into)
            return loaded
        except DamagedCheckpoint as error:
            loaded = fall_back(flags, error, loaded.iteration)


def _overlap(
    core: TransformerConfig,
    reduction: DistributedDataParallelConfig,
    models: list[DistributedDataParallel],
) -> None:
    """Has the schedules exchange gradients and weights while they compute."""
    if reduction.overlap_grad_reduce:
        hold = [model.no_sync for model in models]
        core.no_sync_func = hold if len(models) > 1 else hold[0]
        if len(models) > 1:  # interleaved: the pipeline stages exchange at the same time
            core.grad_sync_func = [model.start_grad_sync for model in models]
            if reduction.overlap_param_gather:
                core.param_sync_func = [model.start_param_sync for model in models]
