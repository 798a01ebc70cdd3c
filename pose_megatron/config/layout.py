"""How the ranks of a job divide a model and its batches.

`lay_out` checks once, before anything is built, what tensor, pipeline, context and data parallelism
demand of a run.
"""

import math
from dataclasses import dataclass

from pose_megatron.config.flags import Arguments, ParallelFlags, TrainingFlags
from pose_megatron.errors import ConfigError
from pose_megatron.models.shape import ModelConfig
from pose_megatron.rope.scaling import inverse_frequencies


@dataclass(frozen=True)
class Layout:
    """The sizes of a job.

    Attributes:
        data_parallel_size: ranks that hold the same part of the model and of a sequence.
        micro_batch_size: samples in one forward pass.
        global_batch_size: samples in a step, once it is ramped up.
        rampup: (first batch, increment, samples until the last increment), or None.
    """

    data_parallel_size: int
    micro_batch_size: int
    global_batch_size: int
    rampup: tuple[int, int, int] | None = None

    def batch_size(self, consumed: int) -> int:
        """Samples in the step that begins after `consumed` samples, ramped as in megatron-core."""
        if self.rampup is None or consumed > self.rampup[2]:
            return self.global_batch_size
        first, increment, samples = self.rampup
        increments = (self.global_batch_size - first) // increment
        return first + int(consumed / (samples / increments)) * increment

    def batch_sizes(self, consumed: int = 0) -> list[int]:
        """The sizes of the steps from `consumed` samples on, the first ones first."""
        if self.rampup is None:
            return [self.global_batch_size]
        first, last = self.batch_size(consumed), self.global_batch_size
        return [*range(first, last, self.rampup[1]), last]

    def num_microbatches(self, batch_size: int) -> int:
        """Forward passes of a rank in a step of `batch_size` samples."""
        return batch_size // (self.micro_batch_size * self.data_parallel_size)

    def end(self, t: TrainingFlags, iteration: int = 0, consumed: int = 0) -> tuple[int, int]:
        """(steps, samples) of the whole run, counted from `iteration` and `consumed` samples on;
        never more than --train-samples."""
        if t.train_samples is None:
            assert t.train_iters is not None, "parse() wants one of the two"
            left = max(t.train_iters - iteration, 0)
            return iteration + left, consumed + left * self.global_batch_size
        while self.rampup and consumed <= min(self.rampup[2], t.train_samples):
            if consumed + self.batch_size(consumed) > t.train_samples:
                return iteration, consumed
            consumed += self.batch_size(consumed)
            iteration += 1
        left = max(t.train_samples - consumed, 0) // self.global_batch_size
        return iteration + left, consumed + left * self.global_batch_size


def lay_out(args: Arguments, model: ModelConfig, world_size: int, consumed: int = 0) -> Layout:
    """Divides the run over its ranks.

    Args:
        model: the resolved shape.
        world_size: ranks of the job.
        consumed: samples that a resumed run has trained on: its batches from there on count.

    Raises:
        ConfigError: naming the flag, its value and the way out.
    """
    p, t = args.parallel, args.training
    dp = divide_ranks(p, model, world_size)
    batch = t.global_batch_size or t.micro_batch_size * dp
    rampup = None
    if t.rampup_batch_size:
        first, increment, ramp_samples = t.rampup_batch_size
        rampup = (first, increment, ramp_samples)
        if not 0 < first < batch or (batch - first) % increment:
            raise ConfigError(
                f"--rampup-batch-size {first} {increment} ...: steps of {increment} do not lead "
                f"from {first} to --global-batch-size {batch}"
            )
    layout = Layout(dp, t.micro_batch_size, batch, rampup)
    _check_experts(p, model, dp * p.context_parallel_size, t.moe_aux_loss_coeff)
    check_batches(args, layout, consumed)
    layers = model.num_layers // p.pipeline_model_parallel_size
    _check_interleaving(p, layers, layout, layout.batch_sizes(consumed))
    _check_window(args, model)
    return layout


def divide_ranks(p: ParallelFlags, model: ModelConfig, world_size: int) -> int:
    """Divides a model over the ranks of a job; returns how many replicas of it they hold.

    Raises:
        ConfigError: the ranks, or the model's shape, do not divide.
    """
    tp, pp, cp = (
        p.tensor_model_parallel_size,
        p.pipeline_model_parallel_size,
        p.context_parallel_size,
    )
    if world_size % (tp * pp * cp):
        raise ConfigError(
            f"{world_size} ranks do not divide into --tensor-model-parallel-size {tp} x "
            f"--pipeline-model-parallel-size {pp} x --context-parallel-size {cp}; start a "
            f"multiple of {tp * pp * cp} ranks"
        )
    _check_shape(p, model)
    return world_size // (tp * pp * cp)


def check_batches(args: Arguments, layout: Layout, consumed: int = 0) -> None:
    """Every batch from `consumed` samples on must divide into the micro-batches of the ranks.

    Raises:
        ConfigError: naming the flag, its value and the way out.
    """
    ranks = layout.data_parallel_size
    for batch in layout.batch_sizes(consumed):
        if batch % (layout.micro_batch_size * ranks):
            name, ramped = "--global-batch-size", batch != layout.global_batch_size
            if ramped:
                name = f"--rampup-batch-size {' '.join(map(str, args.training.rampup_batch_size))}:"
            raise ConfigError(
                f"{name} {'a batch of ' if ramped else ''}{batch} is not a multiple of "
                f"--micro-batch-size {layout.micro_batch_size} x {ranks} data-parallel ranks"
            )


