"""Flags and run.yaml in, frozen dataclasses out, every value checked once.

Each dataclass below is one group of flags. A field `seq_length` is the flag `--seq-length` and the
YAML key `seq-length` (or `seq_length`); names and meanings are Megatron-LM's wherever it has one:
`--seq-length` is the training window L, `--max-position-embeddings` the target window T.

`parse()` reads the words, `model_config.resolve_model()` settles the model's shape, and
`layout.lay_out()` holds what the layout of ranks demands.
"""

import argparse
import dataclasses
import sys
import types
import typing
from dataclasses import dataclass
from pathlib import Path

from pose_megatron.model_config import ModelFlags, flag, spell
from pose_megatron.samplers import CONTENTS, SAMPLERS, SKIP_LAWS

LR_DECAY_STYLES = ("constant", "linear", "cosine", "inverse-square-root", "WSD")


@dataclass(frozen=True)
class PositionFlags:
    """Positions of the training samples; validation always uses plain ones"""

    position_sampler: str | None = flag(
        None, f"{', '.join(SAMPLERS)}; full is plain (default: pose when T > L, else full)")
    pose_num_chunks: int = flag(2, "chunks N that a window is cut into")
    pose_content: str = flag(
        "uniform", "where a chunk's text comes from: v uniform, v = 0, or v = u", CONTENTS)
    pose_skip_law: str = flag(
        "chain", "of u: the paper's equation 4, or N - 1 uniform values in order, which for many "
        "chunks does not crowd toward T", SKIP_LAWS)
    pose_boundaries: list[str] = flag(
        [], "pose-boundary, longrecipe: chunks start after these tokens; an id, or a text that "
        "the token is or ends with (longrecipe's default: . ! ? and newline)", nargs="+")
    pose_plain_fraction: float = flag(
        0.0, "share of samples with plain positions and contiguous text")
    pose_target_schedule: list[str] = flag(
        [], "a target that grows: '0:8192 64000:32768 128000:131072' says from which sample on "
        "which target, the last of them T", nargs="+")


@dataclass(frozen=True)
class DataFlags:
    """Data"""

    data_path: list[str] = flag(
        [], "corpus prefixes, or 'weight prefix weight prefix ...'", nargs="+")
    data_args_path: str | None = flag(None, "a file with the words of --data-path")
    train_data_path: list[str] = flag([], "corpora of training alone, like --data-path", nargs="+")
    valid_data_path: list[str] = flag([], "corpora of validation alone", nargs="+")
    test_data_path: list[str] = flag([], "corpora of a test after the last step", nargs="+")
    split: str | None = flag(
        None, "train,valid,test shares of the documents (default: 969,30,1)")
    data_cache_path: str | None = flag(
        None, "folder for dataset indices, made once and memory-mapped; jobs may share it "
        "(default: in memory)")
    data_mode: str = flag(
        "document", "a sample is cut from one document, or from all packed end to end",
        ("document", "packed"))
    packed_skips: str = flag(
        "document", "packed: text skips stay inside a document, or go up to T tokens along the "
        "stream", ("document", "stream"))
    materialized: str | None = flag(
        None, "train on the samples that tools/materialize_positions.py wrote at this prefix")
    seq_length: int = flag(2048, "training window L in tokens")
    short_documents: str = flag(
        "drop", "documents below L + 1 tokens: drop them, or pack them end to end",
        ("drop", "pack"))
    tokenizer_type: str = flag(
        "HuggingFaceTokenizer", "", ("SentencePieceTokenizer", "HuggingFaceTokenizer"))
    tokenizer_model: str | None = flag(
        None, "tokenizer file or folder; copied into checkpoints")
    num_workers: int = flag(2, "loader processes of a rank; 0 loads in the training process")


