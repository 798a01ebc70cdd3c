"""Flags and run.yaml in, the dataclasses of flags.py out, every value checked once.

`parse()` reads and checks what stands on its own; `model.resolve_model()` then settles the model's
shape, and `layout.lay_out()` the sizes of a layout of ranks.
"""

import argparse
import dataclasses
import functools
import sys
import types
import typing
from pathlib import Path

from pose_megatron.config.flags import Arguments, TrainingFlags
from pose_megatron.config.megatron_flags import (
    FACTS,
    REFUSED,
    add_facts,
    check_facts,
    refuse,
    synonym,
)
from pose_megatron.errors import ConfigError, flag_name
from pose_megatron.runtime.json_files import read_yaml
from pose_megatron.runtime.megatron_core import require_hybrid


def _groups() -> dict[str, type]:
    """{field of Arguments: its dataclass of flags}."""
    return typing.get_type_hints(Arguments)


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
            section.add_argument(
                flag_name(f.name), dest=f"{name}.{f.name}", default=argparse.SUPPRESS, **options(f)
            )
    add_facts(parser)
    return parser


def options(field: dataclasses.Field) -> dict:
    """What argparse's add_argument takes for a flag, without its default."""
    help = field.metadata["help"] or " "
    if field.type is bool:
        return {"help": help, "action": argparse.BooleanOptionalAction}
    kind = _scalar(field.type)
    found = {
        "type": functools.partial(synonym, field.name) if kind is str else kind,
        "choices": field.metadata["choices"],
        "nargs": field.metadata["nargs"],
    }
    if not field.metadata["choices"]:
        found["metavar"] = kind.__name__.upper()
    if field.default not in (None, dataclasses.MISSING) and "default" not in help:
        help += f" (default: {field.default})"
    return found | {"help": help}


def _scalar(annotation) -> type:
    """int from `int | None`, str from `list[str]`."""
    if isinstance(annotation, types.UnionType):
        return next(a for a in typing.get_args(annotation) if a is not types.NoneType)
    return typing.get_args(annotation)[0] if typing.get_origin(annotation) is list else annotation


def parse(argv: list[str] | None = None, trains: bool = True) -> Arguments:
    """Reads flags, and those of a --config file, over which the flags win.

    Args:
        argv: default: this program's.
        trains: whether the length of the run must be known.

    Raises:
        ConfigError: an unknown flag, an unreadable file, a value out of range, or one that
            contradicts what always holds here.
        SystemExit: after `--help`.
    """
    for word in sys.argv[1:] if argv is None else argv:
        if word.startswith("--"):
            refuse(word[2:].partition("=")[0].replace("-", "_"))
    parser = _parser()
    config = _Parser(add_help=False, allow_abbrev=False)
    config.add_argument("--config")
    path = config.parse_known_args(argv)[0].config
    config_argv = _argv_of_config(Path(path)) if path else []
    given = vars(parser.parse_args(config_argv, argparse.Namespace()))
    given |= vars(parser.parse_args(argv, argparse.Namespace()))
    check_facts(given)
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
    _check_ranges(args)
    _check_length(args.training, trains and not args.logging.dry_run)
    _check_combinations(args)
    if args.logging.eval_iters == 0:  # how Megatron-LM's scripts turn validation off
        args = dataclasses.replace(
            args, logging=dataclasses.replace(args.logging, eval_interval=None)
        )
    return args


def _argv_of_config(path: Path) -> list[str]:
    """The flags that a YAML file stands for."""
    flags = {f.name: f.type for group in _groups().values() for f in dataclasses.fields(group)}
    flags |= {name: type(fact.values[0]) for name, fact in FACTS.items()}
    argv = []
    for key, value in _read_yaml(path).items():
        name = str(key).replace("-", "_")
        if name in REFUSED and value in (None, False):
            continue
        refuse(name)
        switch = name.removeprefix("no_")
        if name not in flags and flags.get(switch) is bool and isinstance(value, bool):
            name, value = switch, not value  # no-rope-fusion: true
        if name not in flags:
            raise ConfigError(f"--config {path}: unknown name '{key}'; see --help for the flags")
        if isinstance(value, bool):
            argv.append(flag_name(name) if value else flag_name("no_" + name))
        elif value is not None:
            argv += [flag_name(name), *map(str, value if isinstance(value, list) else [value])]
    return argv


def _read_yaml(path: Path) -> dict:
    try:
        return read_yaml(path)
    except ConfigError as error:
        raise ConfigError(f"--config {error}") from None


# {field of Arguments: its flags that are None or at least so much}
_AT_LEAST_1 = {
    "model": (
        *("num_attention_heads", "num_query_groups", "ffn_hidden_size", "kv_channels"),
        *("num_experts", "moe_router_topk", "moe_ffn_hidden_size"),
        "original_max_position_embeddings",
    ),
    "position": ("pose_num_chunks",),
    "data": ("seq_length",),
    "training": (
        *("micro_batch_size", "global_batch_size", "train_iters", "train_samples"),
        *("lr_decay_iters", "lr_decay_samples", "lr_wsd_decay_iters", "lr_wsd_decay_samples"),
        *("max_skipped_iterations", "recompute_num_layers"),
    ),
    "parallel": (
        *("tensor_model_parallel_size", "pipeline_model_parallel_size"),
        *("context_parallel_size", "num_layers_per_virtual_pipeline_stage"),
        "expert_model_parallel_size",
    ),
    "checkpoint": ("save_interval", "save_retain"),
    "logging": ("log_interval", "eval_interval"),
}
_AT_LEAST_0 = {"data": ("num_workers",), "logging": ("eval_iters",)}


def _check_ranges(args: Arguments) -> None:
    for least, groups in ((1, _AT_LEAST_1), (0, _AT_LEAST_0)):
        for group, names in groups.items():
            for name in names:
                value = getattr(getattr(args, group), name)
                if value is not None and value < least:
                    raise ConfigError(f"{flag_name(name)} must be at least {least}, not {value}")
    t = args.training
    if t.min_lr > t.lr:
        raise ConfigError(f"--min-lr {t.min_lr} is greater than --lr {t.lr}")
    if t.loss_spike_factor and not t.loss_spike_factor > 1:
        raise ConfigError(f"--loss-spike-factor must be above 1, or 0, not {t.loss_spike_factor}")


def _check_combinations(args: Arguments) -> None:
    """Flags that need, or exclude, each other."""
    t, p = args.training, args.parallel
    if args.model.model_class == "hybrid":
        require_hybrid()
    if args.data.packed_skips != "document" and args.data.data_mode != "packed":
        raise ConfigError(f"--packed-skips {args.data.packed_skips} needs --data-mode packed")
    if args.data.test_data_path and not args.logging.eval_iters:
        raise ConfigError(
            "--eval-iters 0 leaves nothing of --test-data-path: give at least 1, or no test corpus"
        )
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
    if p.overlap_param_gather and not (p.overlap_grad_reduce and p.use_distributed_optimizer):
        raise ConfigError(
            "--overlap-param-gather needs --overlap-grad-reduce and --use-distributed-optimizer"
        )


def _check_length(t: TrainingFlags, trains: bool) -> None:
    """The length of a run is a number of steps or of samples; its schedule counts the same."""
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
                f"{flag_name(name)}-{other} {value} has no meaning with --train-{unit}; say "
                f"{flag_name(name)}-{unit}"
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
