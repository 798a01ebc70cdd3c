"""Flags and run.yaml in, the dataclasses of flags.py out, every value checked once.

`parse()` reads and checks what stands on its own; `model.resolve_model()` then settles the model's
shape, and `layout.lay_out()` the sizes of a layout of ranks.
"""

import argparse
import dataclasses
import functools
import math
import sys
import types
import typing
from pathlib import Path
from typing import Any

from pose_megatron.config.flags import Arguments, TrainingFlags
from pose_megatron.config.megatron_flags import (
    FACTS,
    REFUSED,
    add_facts,
    check_facts,
    fact_options,
    refuse,
    synonym,
)
from pose_megatron.config.run_file import OFF, Entry, read_run_file
from pose_megatron.errors import ConfigError, flag_name
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
    parser.add_argument(
        "--config", action="append", help="a YAML file of the same names; flags win over it"
    )
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
    if _scalar(field.type) is bool:
        return {"help": help, "action": argparse.BooleanOptionalAction}
    kind, within = _scalar(field.type), field.metadata["within"]
    found = {
        "type": functools.partial(synonym, field.name) if kind is str else within.read,
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
    words = vars(parser.parse_args(argv))
    files = words.pop("config") or []
    if len(files) > 1:
        raise ConfigError(f"--config {' and --config '.join(files)}: keep one")
    given = (_given_by_file(Path(files[0])) if files else {}) | words
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


def _given_by_file(path: Path) -> dict[str, Any]:
    """What --config says, by the names that the parser gives its flags.

    Raises:
        ConfigError: as read_run_file; an unknown name, one flag twice, or a value that it does not
            take.
    """
    flags = {
        f.name: (f"{name}.{f.name}", options(f), f.metadata["in_yaml"])
        for name, group in _groups().items()
        for f in dataclasses.fields(group)
    }
    flags |= {name: (f"fact.{name}", fact_options(fact), None) for name, fact in FACTS.items()}
    given: dict[str, Any] = {}
    said: dict[str, Entry] = {}
    for entry in read_run_file(path):
        name = entry.name.replace("-", "_")
        if name in REFUSED and entry.content in OFF:
            continue
        refuse(name)
        if off := name not in flags and name.startswith("no_"):  # no-rope-fusion: true
            name = name.removeprefix("no_")
        dest, taken, in_yaml = flags.get(name, (None, {}, None))
        if dest is None or (off and "action" not in taken):
            raise entry.error(f"unknown name '{entry.name}'; see --help for the flags")
        if name in said:
            first = said[name]
            raise entry.error(f"{entry.name} is {first.name} of line {first.line} again; keep one")
        said[name] = entry
        if (value := entry.value_for(taken, in_yaml)) is not None:
            given[dest] = not value if off else value
    return given


def _check_ranges(args: Arguments) -> None:
    """What a range depends on another flag; Flags checks the others."""
    t = args.training
    if t.min_lr > t.lr:
        raise ConfigError(f"--min-lr {t.min_lr} is greater than --lr {t.lr}")


def check_split(text: str) -> str:
    """--split, if it is three shares.

    Raises:
        ConfigError: it is not.
    """
    try:
        shares = [float(share) for share in text.split(",")]
    except ValueError:
        shares = []
    if len(shares) != 3 or not all(0 <= s < math.inf for s in shares) or not sum(shares):
        raise ConfigError(f"--split {text} must be three shares, such as 969,30,1")
    return text


def _check_combinations(args: Arguments) -> None:
    """Flags that need, or exclude, each other."""
    t, p = args.training, args.parallel
    if args.model.model_class == "hybrid":
        require_hybrid()
    if args.data.split is not None:
        check_split(args.data.split)
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
    impl, backend = args.model.transformer_impl, args.model.attention_backend
    if impl == "torch" and backend not in ("auto", "flash"):
        raise ConfigError(
            f"--attention-backend {backend} is Transformer Engine's: take it with "
            "--transformer-impl transformer_engine; torch takes fused kernels wherever they run"
        )
    norms = t.recompute_granularity == "selective" and "layernorm" in t.recompute_modules
    if norms and impl == "torch":
        raise ConfigError(
            "--recompute-modules layernorm: megatron-core recomputes norms through Transformer "
            "Engine only; mlp gives more memory back, or take --transformer-impl transformer_engine"
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
    _check_schedule(t, unit)
    if t.rampup_batch_size and not (t.train_samples and t.global_batch_size):
        raise ConfigError("--rampup-batch-size needs --train-samples and --global-batch-size")


def _check_schedule(t: TrainingFlags, unit: str) -> None:
    """That warm-up, a constant part and the decay follow each other, in steps or in samples."""
    length, warmup = getattr(t, f"train_{unit}"), getattr(t, f"lr_warmup_{unit}")
    if warmup and length and warmup >= length:
        raise ConfigError(f"--lr-warmup-{unit} {warmup} leaves nothing of --train-{unit} {length}")
    decay, whole = getattr(t, f"lr_decay_{unit}"), f"--lr-decay-{unit}"
    if not decay:
        decay, whole = length, f"--train-{unit}"
    if decay and warmup >= decay:
        raise ConfigError(
            f"--lr-warmup-{unit} {warmup} leaves nothing of {whole} {decay}, at whose end the "
            "learning rate has decayed; shorten the one or lengthen the other"
        )
    if t.lr_decay_style != "WSD":
        return
    final = getattr(t, f"lr_wsd_decay_{unit}")
    if not final:
        raise ConfigError(f"--lr-decay-style WSD needs --lr-wsd-decay-{unit}")
    if decay and final > decay - warmup:
        before = f" after --lr-warmup-{unit} {warmup}" if warmup else ""
        raise ConfigError(
            f"--lr-wsd-decay-{unit} {final} does not fit into {whole} {decay}{before}: at most "
            f"{decay - warmup}"
        )
