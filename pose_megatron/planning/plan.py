"""A run before it has a cluster: every pipeline stage of it, its time, and what would help."""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pose_megatron.checkpoints.huggingface.config_json import read_config
from pose_megatron.checkpoints.megatron import directory
from pose_megatron.config.flags import Arguments, CheckpointFlags, DataFlags, PositionFlags
from pose_megatron.config.layout import Layout, lay_out
from pose_megatron.config.model import resolve_model
from pose_megatron.config.sampler import build_sampler
from pose_megatron.errors import ConfigError
from pose_megatron.models.shape import ModelConfig
from pose_megatron.planning.gpus import Rates
from pose_megatron.planning.prediction import Prediction, predict
from pose_megatron.planning.stage import AXES, Stage, measure, sketch
from pose_megatron.preprocessing.tokenizer import build_tokenizer
from pose_megatron.training.run import Run, starting_point

GIB = 2**30


@dataclass(frozen=True)
class Job:
    """A run on so many GPUs."""

    run: Run
    layout: Layout
    world_size: int

    @property
    def window(self) -> int:
        return self.run.args.data.seq_length

    @property
    def micro_batches(self) -> int:
        return self.layout.num_microbatches(self.layout.global_batch_size)

    @property
    def tokens(self) -> int:
        """In a step."""
        return self.layout.global_batch_size * self.window

    @property
    def flops(self) -> float:
        """Of the model in a step, without recomputation: what the trainer's log counts."""
        return self.run.model.flops_per_token(self.window) * self.tokens

    def stage(self, number: int, whole: bool = False) -> Stage:
        """A pipeline stage, by its number: a sketch from a few of its layers, or run `whole`."""
        look = measure if whole else sketch
        return look(self.run, self.layout, self.world_size, number)

    def ends(self) -> list[Stage]:
        """Sketches of the first and the last pipeline stage, of which one is the fullest."""
        numbers = {0, self.run.args.parallel.pipeline_model_parallel_size - 1}
        return [self.stage(number) for number in sorted(numbers)]

    def predict(self, stages: list[Stage], rates: Rates) -> Prediction:
        """The time of a step; the slowest stage must be among `stages`."""
        p = self.run.args.parallel
        return predict(
            stages,
            rates,
            p,
            self.micro_batches,
            self.layout.data_parallel_size,
            p.virtual_pipeline_size(self.run.model.num_layers) or 1,
        )

    def sent(self, stages: list[Stage]) -> dict[str, float]:
        """{axis: bytes that a GPU sends in a step}, of the stage that sends most."""
        return {
            axis: max(s.batch.sent[axis] * self.micro_batches + s.step.sent[axis] for s in stages)
            for axis in AXES
        }

    def count(self, stages: list[Stage], what: str) -> float:
        """Launches or waits of a step, of the stage that has most."""
        return max(
            getattr(s.batch, what) * self.micro_batches + getattr(s.step, what) for s in stages
        )

    def changed(self, **flags: Any) -> "Job":
        """The job with other flags.

        Raises:
            ConfigError: they do not fit it.
        """
        return job(_with(self.run.args, flags), self.run.model, self.world_size)

    def at_full_length(self) -> "Job":
        """Training on all T tokens of the target window instead, in the same layout; a step has as
        many samples."""
        return self.changed(seq_length=self.run.model.max_position_embeddings)


def job(args: Arguments, model: ModelConfig, world_size: int) -> Job:
    """Checks a run's flags against a number of GPUs.

    Raises:
        ConfigError: the layout does not divide, or a flag does not fit another.
    """
    impl = args.model.transformer_impl
    if impl != "torch":
        raise ConfigError(
            f"--transformer-impl {impl} cannot be planned, as its kernels need a GPU: plan with "
            "--transformer-impl torch, which holds more"
        )
    t = args.training
    again = [name for name in t.recompute_modules if name not in ("core_attn", "mlp")]
    if t.recompute_granularity == "selective" and again:
        raise ConfigError(
            f"--recompute-modules {again[0]} cannot be planned, as it needs Transformer Engine: "
            "plan with core_attn and mlp, or with --recompute-granularity full"
        )
    # What is read and written, and where positions are, takes no memory, and need not be there.
    data = DataFlags(seq_length=args.data.seq_length)
    args = dataclasses.replace(
        args, data=data, position=PositionFlags(), checkpoint=CheckpointFlags()
    )
    if not (args.training.train_iters or args.training.train_samples):
        args = _with(args, {"train_iters": 1000, "lr_warmup_iters": 0})  # memory knows no length
    layout = lay_out(args, model, world_size)
    return Job(
        Run(args, model, build_sampler(args, model.max_position_embeddings, None)),
        layout,
        world_size,
    )


