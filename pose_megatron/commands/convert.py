"""Converts a checkpoint between Hugging Face, Meta's own format and Megatron, exactly.

hf        safetensors (or legacy .bin) with config.json and the tokenizer's files: LLaMA, Mistral,
          Mixtral, Qwen2, Qwen3, Qwen3-MoE, Baichuan2-7B, GPT-J
meta      consolidated.NN.pth with params.json: LLaMA 1, 2, 3
megatron  a torch_dist checkpoint, as every layout of ranks saves and loads it

Tensor after tensor passes through, so a model of any size fits; torchrun shares the work between
processes. The output is built in a temporary folder beside --save-dir, read back and compared, and
only then renamed: it is whole or it is not there.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pose_megatron.checkpoints.formats import FORMATS, CheckpointFormat, format_class
from pose_megatron.errors import ConfigError, flag_name
from pose_megatron.runtime.atomic_files import write_atomically
from pose_megatron.runtime.cli import command, progress
from pose_megatron.runtime.ranges import LARGEST_INT32, whole
from pose_megatron.runtime.ranks import rank

if TYPE_CHECKING:
    from pose_megatron.models.shape import ModelConfig

SMALL = 100_000_000  # parameters up to which logits are compared unasked
EXAMPLES = """examples:
  # a Hugging Face folder into Megatron's format
  python tools/checkpoint/convert.py --loader hf --saver megatron \\
      --load-dir models/llama-2-7b --save-dir checkpoints/llama-2-7b

  # the extended model back, in bfloat16; config.json carries the interpolation
  python tools/checkpoint/convert.py --loader megatron --saver hf --dtype bfloat16 \\
      --load-dir checkpoints/llama-2-7b-pose-128k --save-dir models/llama-2-7b-pose-128k

  # a large one in Meta's own format, by eight processes
  torchrun --nproc-per-node 8 tools/checkpoint/convert.py --loader meta --saver megatron \\
      --load-dir Meta-Llama-3-70B/original --save-dir checkpoints/llama-3-70b
"""


def parser() -> argparse.ArgumentParser:
    """The command line; flags of a format's own parameters are spelled as its fields."""
    p = argparse.ArgumentParser(
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--loader", required=True, choices=FORMATS, help="format of --load-dir")
    p.add_argument("--saver", required=True, choices=FORMATS, help="format of --save-dir")
    p.add_argument("--load-dir", required=True, type=Path)
    p.add_argument("--save-dir", required=True, type=Path)
    p.add_argument("--overwrite", action="store_true", help="replace a checkpoint in --save-dir")
    p.add_argument(
        "--dtype", choices=("keep", "float32", "bfloat16", "float16"), default="keep", help="[keep]"
    )
    p.add_argument(
        "--make-vocab-size-divisible-by",
        type=whole(1, LARGEST_INT32),
        default=128,
        metavar="N",
        help="loader hf, meta: the embedding gets zero rows up to a multiple of N [128]",
    )
    p.add_argument(
        "--iteration", type=whole(0), help="loader megatron: which one [the latest of the folder]"
    )
    p.add_argument(
        "--max-position-embeddings",
        type=whole(1, LARGEST_INT32),
        metavar="N",
        help="loader meta: the window, which params.json leaves out [the published model's]; "
        "loader megatron: of a checkpoint that says only its last seq_length",
    )
    p.add_argument(
        "--tokenizer-model",
        type=Path,
        help="tokenizer file or folder to copy [the one beside the source]",
    )
    p.add_argument(
        "--max-shard-size",
        default="5GB",
        help="saver hf: largest size of one safetensors file [5GB]",
    )
    p.add_argument(
        "--target-tensor-parallel-size",
        type=whole(1, LARGEST_INT32),
        default=1,
        metavar="N",
        help="saver meta: number of files, one for each tensor-parallel rank of Meta's code [1]",
    )
    p.add_argument(
        "--strict", action="store_true", help="fail on what is otherwise a warning, such as NaN"
    )
    p.add_argument(
        "--as-llama",
        action="store_true",
        help="a Baichuan2 becomes the LLaMA that computes the same, which can be interpolated",
    )
    p.add_argument(
        "--rope-as-longrope",
        action="store_true",
        help="saver hf: write yarn as longrope, which transformers 4.43 to 4.54 read exactly",
    )
    p.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        help="check hashes that came along, read the result back and compare every bit, then its "
        "logits with transformers' [all of this, logits only up to 100M parameters; the rope is "
        "always checked]",
    )
    p.add_argument(
        "--checksums",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare files of torch.save with the CRC-32 that they hold [yes]",
    )
    p.add_argument(
        "--json", type=Path, metavar="FILE", help="write tensors, bytes, seconds, rope errors there"
    )
    return p