def _check_shape(p: ParallelFlags, model: ModelConfig) -> None:
    tp, pp = p.tensor_model_parallel_size, p.pipeline_model_parallel_size
    ffn = "ffn_hidden_size" if model.num_experts is None else "moe_ffn_hidden_size"
    for name in ("num_attention_heads", ffn, "padded_vocab_size"):
        if getattr(model, name) % tp:
            raise ConfigError(
                f"{name} {getattr(model, name)} is not a multiple of "
                f"--tensor-model-parallel-size {tp}"
            )
    if model.num_query_groups % tp and tp % model.num_query_groups:
        raise ConfigError(
            f"--num-query-groups {model.num_query_groups} and --tensor-model-parallel-size "
            f"{tp}: one must divide the other"
        )
    if model.num_layers % pp:
        raise ConfigError(
            f"--num-layers {model.num_layers} is not a multiple of "
            f"--pipeline-model-parallel-size {pp}"
        )


def _check_experts(p: ParallelFlags, model: ModelConfig, ranks: int, aux_loss_coeff: float) -> None:
    """`ranks`: those that have other tokens and the same weights, but for the experts."""
    tp, ep, experts = p.tensor_model_parallel_size, p.expert_model_parallel_size, model.num_experts
    if experts is None:
        for name, value, off in (
            ("--expert-model-parallel-size", ep, 1),
            ("--moe-aux-loss-coeff", aux_loss_coeff, 0),
        ):
            if value != off:
                raise ConfigError(f"{name} {value} has no effect: the model has no experts")
        return
    if tp > 1 and not p.sequence_parallel:  # as in megatron-core
        raise ConfigError(
            f"--tensor-model-parallel-size {tp} needs --sequence-parallel in a mixture of experts"
        )
    if aux_loss_coeff and tp * p.context_parallel_size > 1:
        # megatron-core 0.16.1 multiplies it by the tokens of one rank, which are not all.
        raise ConfigError(
            f"--moe-aux-loss-coeff {aux_loss_coeff} counts less where ranks share a sequence: it "
            "needs --tensor-model-parallel-size and --context-parallel-size 1"
        )
    if experts % ep:
        raise ConfigError(
            f"--num-experts {experts} is not a multiple of --expert-model-parallel-size {ep}"
        )
    if ranks % ep:
        raise ConfigError(
            f"--expert-model-parallel-size {ep} does not divide the {ranks} ranks that are data- "
            "or context-parallel"
        )


def _check_interleaving(p: ParallelFlags, layers: int, layout: Layout, batches: list[int]) -> None:
    """Model chunks must divide a rank's `layers`; each of `batches` must fill the schedule."""
    pp, chunk = p.pipeline_model_parallel_size, p.num_layers_per_virtual_pipeline_stage
    if chunk is None:
        return
    if pp == 1 or layers % chunk or layers == chunk:
        raise ConfigError(
            f"--num-layers-per-virtual-pipeline-stage {chunk} must divide the {layers} layers "
            f"of a rank into at least two chunks, with --pipeline-model-parallel-size {pp} "
            "above 1"
        )
    for batch in batches:
        if layout.num_microbatches(batch) % pp:
            raise ConfigError(
                f"an interleaved pipeline needs the {layout.num_microbatches(batch)} "
                f"micro-batches of a step of {batch} samples to be a multiple of "
                f"--pipeline-model-parallel-size {pp}; change --global-batch-size"
            )


def _check_window(args: Arguments, model: ModelConfig) -> None:
    p, window = args.parallel, args.data.seq_length
    tp, cp = p.tensor_model_parallel_size, p.context_parallel_size
    if cp > 1 and window % (2 * cp):
        raise ConfigError(
            f"--context-parallel-size {cp} needs --seq-length {window} to be a multiple "
            f"of {2 * cp}: each rank holds two chunks"
        )
    if p.sequence_parallel and window // cp % tp:
        raise ConfigError(
            f"--sequence-parallel needs --seq-length {window} / --context-parallel-size "
            f"{cp} to be a multiple of --tensor-model-parallel-size {tp}"
        )
    if window > model.max_position_embeddings:
        raise ConfigError(
            f"--seq-length {window} (the window L) is greater than "
            f"--max-position-embeddings {model.max_position_embeddings} (the target T); "
            "raise the latter or shorten the former"
        )
    scaling = model.rope_scaling
    reach = scaling.factor * (scaling.original_max_position_embeddings or math.inf)
    bounded = scaling.interpolation.reaches_factor_times_window
    if bounded and model.max_position_embeddings > reach:
        raise ConfigError(
            f"--rope-scaling {scaling} reaches {reach:g} positions, not the "
            f"{model.max_position_embeddings} of --max-position-embeddings; leave "
            "--rope-scaling-factor out, or raise it"
        )
    if not scaling.interpolation.trains:  # raises, and says why
        inverse_frequencies(model.rotary_dim, model.rotary_base, scaling)
