"""What perplexity by context length costs: in one reading of each document (by position), in
sliding windows (a pass for every window of every length), and in one plain forward pass of
transformers.

All three have the same random weights of a LLaMA and the same tokens, in one process and in turn.
Sliding windows score half the shortest length each and cut documents 8 windows behind the longest
length, as tools/evaluate_perplexity.py did before it read by position. The forward pass is that of
the longest length with logits for every token, and takes the loss from them.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import trainers
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from pose_megatron.checkpoints.convert import convert
from pose_megatron.evaluation.perplexity import Perplexities
from pose_megatron.evaluation.record import Record
from pose_megatron.evaluation.target import find_target
from pose_megatron.evaluation.transformers_reader import load_model
from pose_megatron.runtime.device import device
from pose_megatron.runtime.startup import prepare_megatron


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python benchmarks/evaluate.py --output evaluate.json",
    )
    add = parser.add_argument
    add("--layers", type=int, default=30, help="[30]; all sizes are those of SmolLM2-135M")
    add("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048], help="context lengths")
    add("--batch-tokens", type=int, default=1024, help="tokens of a chunk [1024]")
    add("--repeats", type=int, default=3, help="[3]")
    add("--bf16", action="store_true", help="compute in bfloat16 (default: float32)")
    add("--output", type=Path, help="write the figures there as JSON")
    return parser.parse_args()


def main() -> None:
    args = parse()
    prepare_megatron()
    logging.disable_progress_bar()
    longest, stride = args.lengths[-1], args.lengths[0] // 2
    with tempfile.TemporaryDirectory() as folder:
        hf, megatron = Path(folder) / "hf", Path(folder) / "megatron"
        save_llama(hf, args.layers, longest)
        convert(hf, megatron, loader="hf", saver="megatron", verify=False, quiet=True)
        target = find_target(str(megatron), args.lengths, bf16=args.bf16)
        reader = target.open_reader(args.batch_tokens)
        dtype = torch.bfloat16 if args.bf16 else torch.float32
        theirs = load_model(hf, dtype)
    document = torch.randint(49152, (longest + 8 * stride,), device=device())

    def ours() -> Perplexities:
        return Perplexities(reader, [document], args.lengths, Record(None, {}, []))

    @torch.no_grad()
    def plain() -> float:
        logits = theirs(document[None, :longest], use_cache=False).logits[0].float()
        return F.cross_entropy(logits, document[1 : longest + 1]).item()

    ways: dict[str, Callable] = {
        "by_position": lambda: list(ours().by_position()),
        "sliding_windows": lambda: list(ours().in_windows(stride)),
        "plain_forward": plain,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.repeats):
        for name, run in ways.items():
            start = time.perf_counter()
            found = run()
            trainers.synchronize()
            seconds[name].append(time.perf_counter() - start)
            if name == "by_position":
                whole = sum(r.loss * r.tokens for r in found) / longest
            elif name == "plain_forward":
                assert abs(whole - found) < 0.02, (whole, found)
    report(args, seconds)


def save_llama(folder: Path, layers: int, longest: int) -> None:
    """Random weights in SmolLM2-135M's sizes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=576,
        intermediate_size=1536,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        max_position_embeddings=longest,
        rope_theta=100000.0,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def report(args: argparse.Namespace, seconds: dict[str, list[float]]) -> None:
    medians = {name: statistics.median(values) for name, values in seconds.items()}

    def ratio(one: str, other: str) -> float:
        pairs = zip(seconds[one], seconds[other], strict=True)
        return statistics.median(a / b for a, b in pairs)

    results = {
        "seconds": medians,
        "windows_over_by_position": ratio("sliding_windows", "by_position"),
        "by_position_over_plain_forward": ratio("by_position", "plain_forward"),
    }
    lengths = ", ".join(f"{length:,}" for length in args.lengths)
    print(
        f"{args.layers} layers, {'bfloat16' if args.bf16 else 'float32'}, lengths {lengths}, "
        f"chunks of {args.batch_tokens:,} tokens; medians of {args.repeats}; "
        f"{trainers.machine()['device']}\n\n"
        "| by position, s | sliding windows, s | one plain forward pass, s | windows / position | "
        "position / plain |\n|---:|---:|---:|---:|---:|\n"
        f"| {medians['by_position']:.2f} | {medians['sliding_windows']:.2f} | "
        f"{medians['plain_forward']:.2f} | {results['windows_over_by_position']:.2f} | "
        f"{results['by_position_over_plain_forward']:.3f} |"
    )
    if args.output:
        settings = {name: value for name, value in vars(args).items() if name != "output"}
        written = {**trainers.machine(), "settings": settings, "results": results}
        args.output.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
