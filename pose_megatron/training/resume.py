"""What a resumed run takes from its flags, and what from the checkpoint: one rule for every flag.

    CHANGES  may differ from the checkpoint: the flag counts, and one line says what it was
    FIXED    may not: the optimizer's state has no meaning under another value
    FREE     are each start's own: where it reads and writes, how fast it is, when it stops
    SHAPE    the checkpoint's count, whatever the run; config.model refuses others by name

The rope may only be extended. Everything else that a checkpoint holds, such as the optimizer's
moments, the schedule's progress and the samples consumed, is the checkpoint's.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from pose_megatron.checkpoints.megatron.directory import (
    AS_IT_LIES,
    Checkpoint,
    optimizer_form,
    stored_record,
)
from pose_megatron.config.flags import (
    CheckpointFlags,
    DataFlags,
    LoggingFlags,
    ModelFlags,
    ParallelFlags,
    PositionFlags,
    TrainingFlags,
)
from pose_megatron.config.layout import Layout
from pose_megatron.data.blend import Prefixes, blends, parse_blend
from pose_megatron.errors import ConfigError, flag_name
from pose_megatron.training.run import Run


def _names(group: type) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(group))


CHANGES = (
    *("micro_batch_size", "global_batch_size", "rampup_batch_size", "train_iters"),
    *("train_samples", "lr", "min_lr", "lr_decay_style", "lr_decay_iters", "lr_decay_samples"),
    *("lr_warmup_iters", "lr_warmup_samples", "lr_wsd_decay_iters", "lr_wsd_decay_samples"),
    *("lr_wsd_decay_style", "weight_decay", "moe_aux_loss_coeff", "clip_grad", "adam_beta1"),
    *("adam_beta2", "adam_eps", "seed"),
    *("data_path", "train_data_path", "valid_data_path", "test_data_path", "split", "data_mode"),
    *("packed_skips", "materialized", "seq_length", "short_documents", "tokenizer_type"),
    *("tokenizer_model", "max_position_embeddings"),
    *_names(PositionFlags),
    *("tensor_model_parallel_size", "pipeline_model_parallel_size"),
    *("num_layers_per_virtual_pipeline_stage", "context_parallel_size"),
    *("expert_model_parallel_size", "sequence_parallel"),
)
FIXED = ("bf16", "use_distributed_optimizer")
# On which it depends how an optimizer lies in its ranks' buffers.
BUFFERS = (
    *("tensor_model_parallel_size", "pipeline_model_parallel_size"),
    *("num_layers_per_virtual_pipeline_stage", "expert_model_parallel_size", "overlap_grad_reduce"),
)
FREE = (
    *_names(CheckpointFlags),
    *_names(LoggingFlags),
    *("data_args_path", "data_cache_path", "num_workers", "init_method_std"),
    *("transformer_impl", "attention_backend", "model_class", "fused_rotary"),
    *("fused_cross_entropy", "bias_swiglu_fusion", "gradient_accumulation_fusion"),
    *("exit_duration_in_mins", "max_skipped_iterations"),
    *("loss_spike_factor", "recompute_granularity", "recompute_method"),
    *("recompute_num_layers", "recompute_modules", "overlap_grad_reduce"),
    *("overlap_param_gather", "device", "distributed_timeout_minutes"),
)
SHAPE = tuple(
    name for name in _names(ModelFlags) if name not in FREE and name != "max_position_embeddings"
)
# What Megatron-LM's args mean by the same name. Its seq_length is not among them: the checkpoints
# that it exchanges with others have the window T there.
_STOCK = (
    *("micro_batch_size", "global_batch_size", "train_iters", "train_samples", "lr", "min_lr"),
    *("lr_decay_style", "weight_decay", "clip_grad", "adam_beta1", "adam_beta2", "adam_eps"),
    *("seed", "data_path", "use_distributed_optimizer", "tensor_model_parallel_size"),
    *("pipeline_model_parallel_size", "context_parallel_size"),
)


def settings(run: Run, layout: Layout) -> dict[str, Any]:
    """What a checkpoint records of a run, for `changes`: {flag: value}, with defaults filled in."""
    args = run.args
    found: dict[str, Any] = {}
    for group in (args.position, args.data, args.training, args.parallel):
        found |= dataclasses.asdict(group)
    blended = _blends(args.data)
    found |= {
        "global_batch_size": layout.global_batch_size,
        "position_sampler": run.sampler.name,
        "max_position_embeddings": run.model.max_position_embeddings,
        **{name: _words(blend) for name, blend in blended.items()},
    }
    for name in ("materialized", "tokenizer_model"):
        found[name] = str(Path(found[name]).resolve()) if found[name] else None
    return {name: found[name] for name in (*CHANGES, *FIXED)} | {
        "corpora": {} if args.data.materialized else _corpora(blended.values()),
        "overlap_grad_reduce": _buckets(args.parallel, layout),
    }


def _buckets(p: ParallelFlags, layout: Layout) -> str | None:
    """How megatron-core's DistributedDataParallel divides its buffers; None: not at all."""
    millions = max(40, layout.data_parallel_size * p.context_parallel_size)
    return f"buckets of {millions},000,000 parameters" if p.overlap_grad_reduce else None