@dataclass(frozen=True)
class TrainingFlags:
    """Training"""

    micro_batch_size: int = flag(1, "samples in one forward pass of a rank")
    global_batch_size: int | None = flag(None, "samples in a step (default: micro x data ranks)")
    rampup_batch_size: list[int] = flag(
        [], "with --train-samples: first batch, increment, and samples after which "
        "--global-batch-size is reached", nargs=3)
    train_iters: int | None = flag(None, "steps of the whole run")
    train_samples: int | None = flag(
        None, "samples of the whole run, in place of --train-iters; the --lr flags then count "
        "samples, too")
    lr: float = flag(1e-4, "peak learning rate")
    min_lr: float = flag(0.0, "final learning rate")
    lr_decay_style: str = flag("cosine", "", LR_DECAY_STYLES)
    lr_decay_iters: int | None = flag(None, "steps of decay (default: --train-iters)")
    lr_decay_samples: int | None = flag(None, "samples of decay (default: --train-samples)")
    lr_warmup_iters: int = flag(0, "steps of linear warm-up")
    lr_warmup_samples: int = flag(0, "samples of linear warm-up")
    lr_wsd_decay_iters: int | None = flag(None, "with WSD: steps of the final decay")
    lr_wsd_decay_samples: int | None = flag(None, "with WSD: samples of the final decay")
    lr_wsd_decay_style: str = flag(
        "exponential", "with WSD: shape of the final decay",
        ("exponential", "linear", "cosine", "minus_sqrt"))
    weight_decay: float = flag(0.01, "decoupled; not for norms")
    clip_grad: float = flag(1.0, "largest gradient norm; 0 never clips")
    adam_beta1: float = flag(0.9, "")
    adam_beta2: float = flag(0.95, "")
    adam_eps: float = flag(1e-8, "")
    bf16: bool = flag(False, "bfloat16 weights and activations, float32 main copies and gradients")
    seed: int = flag(1234, "of weights, sample order and positions")
    exit_duration_in_mins: float | None = flag(None, "save and stop after so many minutes")
    max_skipped_iterations: int = flag(
        5, "stop after so many steps in a row whose loss or gradient was not finite; such a step "
        "changes no weight")
    loss_spike_factor: float = flag(
        1.5, "name the samples of a step whose loss is above so many times the mean of the last "
        "20; 0 never does")
    recompute_granularity: str | None = flag(
        None, "compute activations again in the backward pass: of whole layers, or selectively",
        ("full", "selective"))
    recompute_method: str | None = flag(
        None, "with full: groups of layers, or the first layers", ("uniform", "block"))
    recompute_num_layers: int | None = flag(None, "with full: layers of a group, or how many")
    recompute_modules: list[str] = flag(
        ["core_attn"], "with selective: which (default: core_attn)", nargs="+")


@dataclass(frozen=True)
class ParallelFlags:
    """Layout of the ranks; what is left over is data parallel"""

    tensor_model_parallel_size: int = flag(1, "")
    pipeline_model_parallel_size: int = flag(1, "")
    num_layers_per_virtual_pipeline_stage: int | None = flag(
        None, "interleave the pipeline: layers of one model chunk")
    context_parallel_size: int = flag(1, "ranks that share a sequence")
    sequence_parallel: bool = flag(False, "split activations between layers over the tensor ranks")
    use_distributed_optimizer: bool = flag(False, "shard optimizer state over the data ranks")
    overlap_grad_reduce: bool = flag(False, "reduce gradients while the backward pass goes on")
    overlap_param_gather: bool = flag(
        False, "gather weights while the forward pass goes on; with the two flags above")
    distributed_timeout_minutes: int = flag(10, "of a collective before the run gives up")

    def virtual_pipeline_size(self, num_layers: int) -> int | None:
        """Model chunks of a rank; None without interleaving."""
        if self.num_layers_per_virtual_pipeline_stage is None:
            return None
        per_rank = num_layers // self.pipeline_model_parallel_size
        return per_rank // self.num_layers_per_virtual_pipeline_stage


