"""Flags and run.yaml in, the dataclasses of flags.py out, every value checked once.

`parse()` reads the words, `model_config.resolve_model()` settles the model's shape, and
`layout.lay_out()` holds what the layout of ranks demands.
"""

import argparse
import dataclasses
import sys
import types
import typing
from pathlib import Path

from pose_megatron.config.flags import Arguments, TrainingFlags
from pose_megatron.errors import ConfigError, spell


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
        raise ConfigError(f"{spell(name)} cannot be used: {REFUSED[name]}; leave it out")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ConfigError(f"{message}; see --help")  # one rank prints it, not every one


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
                options |= {
                    "type": kind,
                    "choices": f.metadata["choices"],
                    "nargs": f.metadata["nargs"],
                }
                if not f.metadata["choices"]:
                    options["metavar"] = kind.__name__.upper()
                if (
                    f.default not in (None, dataclasses.MISSING)
                    and "default" not in f.metadata["help"]
                ):
                    options["help"] += f" (default: {f.default})"
            section.add_argument(spell(f.name), dest=f"{name}.{f.name}", **options)
    return parser


def _scalar(annotation) -> type:
    """int from `int | None`, str from `list[str]`."""
    if isinstance(annotation, types.UnionType):
        return next(a for a in typing.get_args(annotation) if a is not types.NoneType)
    return typing.get_args(annotation)[0] if typing.get_origin(annotation) is list else annotation


def parse(argv: list[str] | None = None, trains: bool = True) -> Arguments:
    """Read flags, over those of a --config file.

    Args:
        argv: default: of this program.
        trains: whether the length of the run must be known.

    Raises:
        ConfigError: an unknown flag, an unreadable file, or a value out of range.
        SystemExit: after `--help`.
    """
    for word in sys.argv[1:] if argv is None else argv:
        if word.startswith("--"):
            _refuse(word[2:].partition("=")[0].replace("-", "_"))
    parser = _parser()
    config = _Parser(add_help=False, allow_abbrev=False)
    config.add_argument("--config")
    path = config.parse_known_args(argv)[0].config
    config_argv = _argv_of_config(Path(path)) if path else []
    given = vars(parser.parse_args(config_argv, argparse.Namespace()))
    given |= vars(parser.parse_args(argv, argparse.Namespace()))
    groups = {
        name: group(
            **{
                f.name: given[f"{name}.{f.name}"]
                for f in dataclasses.fields(group)
                if f"{name}.{f.name}" in given
            }
        )
        for name, group in _groups().items()
    }
    args = Arguments(**groups)
    _check_ranges(args, trains and not args.logging.dry_run)
    return args


def _argv_of_config(path: Path) -> list[str]:
    import yaml

    if not path.is_file():
        raise ConfigError(f"--config {path}: no such file")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path} is not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path} must be a mapping of flag names to values")
    flags = {f.name for group in _groups().values() for f in dataclasses.fields(group)}
    words = []
    for key, value in values.items():
        name = str(key).replace("-", "_")
        _refuse(name)
        if name not in flags:
            raise ConfigError(f"--config {path}: unknown name '{key}'; see --help for the flags")
        if isinstance(value, bool):
            words.append(spell(name) if value else spell("no_" + name))
        elif value is not None:
            words += [spell(name), *map(str, value if isinstance(value, list) else [value])]
    return words