def model_of(args: Arguments) -> ModelConfig:
    """The model of the flags, and of what the run starts from; --load may also be a Hugging Face
    folder or its config.json. No weights are read.

    Raises:
        ConfigError: a flag is missing or contradicts it, or there is no such model.
        DamagedCheckpoint: it cannot be read.
    """
    loaded: ModelConfig | None = None
    load = args.checkpoint.load or ""
    folder = Path(load).parent if load.endswith("config.json") else Path(load)
    if load and (folder / "config.json").is_file() and not directory.exists(str(folder)):
        loaded = read_config(folder, args.model.make_vocab_size_divisible_by or 128)
    else:
        with contextlib.redirect_stdout(sys.stderr):  # JSON has stdout
            start, _ = starting_point(args.checkpoint)
        if start:
            loaded = start.model
    vocabulary = None
    if args.data.tokenizer_model:
        tokenizer = build_tokenizer(args.data.tokenizer_type, args.data.tokenizer_model)
        vocabulary = tokenizer.vocab_size
    return resolve_model(args.model, args.data.seq_length, loaded, vocabulary)


def _with(args: Arguments, flags: dict[str, Any]) -> Arguments:
    """Arguments with some flags replaced, by their fields' names."""
    groups = {}
    for f in dataclasses.fields(args):
        group = getattr(args, f.name)
        own = {name: flags[name] for name in flags if hasattr(group, name)}
        groups[f.name] = dataclasses.replace(group, **own)
    return Arguments(**groups)


def layout_of(job: Job) -> str:
    """The layout in words."""
    p, t = job.run.args.parallel, job.run.args.training
    vpp = p.num_layers_per_virtual_pipeline_stage
    words = (
        f"tensor {p.tensor_model_parallel_size} x pipeline {p.pipeline_model_parallel_size} x "
        f"context {p.context_parallel_size} x data {job.layout.data_parallel_size}"
    )
    if vpp:
        words += f", chunks of {vpp} layers"
    if p.expert_model_parallel_size > 1:
        words += f", experts over {p.expert_model_parallel_size} ranks"
    if t.recompute_granularity == "full":
        words += ", full recompute"
    elif t.recompute_granularity:
        words += f", recompute of {', '.join(t.recompute_modules)}"
    return words


@dataclass(frozen=True)
class Remedy:
    """A change that lowers the peak.

    Attributes:
        flags: as the user writes them.
        peak: bytes of the fullest stage.
    """

    flags: str
    peak: int


def remedies(planned: Job, count: int = 3) -> list[Remedy]:
    """The changes that lower the peak most, the best first."""
    found = []
    for text, flags in _changes(planned):
        try:
            changed = planned.changed(**flags)
        except ConfigError:  # it does not divide
            continue
        found.append(Remedy(text, max(stage.peak for stage in changed.ends())))
    return sorted(found, key=lambda remedy: remedy.peak)[:count]


def _changes(planned: Job) -> Iterator[tuple[str, dict[str, Any]]]:
    args, p, t = planned.run.args, planned.run.args.parallel, planned.run.args.training
    if planned.layout.data_parallel_size > 1 and not p.use_distributed_optimizer:
        yield "--use-distributed-optimizer", {"use_distributed_optimizer": True}
    if t.recompute_granularity != "full":
        yield (
            "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
            {
                "recompute_granularity": "full",
                "recompute_method": "uniform",
                "recompute_num_layers": 1,
            },
        )
    tp, pp, cp = (
        p.tensor_model_parallel_size,
        p.pipeline_model_parallel_size,
        p.context_parallel_size,
    )
    batch = {"global_batch_size": planned.layout.global_batch_size}
    yield (
        f"--tensor-model-parallel-size {2 * tp} --sequence-parallel",
        {"tensor_model_parallel_size": 2 * tp, "sequence_parallel": True} | batch,
    )
    if tp > 1 and not p.sequence_parallel:
        yield "--sequence-parallel", {"sequence_parallel": True}
    yield (
        f"--pipeline-model-parallel-size {2 * pp}",
        {"pipeline_model_parallel_size": 2 * pp, "num_layers_per_virtual_pipeline_stage": None}
        | batch,
    )
    yield f"--context-parallel-size {2 * cp}", {"context_parallel_size": 2 * cp} | batch
    if planned.run.model.num_experts:
        ep = 2 * p.expert_model_parallel_size
        yield f"--expert-model-parallel-size {ep}", {"expert_model_parallel_size": ep}
    if args.training.micro_batch_size > 1:
        yield "--micro-batch-size 1", {"micro_batch_size": 1} | batch