@dataclass(frozen=True)
class CheckpointFlags:
    """Checkpoints, in Megatron-LM's directory layout"""

    load: str | None = flag(
        None, "folder with latest_checkpointed_iteration.txt; where it is --save's, too, the first "
        "start of a job may find it empty")
    save: str | None = flag(None, "folder to write iter_0000000/ into")
    save_interval: int | None = flag(None, "steps between saves (default: only at the end)")
    async_save: bool = flag(False, "write checkpoints in the background")
    save_retain: int | None = flag(None, "keep only so many checkpoints of --save (default: all)")
    load_fallback: bool = flag(False, "where the latest of --load is damaged, take the one before")
    finetune: bool = flag(False, "take only the weights of --load and start at step 0")
    pretrained_checkpoint: str | None = flag(
        None, "take its weights and start at step 0 where --load holds no checkpoint yet: a job "
        "with the same --load and --save can then be restarted as it is")


@dataclass(frozen=True)
class LoggingFlags:
    """Evaluation and log"""

    log_interval: int = flag(10, "steps between log lines")
    eval_interval: int | None = flag(None, "steps between validations (default: never)")
    eval_iters: int = flag(10, "batches of a validation")
    tensorboard_dir: str | None = flag(None, "write scalars for TensorBoard here")
    wandb_project: str | None = flag(None, "send scalars to this project of Weights & Biases; "
                                     "WANDB_MODE=offline keeps them on disk")
    wandb_exp_name: str | None = flag(None, "name of the run there")
    wandb_save_dir: str | None = flag(None, "folder of its files (default: wandb/)")
    log_file: str | None = flag(None, "append one JSON object per log line here")
    dry_run: bool = flag(False, "print the resolved run and exit")


@dataclass(frozen=True)
class Arguments:
    """Everything a run is a function of. `model` says what was asked of the model's shape."""

    model: ModelFlags
    position: PositionFlags
    data: DataFlags
    training: TrainingFlags
    parallel: ParallelFlags
    checkpoint: CheckpointFlags
    logging: LoggingFlags


def _groups() -> dict[str, type]:
    return {f.name: f.type for f in dataclasses.fields(Arguments)}


# Flags of Megatron-LM that users bring along and that would be wrong here, or mean nothing.
REFUSED = {
    "reset_position_ids": "positions come from --position-sampler and never start again inside a "
                          "sample",
    "reset_attention_mask": "samples are dense rows under a causal mask by token index",
    "sft": "packed (THD) sequences have no place for skip-wise positions",
    "mtp_num_layers": "multi-token prediction shifts tokens and not their angles",
    "apply_rope_fusion": "the fused kernel takes one row of angles for a whole micro-batch",
    "fused_single_qkv_rope": "the fused kernel takes one row of angles for a whole micro-batch",
    "enable_cuda_graph": "a captured graph replays the angles of other samples",
    "external_cuda_graph": "a captured graph replays the angles of other samples",
    "cuda_graph_impl": "a captured graph replays the angles of other samples",
    "position_embedding_type": "rope is all there is",
    "use_rotary_position_embeddings": "rope is all there is",
    "rotary_seq_len_interpolation_factor": "say --rope-scaling linear --rope-scaling-factor",
    "num_experts": "mixtures of experts are not supported",
    "fp16": "float16 is not supported; say --bf16",
}