def _blends(data: DataFlags) -> dict[str, Prefixes | None]:
    """The corpora that each flag names; --data-path also has those of --data-args-path."""
    names = ("data_path", "train_data_path", "valid_data_path", "test_data_path")
    if not (data.data_args_path or any(getattr(data, name) for name in names)):
        return dict.fromkeys(names)
    one, several = blends(data)
    return dict(zip(names, (one, *(several or [None] * 3)), strict=True))


def _words(blend: Prefixes | None) -> list[str]:
    """A blend as a flag gives it, in the same words for the same files."""
    if blend is None:
        return []
    prefixes, weights = blend
    paths = [str(Path(prefix).resolve()) for prefix in prefixes]
    return paths if weights is None else [*chain(*zip(map(str, weights), paths, strict=True))]


def _corpora(blended: Iterable[Prefixes | None]) -> dict[str, list[int]]:
    """{prefix: bytes of its .idx and .bin}, as a corpus may be written anew under its name."""
    prefixes = {prefix for blend in blended if blend for prefix in blend[0]}
    return {
        str(Path(prefix).resolve()): [_size(prefix + end) for end in (".idx", ".bin")]
        for prefix in sorted(prefixes)
    }


def _size(file: str) -> int:
    return Path(file).stat().st_size if Path(file).is_file() else 0


def stored_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """`settings` of the run that saved a checkpoint, as far as it says."""
    record = stored_record(checkpoint.common)
    if "settings" in record:
        return record["settings"]
    args = vars(checkpoint.common["args"])
    found = {name: args[name] for name in _STOCK if args.get(name) is not None}
    if found.get("data_path"):
        found["data_path"] = _words(parse_blend([*map(str, found["data_path"])], "data_path"))
    found["bf16"] = args.get("params_dtype") == torch.bfloat16
    if "global_batch_size" not in found and checkpoint.iteration:
        found["global_batch_size"] = checkpoint.consumed_samples // checkpoint.iteration
    return found


def changes(run: Run, layout: Layout) -> Iterator[str]:
    """What a resumed run changes, a line for each.

    Raises:
        ConfigError: a flag asks for what a resumed run cannot have; names it.
    """
    loaded = run.loaded
    if loaded is None or not run.resume:
        return
    before, now = stored_settings(loaded), settings(run, layout)
    for name in FIXED:
        if name in before and bool(before[name]) != now[name]:
            raise ConfigError(
                f"checkpoint {loaded.path} was saved {'with' if before[name] else 'without'} "
                f"{flag_name(name)}: resume the same way, or start anew with --finetune"
            )
    window = loaded.model.max_position_embeddings
    if run.model.max_position_embeddings <= window:
        if run.model.rope_scaling != loaded.model.rope_scaling:
            raise ConfigError(
                f"--rope-scaling {run.model.rope_scaling} is not the checkpoint's, "
                f"{loaded.model.rope_scaling}: a resumed run may only extend it, with a greater "
                f"--max-position-embeddings than {window}; leave the rope flags out, or start anew "
                "with --finetune"
            )
    if optimizer_form(loaded.common) == AS_IT_LIES:
        for name in BUFFERS:
            if name in before and _comparable(before[name]) != _comparable(now[name]):
                raise ConfigError(
                    f"checkpoint {loaded.path} keeps its optimizer as its ranks had it "
                    "(--no-dist-ckpt-optim-fully-reshardable), and this run has it otherwise: "
                    f"{_change(name, before[name], now[name])}. Resume in the same layout; what is "
                    "saved at the end or at a stop every layout takes. Or start from its weights "
                    "with --finetune"
                )
    for name in CHANGES:
        if name in before and _comparable(before[name]) != _comparable(now[name]):
            yield f"changed since {loaded.path.name}: {_change(name, before[name], now[name])}"
    for prefix, sizes in before.get("corpora", {}).items():
        if now["corpora"].get(prefix, sizes) != sizes:
            yield (
                f"changed since {loaded.path.name}: {prefix} itself, of {sizes} bytes then and "
                f"{now['corpora'][prefix]} now"
            )


def _comparable(value):
    return list(value) if isinstance(value, list | tuple) and value else value or None


def _change(name: str, before, now) -> str:
    def said(value) -> str:
        if isinstance(value, list | tuple):
            return " ".join(map(str, value)) or "none"
        return "none" if value is None else str(value)

    return f"{flag_name(name)} {said(before)} -> {said(now)}"


def schedule_progress(checkpoint: Checkpoint, counted: int, t: TrainingFlags, batch: int) -> int:
    """How many samples of the schedule are done, which counts samples.

    In a run of --train-iters each step counts as many as today's batch has, so that another batch
    size leaves it at the same step.

    Args:
        counted: by the run that saved the checkpoint.
        batch: today's --global-batch-size.
    """
    before = stored_settings(checkpoint)
    counted_steps = not before.get("train_samples")
    if t.train_samples:
        return checkpoint.consumed_samples if counted_steps else counted
    if not counted_steps:
        return checkpoint.iteration * batch
    return round(counted * batch / before.get("global_batch_size", batch))


def trained_tokens(checkpoint: Checkpoint, window: int) -> int:
    """How many tokens the run has been trained on so far.

    Args:
        window: L, of a run that does not say with which it was trained.
    """
    record = stored_record(checkpoint.common)
    return record.get("consumed_tokens", checkpoint.consumed_samples * window)
