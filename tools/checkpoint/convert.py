"""Converts a LLaMA checkpoint between Hugging Face and Megatron, exactly.

Hugging Face's side is safetensors with config.json and the tokenizer's files; Megatron's side is a
torch_dist checkpoint that every layout of ranks loads. The output is built in a temporary folder
beside --save-dir, read back and compared, and only then renamed: it is whole or it is not there.
"""

import os
import sys

# Not this folder: its inspect.py would hide Python's own from all that is imported below.
HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
sys.path[:] = [ROOT, *(path for path in sys.path if os.path.abspath(path) != HERE)]

import argparse
import contextlib
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from tqdm import tqdm

from pose_megatron import cpu

cpu.install()

from pose_megatron import huggingface, parity
from pose_megatron.checkpoint import find
from pose_megatron.convert import hf_to_megatron, megatron_to_hf
from pose_megatron.distributed import one_sentence_errors
from pose_megatron.durable import write_atomically
from pose_megatron.model_config import ModelConfig
from pose_megatron.rope_config import notes
from pose_megatron.weights import read_weights, write_weights

EXAMPLES = """examples:
  # a Hugging Face folder into Megatron's format
  python tools/checkpoint/convert.py --loader hf --saver megatron \\
      --load-dir models/llama-2-7b --save-dir checkpoints/llama-2-7b

  # the extended model back, in bfloat16; config.json carries the interpolation
  python tools/checkpoint/convert.py --loader megatron --saver hf --dtype bfloat16 \\
      --load-dir checkpoints/llama-2-7b-pose-128k --save-dir models/llama-2-7b-pose-128k
"""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="convert.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    formats = ("hf", "megatron")
    p.add_argument("--loader", required=True, choices=formats, help="format of --load-dir")
    p.add_argument("--saver", required=True, choices=formats, help="format of --save-dir")
    p.add_argument("--load-dir", required=True, type=Path)
    p.add_argument("--save-dir", required=True, type=Path)
    p.add_argument("--overwrite", action="store_true", help="replace a checkpoint in --save-dir")
    p.add_argument(
        "--dtype", choices=("keep", "float32", "bfloat16", "float16"), default="keep", help="[keep]"
    )
    p.add_argument(
        "--make-vocab-size-divisible-by",
        type=int,
        default=128,
        metavar="N",
        help="loader hf: the embedding gets zero rows up to a multiple of N [128]",
    )
    p.add_argument(
        "--iteration", type=int, help="loader megatron: which one [the latest of the folder]"
    )
    p.add_argument(
        "--tokenizer-model",
        type=Path,
        help="tokenizer file or folder to copy [the one that the source carries]",
    )
    p.add_argument(
        "--max-shard-size", default="5GB", help="saver hf: of one safetensors file [5GB]"
    )
    p.add_argument(
        "--rope-as-longrope",
        action="store_true",
        help="saver hf: write yarn as longrope, which transformers 4.43 to 4.54 read exactly",
    )
    p.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        help="read the result back and compare every bit, then its logits with transformers' "
        "[logits of models up to 100M parameters only; the rope is always checked]",
    )
    p.add_argument(
        "--json", type=Path, metavar="FILE", help="write tensors, bytes, seconds, rope errors there"
    )
    return p


@one_sentence_errors
def main() -> None:
    convert(parser().parse_args())