def _refuse(name: str) -> None:
    if name in REFUSED:
        raise ValueError(f"{spell(name)} cannot be used: {REFUSED[name]}; leave it out")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(f"{message}; see --help")  # one rank prints it, not every one


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="pretrain_pose.py",
        description="Train a RoPE language model on windows of --seq-length tokens whose position\n"
        "ids reach --max-position-embeddings (PoSE), on megatron-core.",
        epilog="example:\n"
        "  torchrun --nproc-per-node 8 pretrain_pose.py --load llama --finetune --save out \\\n"
        "      --data-path books_text_document --seq-length 4096 \\\n"
        "      --max-position-embeddings 131072 --rope-scaling yarn --train-iters 1000 \\\n"
        "      --global-batch-size 64 --lr 2e-5 --lr-warmup-iters 10 --bf16",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="a YAML file of the same names; flags win over it")
    for name, group in _groups().items():
        section = parser.add_argument_group(group.__doc__)
        for f in dataclasses.fields(group):
            options = {"help": f.metadata["help"] or " ", "default": argparse.SUPPRESS}
            if f.type is bool:
                options["action"] = argparse.BooleanOptionalAction
            else:
                kind = _scalar(f.type)
                options |= {"type": kind, "choices": f.metadata["choices"],
                            "nargs": f.metadata["nargs"]}
                if not f.metadata["choices"]:
                    options["metavar"] = kind.__name__.upper()
                if f.default not in (None, dataclasses.MISSING) and "default" not in f.metadata[
                        "help"]:
                    options["help"] += f" (default: {f.default})"
            section.add_argument(spell(f.name), dest=f"{name}.{f.name}", **options)
    return parser


def _scalar(annotation) -> type:
    """int from `int | None`, str from `list[str]`."""
    if isinstance(annotation, types.UnionType):
        return next(a for a in typing.get_args(annotation) if a is not types.NoneType)
    return typing.get_args(annotation)[0] if typing.get_origin(annotation) is list else annotation


def parse(argv: list[str] | None = None) -> Arguments:
    """Read flags, over those of a --config file.

    Raises:
        ValueError: an unknown flag, an unreadable file, or a value out of range.
        SystemExit: after `--help`.
    """
    for word in sys.argv[1:] if argv is None else argv:
        if word.startswith("--"):
            _refuse(word[2:].partition("=")[0].replace("-", "_"))
    parser = _parser()
    config = _Parser(add_help=False, allow_abbrev=False)
    config.add_argument("--config")
    path = config.parse_known_args(argv)[0].config
    words = _words_of_config(Path(path)) if path else []
    given = vars(parser.parse_args(words, argparse.Namespace()))
    given |= vars(parser.parse_args(argv, argparse.Namespace()))
    groups = {
        name: group(**{f.name: given[f"{name}.{f.name}"] for f in dataclasses.fields(group)
                       if f"{name}.{f.name}" in given})
        for name, group in _groups().items()
    }
    args = Arguments(**groups)
    _check_ranges(args)
    return args


def defaults(**training) -> Arguments:
    """Every flag at its default, for tools that run a model without training it."""
    groups = {name: group() for name, group in _groups().items()}
    return Arguments(**groups | {"training": TrainingFlags(**training)})


def _words_of_config(path: Path) -> list[str]:
    import yaml

    if not path.is_file():
        raise ValueError(f"--config {path}: no such file")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path} is not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(values, dict):
        raise ValueError(f"--config {path} must be a mapping of flag names to values")
    flags = {f.name for group in _groups().values() for f in dataclasses.fields(group)}
    words = []
    for key, value in values.items():
        name = str(key).replace("-", "_")
        _refuse(name)
        if name not in flags:
            raise ValueError(f"--config {path}: unknown name '{key}'; see --help for the flags")
        if isinstance(value, bool):
            words.append(spell(name) if value else spell("no_" + name))
        elif value is not None:
            words += [spell(name), *map(str, value if isinstance(value, list) else [value])]
    return words