def _check_ranges(args: Arguments, trains: bool) -> None:
    t = args.training
    for group, names in (
        (
            args.model,
            (
                "num_attention_heads",
                "num_query_groups",
                "ffn_hidden_size",
                "kv_channels",
                "original_max_position_embeddings",
            ),
        ),
        (args.data, ("seq_length",)),
        (
            t,
            (
                "micro_batch_size",
                "global_batch_size",
                "train_iters",
                "train_samples",
                "lr_decay_iters",
                "lr_decay_samples",
                "lr_wsd_decay_iters",
                "lr_wsd_decay_samples",
                "max_skipped_iterations",
                "recompute_num_layers",
            ),
        ),
        (args.position, ("pose_num_chunks",)),
        (
            args.parallel,
            (
                "tensor_model_parallel_size",
                "pipeline_model_parallel_size",
                "context_parallel_size",
                "num_layers_per_virtual_pipeline_stage",
            ),
        ),
        (args.checkpoint, ("save_interval", "save_retain")),
        (args.logging, ("log_interval", "eval_interval", "eval_iters")),
    ):
        for name in names:
            value = getattr(group, name)
            if value is not None and value < 1:
                raise ConfigError(f"{spell(name)} must be at least 1, not {value}")
    if args.data.packed_skips != "document" and args.data.data_mode != "packed":
        raise ConfigError(f"--packed-skips {args.data.packed_skips} needs --data-mode packed")
    if args.data.num_workers < 0:
        raise ConfigError(f"--num-workers must be at least 0, not {args.data.num_workers}")
    _check_length(t, trains)
    if t.min_lr > t.lr:
        raise ConfigError(f"--min-lr {t.min_lr} is greater than --lr {t.lr}")
    if (t.recompute_granularity == "full") != (t.recompute_method is not None) or (
        t.recompute_method is None
    ) != (t.recompute_num_layers is None):
        raise ConfigError(
            "--recompute-granularity full needs --recompute-method and --recompute-num-layers, "
            "which have no meaning without it"
        )
    if args.checkpoint.finetune and not args.checkpoint.load:
        raise ConfigError("--finetune takes the weights of a checkpoint: name it with --load")
    if args.checkpoint.save_interval and not args.checkpoint.save:
        raise ConfigError("--save-interval needs a folder: name it with --save")
    if t.exit_duration_in_mins and not args.checkpoint.save:
        raise ConfigError("--exit-duration-in-mins needs a folder to save to: name it with --save")
    p = args.parallel
    if p.overlap_param_gather and not (p.overlap_grad_reduce and p.use_distributed_optimizer):
        raise ConfigError(
            "--overlap-param-gather needs --overlap-grad-reduce and --use-distributed-optimizer"
        )
    if t.loss_spike_factor and not t.loss_spike_factor > 1:
        raise ConfigError(f"--loss-spike-factor must be above 1, or 0, not {t.loss_spike_factor}")


def _check_length(t: TrainingFlags, trains: bool) -> None:
    """A run is as long as so many steps or so many samples, and its schedule counts the same."""
    if t.train_iters and t.train_samples:
        raise ConfigError(
            f"--train-iters {t.train_iters} and --train-samples {t.train_samples} both say how "
            "long to train; keep one"
        )
    if trains and not (t.train_iters or t.train_samples):
        raise ConfigError("--train-iters is missing: say how many steps to train")
    unit, other = ("samples", "iters") if t.train_samples else ("iters", "samples")
    for name in ("lr_warmup", "lr_decay", "lr_wsd_decay"):
        if value := getattr(t, f"{name}_{other}"):
            raise ConfigError(
                f"{spell(name)}-{other} {value} has no meaning with --train-{unit}; say "
                f"{spell(name)}-{unit}"
            )
    length, warmup = getattr(t, f"train_{unit}"), getattr(t, f"lr_warmup_{unit}")
    if warmup and length and warmup >= length:
        raise ConfigError(f"--lr-warmup-{unit} {warmup} leaves nothing of --train-{unit} {length}")
    if t.lr_decay_style == "WSD" and not getattr(t, f"lr_wsd_decay_{unit}"):
        raise ConfigError(f"--lr-decay-style WSD needs --lr-wsd-decay-{unit}")
    if t.rampup_batch_size:
        if min(t.rampup_batch_size) < 1:
            raise ConfigError(
                f"--rampup-batch-size {' '.join(map(str, t.rampup_batch_size))}: all three must "
                "be at least 1"
            )
        if not (t.train_samples and t.global_batch_size):
            raise ConfigError("--rampup-batch-size needs --train-samples and --global-batch-size")