def convert(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    load, save = args.load_dir.resolve(), args.save_dir.resolve()
    if save == load or save in load.parents:
        raise ValueError(f"--save-dir {save} would replace --load-dir {load}; choose another")
    if args.tokenizer_model and not args.tokenizer_model.exists():
        raise ValueError(f"--tokenizer-model {args.tokenizer_model} does not exist")
    shard_bytes = _bytes(args.max_shard_size)
    rope = None
    with huggingface.staged(save, args.overwrite) as folder:
        if args.loader == "hf":
            model = huggingface.read_config(load, args.make_vocab_size_divisible_by)
            files = huggingface.Tensors(load)
            rope = _check_rope(load, model)
            with _phase("read", files.bytes) as files.progress, huggingface.naming(load):
                tensors = hf_to_megatron(files, **huggingface.sizes(model))
        else:
            print(f"loading {find(load, args.iteration).path}", flush=True)
            with _phase("read") as advance:
                tensors, model = read_weights(load, args.iteration)
                advance(_total(tensors))
        if args.dtype != "keep":
            dtype = getattr(torch, args.dtype)
            tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        own = load if args.loader == "hf" else load / "tokenizer"
        sidecars = huggingface.find_sidecars(args.tokenizer_model or own)

        if args.saver == "hf":
            with huggingface.naming(load):
                tensors = megatron_to_hf(tensors, **huggingface.sizes(model))
            dtype = tensors["model.embed_tokens.weight"].dtype
            huggingface.write_config(folder, model, dtype, sidecars, args.rope_as_longrope)
            if not (folder / "tokenizer_config.json").is_file():
                print("note: no tokenizer to copy; name one with --tokenizer-model", flush=True)
            rope = _check_rope(folder, model)
            with _phase("write", total := _total(tensors)) as advance:
                huggingface.write_tensors(folder, tensors, shard_bytes, advance)
        else:
            with _phase("write", total := _total(tensors)) as advance:
                write_weights(folder, tensors, model, sidecars.values())
                advance(total)
        if args.verify is not False:
            with _phase("verify", total) as advance:
                if args.saver == "hf":
                    again = huggingface.Tensors(folder)
                else:
                    again, model_again = read_weights(folder)
                    if model_again != model:
                        raise ValueError(f"read back {model_again}, wrote {model}")
                _compare(tensors, again, advance)
        sides = {args.loader: load, args.saver: folder}
        logits = parity.check_conversion(model, sides, args.iteration, args.verify)
    if args.saver == "hf":
        for note in notes(model.rope_scaling, model.max_position_embeddings, args.rope_as_longrope):
            print(f"note: {note}")
    if args.json:
        seconds = round(time.perf_counter() - start, 3)
        counts = {"tensors": len(tensors), "bytes": total, "seconds": seconds}
        write_atomically(args.json, json.dumps(
            counts | {"rope_errors": rope, "logits_errors": {d.where: d.error for d in logits}}
        ) + "\n")
    print(f"wrote {save}", flush=True)


def _check_rope(folder: Path, model: ModelConfig) -> dict[str, float]:
    errors = huggingface.rope_errors(folder, model)
    words = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    print(f"rope as transformers reads it: relative errors: {words}", flush=True)
    return errors


@contextlib.contextmanager
def _phase(name: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """A progress bar in bytes on a terminal; everywhere one line with MB/s at the end."""
    start, done = time.perf_counter(), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        bar.update(count)

    with tqdm(desc=name, total=total, unit="B", unit_scale=True, leave=False, disable=None) as bar:
        yield advance
    seconds, size = time.perf_counter() - start, done / 1e6
    print(f"{name:6} {size:10,.1f} MB {seconds:8.1f} s {size / seconds:8,.0f} MB/s", flush=True)


def _compare(written: Mapping, read: Mapping, advance: Callable[[int], None]) -> None:
    if other := written.keys() ^ read.keys():
        raise ValueError(f"read back other tensors: {min(other)}")
    for name, tensor in written.items():
        again = read[name]
        bits = (t.contiguous().view(torch.uint8) for t in (tensor, again))
        if tensor.dtype != again.dtype or not torch.equal(*bits):
            raise ValueError(f"read back another {name} than was written")
        advance(tensor.nbytes)


def _total(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _bytes(size: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)B", size.strip().upper())
    if not match or float(match[1]) == 0:
        raise ValueError(f"--max-shard-size {size} is not a size such as 5GB or 200MB")
    return int(float(match[1]) * 1000 ** ["", *"KMGT"].index(match[2]))


if __name__ == "__main__":
    main()
