"""The flags that every evaluation shares: which checkpoint and tokenizer, at which context
lengths."""

import argparse
from typing import TYPE_CHECKING

from pose_megatron.errors import ConfigError
from pose_megatron.preprocessing.tokenizer import TOKENIZER_TYPES, Tokenizer, build_tokenizer
from pose_megatron.rope.names import METHOD_NAMES
from pose_megatron.runtime.cli import positive
from pose_megatron.runtime.ranges import LARGEST_INT32, real, whole
from pose_megatron.runtime.ranks import print_rank_0
from pose_megatron.runtime.startup import DEVICES

if TYPE_CHECKING:  # it needs torch, and comes after the flags are read
    from pose_megatron.evaluation.target import EvaluationTarget


LAYOUT = {
    "tensor-model": "ranks that share each layer",
    "pipeline-model": "ranks that hold consecutive layers",
    "context": "ranks that share a text",
}


def add_target_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--load", required=True, help="folder of a Megatron checkpoint, or a Hugging Face folder")
    add("--iteration", type=whole(0), help="default: the latest")
    add(
        "--context-lengths",
        type=whole(2, LARGEST_INT32),
        nargs="+",
        required=True,
        metavar="TOKENS",
    )
    add("--batch-tokens", type=positive, default=4096, help="tokens of one forward pass [4096]")
    add(
        "--rope-scaling",
        choices=METHOD_NAMES,
        metavar="METHOD",
        help="interpolate a checkpoint that is not yet; methods as in pretrain_pose.py",
    )
    add(
        "--rope-scaling-factor",
        type=real(at_least=1),
        help="default: longest context / original window",
    )
    add("--rope-scaling-config", metavar="JSON", help="its other options, as in pretrain_pose.py")
    add("--tokenizer-type", choices=TOKENIZER_TYPES, default="HuggingFaceTokenizer")
    add("--tokenizer-model", help="default: the one that the checkpoint carries")
    add("--prepend-bos", action="store_true", help="begin with the token that begins a sequence")
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument(
        "--bf16",
        action="store_true",
        default=None,
        help="compute in bfloat16 (default: where the weights have 16 bits, on a GPU)",
    )
    precision.add_argument(
        "--fp32", dest="bf16", action="store_false", help="compute in float32 (default elsewhere)"
    )
    add("--device", choices=DEVICES, default="auto", help="compute on it [what there is]")
    add("--name", help="label in tables and plots (default: the folder's name)")
    add("--output", help="JSON lines file to append to; the same command goes on where it ended")
    for name, what in LAYOUT.items():
        add(f"--{name}-parallel-size", type=positive, default=1, help=f"{what} (torchrun) [1]")


def target_of(flags: argparse.Namespace) -> dict:
    """The arguments of `evaluation.target.find_target`."""
    names = ["load", "context_lengths", "iteration", "bf16", "name"]
    names += ["rope_scaling", "rope_scaling_factor", "rope_scaling_config"]
    names += [f"{name.replace('-', '_')}_parallel_size" for name in LAYOUT]
    return {name: getattr(flags, name) for name in names}


def introduce(flags: argparse.Namespace, target: "EvaluationTarget") -> None:
    """Prints what is evaluated, and whether --data-path is of another tokenizer."""
    from pose_megatron.runtime.device import describe_device

    precision = "bfloat16" if target.bf16 else "float32"
    print_rank_0(f"{target.name}: in {precision} on {describe_device()}")
    print_rank_0(f"{target.name}: rope scaling {target.model.rope_scaling}")
    if beyond := [length for length in target.lengths if length > target.window]:
        lengths = ", ".join(f"{length:,}" for length in beyond)
        print_rank_0(f"{target.name}: {lengths} tokens are beyond its window of {target.window:,}")
    if flags.data_path:
        from pose_megatron.evaluation.token_ids import other_corpus

        _warn(other_corpus(flags.data_path, target.tokenizer, flags.tokenizer_model))


def open_tokenizer(flags: argparse.Namespace, target: "EvaluationTarget") -> Tokenizer:
    """The tokenizer that the flags name, or the checkpoint's.

    Raises:
        ConfigError: there is neither.
    """
    path = flags.tokenizer_model or target.tokenizer
    if not flags.tokenizer_model and not target.tokenizer.is_dir():
        raise ConfigError(
            f"--load {flags.load} carries no tokenizer; name one with --tokenizer-model"
        )
    tokenizer = build_tokenizer(flags.tokenizer_type, path)
    if flags.tokenizer_model:
        from pose_megatron.evaluation.token_ids import other_tokenizer

        _warn(other_tokenizer(tokenizer, flags.tokenizer_model, target.tokenizer))
    return tokenizer


def _warn(sentence: str | None) -> None:
    if sentence:
        print_rank_0(f"warning: {sentence}")


def bos_of(tokenizer: Tokenizer) -> int:
    """The token of --prepend-bos."""
    if tokenizer.bos is None:
        raise ConfigError("--prepend-bos: the tokenizer has no such token")
    return tokenizer.bos
