"""Sliding-window perplexity of a Megatron checkpoint at several context lengths."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pose_megatron import cpu

cpu.install()

import torch
from tqdm import tqdm

from pose_megatron import arguments, checkpoint, distributed, model_config
from pose_megatron.dataset import Corpus
from pose_megatron.evaluation import perplexities
from pose_megatron.model import load_logits
from pose_megatron.rope import METHODS


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Perplexity at each context length, over the same documents and the same\n"
        "scored tokens, so that the row is comparable.",
        epilog="example:\n  python tools/evaluate_perplexity.py --load checkpoints/pose \\\n"
        "      --data-path books_text_document --context-lengths 2048 4096 8192 16384 \\\n"
        "      --output results.jsonl",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--load", required=True, help="Megatron checkpoint folder")
    add("--iteration", type=int, help="default: the latest")
    add("--data-path", required=True, help="corpus prefix; documents longer than the longest "
        "context length are used")
    add("--context-lengths", type=int, nargs="+", required=True, metavar="TOKENS")
    add("--stride", type=int, help="tokens scored per window (default: half the shortest context)")
    add("--max-documents", type=int, default=100, help="the first so many (default: 100)")
    add("--max-document-tokens", type=int, help="cut documents (default: longest context plus 8 "
        "strides)")
    add("--batch-tokens", type=int, default=16384, help="input tokens of one forward pass")
    add("--rope-scaling", choices=METHODS, help="interpolate a checkpoint that is not yet")
    add("--rope-scaling-factor", type=float, help="default: longest context / original window")
    add("--rope-scaling-config", metavar="JSON", help="its other options, as in pretrain_pose.py")
    add("--bf16", action="store_true")
    add("--name", help="label in tables and plots (default: the folder's name)")
    add("--output", help="JSON lines file to append to")
    return parser.parse_args()


@distributed.one_sentence_errors
def main() -> None:
    flags = parse()
    lengths = sorted(set(flags.context_lengths))
    if lengths[0] < 2:
        raise ValueError(f"--context-lengths {lengths[0]} must be at least 2")
    stride = flags.stride or lengths[0] // 2
    found = checkpoint.find(flags.load, flags.iteration)
    config = model_config.resolve_model(
        arguments.ModelFlags(
            rope_scaling=flags.rope_scaling, rope_scaling_factor=flags.rope_scaling_factor,
            rope_scaling_config=flags.rope_scaling_config,
            max_position_embeddings=lengths[-1] if flags.rope_scaling else None,
        ),
        lengths[0], found.model, None,
    )
    documents = read_documents(flags, lengths[-1], stride, config.vocab_size)

    logits = load_logits(found, config, flags.bf16)

    scored = sum((len(d) - lengths[-1] - 1) // stride + 1 for d in documents)
    name = flags.name or Path(flags.load).name
    results = []
    with tqdm(total=scored * sum(lengths), unit="token", unit_scale=True, desc=name,
              disable=None) as bar:
        for result in perplexities(logits, documents, lengths, stride, flags.batch_tokens,
                                   bar.update):
            results.append({
                "name": name, "metric": "perplexity", **dataclasses.asdict(result),
                "stride": stride, "load": flags.load, "iteration": found.iteration,
                "data_path": flags.data_path, "rope_scaling": config.rope_scaling.method,
                "rope_scaling_factor": config.rope_scaling.factor,
            })
    for r in results:
        print(f"{name}: context {r['context_length']:>7,}  perplexity {r['perplexity']:.3f}  "
              f"({r['tokens']:,} tokens of {r['documents']} documents)")
    if flags.output:
        Path(flags.output).parent.mkdir(parents=True, exist_ok=True)
        with open(flags.output, "a") as file:
            file.writelines(json.dumps(r) + "\n" for r in results)


def read_documents(flags, longest: int, stride: int, vocab_size: int) -> list[torch.Tensor]:
    corpus = Corpus(flags.data_path)
    cut = flags.max_document_tokens or longest + 8 * stride
    if cut <= longest:
        raise ValueError(
            f"--max-document-tokens {cut} must exceed the longest context length, {longest}"
        )
    long_enough = (corpus.lengths > longest).nonzero()[0][: flags.max_documents]
    if not len(long_enough):
        raise ValueError(
            f"--data-path {flags.data_path}: no document has more than {longest} tokens, the "
            f"longest context length (the longest has {corpus.lengths.max()})"
        )
    documents = []
    for i in long_enough.tolist():
        tokens = corpus.tokens.get(i, 0, min(cut, int(corpus.lengths[i])))
        if tokens.max() >= vocab_size:
            raise ValueError(
                f"--data-path {flags.data_path}: token id {tokens.max()} in document {i} is "
                f"outside the checkpoint's vocabulary of {vocab_size}"
            )
        documents.append(torch.from_numpy(tokens.astype("int64")).to(distributed.device()))
    return documents


if __name__ == "__main__":
    main()