@command
def main() -> None:
    run(parser().parse_args())


def run(args: argparse.Namespace) -> None:
    """Converts what the flags name, and writes --json.

    Raises:
        ConfigError, DamagedCheckpoint, OSError: as checkpoints.convert.convert.
    """
    _check_flags(args)
    loader, saver = _format(args.loader, args), _format(args.saver, args)
    import torch

    from pose_megatron.checkpoints.checksums import checksums
    from pose_megatron.checkpoints.convert import convert

    logits_errors: dict[str, float] = {}
    with checksums(args.checksums):
        result = convert(
            args.load_dir,
            args.save_dir,
            loader=loader,
            saver=saver,
            dtype=None if args.dtype == "keep" else getattr(torch, args.dtype),
            tokenizer=args.tokenizer_model,
            overwrite=args.overwrite,
            verify=args.verify is not False,
            strict=args.strict,
            as_llama=args.as_llama,
            check=None if args.verify is False else _logits_check(args, logits_errors),
        )
    if rank() == 0:
        if args.json:
            summary = dataclasses.asdict(result) | {"logits_errors": logits_errors}
            write_atomically(args.json, json.dumps(summary) + "\n")
        print(f"wrote {args.save_dir.resolve()}", flush=True)


def _check_flags(args: argparse.Namespace) -> None:
    """Refuses a parameter of a format that is not asked for."""
    for name, loaders in {
        "iteration": ("megatron",),
        "max_position_embeddings": ("meta", "megatron"),
    }.items():
        if getattr(args, name) is not None and args.loader not in loaders:
            raise ConfigError(
                f"{flag_name(name)} has no meaning with --loader {args.loader}, only with "
                f"{' and '.join(loaders)}"
            )
    if args.target_tensor_parallel_size != 1 and args.saver != "meta":
        raise ConfigError(
            "--target-tensor-parallel-size has no meaning with --saver "
            f"{args.saver}: what it writes, every layout of ranks loads"
        )


def _format(name: str, args: argparse.Namespace) -> CheckpointFormat:
    """A format with the parameters that the flags give it."""
    cls = format_class(name)
    return cls(**{field.name: getattr(args, field.name) for field in dataclasses.fields(cls)})


def _logits_check(
    args: argparse.Namespace, errors: dict[str, float]
) -> Callable[[Path, "ModelConfig"], None]:
    """Compares logits in Megatron and transformers: of small models, and with --verify of any.

    Args:
        errors: receives the largest differences, by where they are.
    """

    def check(folder: Path, model: "ModelConfig") -> None:
        from pose_megatron.models.families import family_named

        sides = {args.loader: args.load_dir.resolve(), args.saver: folder}
        if (
            args.as_llama
            or not {"hf", "megatron"} <= sides.keys()
            or not family_named(model.family).in_transformers
        ):
            return
        if not args.verify and model.num_parameters > SMALL:
            return
        from pose_megatron.checkpoints.megatron.directory import find

        found = find(sides["megatron"], args.iteration)
        if found.is_legacy and not args.verify:  # no model loads this layout
            return
        import torch

        from pose_megatron.runtime.startup import prepare_megatron

        prepare_megatron("auto" if torch.cuda.is_available() else "cpu")  # a GPU is not needed
        from pose_megatron.evaluation import parity

        errors.update(
            {d.where: d.error for d in parity.check(found, sides["hf"], say=progress("logits"))}
        )

    return check