def _check_ranges(args: Arguments) -> None:
    t = args.training
    for group, names in (
        (args.model, ("num_attention_heads", "num_query_groups", "ffn_hidden_size", "kv_channels",
                      "original_max_position_embeddings")),
        (args.data, ("seq_length",)),
        (t, ("micro_batch_size", "global_batch_size", "train_iters", "train_samples",
             "lr_decay_iters", "lr_decay_samples", "lr_wsd_decay_iters", "lr_wsd_decay_samples",
             "max_skipped_iterations", "recompute_num_layers")),
        (args.position, ("pose_num_chunks",)),
        (args.parallel, ("tensor_model_parallel_size", "pipeline_model_parallel_size",
                         "context_parallel_size", "num_layers_per_virtual_pipeline_stage")),
        (args.checkpoint, ("save_interval", "save_retain")),
        (args.logging, ("log_interval", "eval_interval", "eval_iters")),
    ):
        for name in names:
            value = getattr(group, name)
            if value is not None and value < 1:
                raise ValueError(f"{spell(name)} must be at least 1, not {value}")
    if args.data.packed_skips != "document" and args.data.data_mode != "packed":
        raise ValueError(f"--packed-skips {args.data.packed_skips} needs --data-mode packed")
    if args.data.num_workers < 0:
        raise ValueError(f"--num-workers must be at least 0, not {args.data.num_workers}")
    _check_length(t, args.logging.dry_run)
    if t.min_lr > t.lr:
        raise ValueError(f"--min-lr {t.min_lr} is greater than --lr {t.lr}")
    if (t.recompute_granularity == "full") != (t.recompute_method is not None) or (
            t.recompute_method is None) != (t.recompute_num_layers is None):
        raise ValueError(
            "--recompute-granularity full needs --recompute-method and --recompute-num-layers, "
            "which have no meaning without it"
        )
    if args.checkpoint.finetune and not args.checkpoint.load:
        raise ValueError("--finetune takes the weights of a checkpoint: name it with --load")
    if args.checkpoint.save_interval and not args.checkpoint.save:
        raise ValueError("--save-interval needs a folder: name it with --save")
    if t.exit_duration_in_mins and not args.checkpoint.save:
        raise ValueError("--exit-duration-in-mins needs a folder to save to: name it with --save")
    p = args.parallel
    if p.overlap_param_gather and not (p.overlap_grad_reduce and p.use_distributed_optimizer):
        raise ValueError(
            "--overlap-param-gather needs --overlap-grad-reduce and --use-distributed-optimizer"
        )
    if t.loss_spike_factor and not t.loss_spike_factor > 1:
        raise ValueError(f"--loss-spike-factor must be above 1, or 0, not {t.loss_spike_factor}")


def _check_length(t: TrainingFlags, dry_run: bool) -> None:
    """A run is as long as so many steps or so many samples, and its schedule counts the same."""
    if t.train_iters and t.train_samples:
        raise ValueError(
            f"--train-iters {t.train_iters} and --train-samples {t.train_samples} both say how "
            "long to train; keep one"
        )
    if not (t.train_iters or t.train_samples or dry_run):
        raise ValueError("--train-iters is missing: say how many steps to train")
    unit, other = ("samples", "iters") if t.train_samples else ("iters", "samples")
    for name in ("lr_warmup", "lr_decay", "lr_wsd_decay"):
        if value := getattr(t, f"{name}_{other}"):
            raise ValueError(
                f"{spell(name)}-{other} {value} has no meaning with --train-{unit}; say "
                f"{spell(name)}-{unit}"
            )
    length, warmup = getattr(t, f"train_{unit}"), getattr(t, f"lr_warmup_{unit}")
    if warmup and length and warmup >= length:
        raise ValueError(f"--lr-warmup-{unit} {warmup} leaves nothing of --train-{unit} {length}")
    if t.lr_decay_style == "WSD" and not getattr(t, f"lr_wsd_decay_{unit}"):
        raise ValueError(f"--lr-decay-style WSD needs --lr-wsd-decay-{unit}")
    if t.rampup_batch_size:
        if min(t.rampup_batch_size) < 1:
            raise ValueError(
                f"--rampup-batch-size {' '.join(map(str, t.rampup_batch_size))}: all three must "
                "be at least 1"
            )
        if not (t.train_samples and t.global_batch_size):
            raise ValueError("--rampup-batch-size needs --train-samples and --global-batch-size")
