"""Passkey retrieval of a Megatron checkpoint at several context lengths."""

import argparse

from pose_megatron.commands.target_flags import add_target_flags, bos_of, open_tokenizer, target_of
from pose_megatron.errors import ConfigError
from pose_megatron.runtime.cli import command, positive
from pose_megatron.runtime.ranges import LARGEST_SEED, whole
from pose_megatron.runtime.startup import prepare_megatron


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="How often the model finds a number that the text, anywhere in the window,\n"
        "gives to a name. Prompts have exactly the context length, the place moves from the\n"
        "front to the back, and greedy decoding must give the whole number.",
        epilog="example:\n  python tools/evaluate_passkey.py --load checkpoints/pose --bf16 \\\n"
        "      --context-lengths 4096 16384 65536 --needles 8 --data-path books_text_document \\\n"
        "      --output results.jsonl\n"
        "  python tools/plot_results.py results.jsonl --metric passkey --output passkey.png",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_target_flags(parser)
    add = parser.add_argument
    add("--trials", type=positive, default=50, help="prompts per context length (default: 50)")
    add(
        "--needles",
        type=whole(1, 32),  # as many names as passkey.NAMES has
        default=1,
        help="names with numbers in each prompt; it asks for one of them (default: 1)",
    )
    add("--data-path", help="corpus prefix whose text is the haystack (default: filler)")
    add(
        "--seed",
        type=whole(0, LARGEST_SEED),
        default=1234,
        help="seed of names, numbers and places (default: 1234)",
    )
    return parser.parse_args()


@command
def main() -> None:
    flags = parse()
    prepare_megatron()
    from tqdm import tqdm

    from pose_megatron.evaluation import corpus_text, passkey, results
    from pose_megatron.evaluation.target import find_target
    from pose_megatron.runtime.distributed import device

    target = find_target(**target_of(flags))
    print(f"{target.name}: rope scaling {target.model.rope_scaling}", flush=True)
    tokenizer = open_tokenizer(flags, target)
    first = [bos_of(tokenizer)] if flags.prepend_bos else []
    haystack = passkey.filler(tokenizer.tokenize)
    if flags.data_path:
        haystack = corpus_text.haystack(flags.data_path, target.lengths[-1])
    prompts = {
        length: passkey.prompts(
            tokenizer.tokenize, haystack, length, flags.trials, flags.needles, flags.seed, first
        )
        for length in target.lengths
    }
    largest = max(int(prompt.tokens.max()) for some in prompts.values() for prompt in some)
    if largest >= target.model.vocab_size:
        raise ConfigError(
            f"token id {largest} is outside the checkpoint's vocabulary of "
            f"{target.model.vocab_size}: --tokenizer-model or --data-path is of another model"
        )
    logits = target.load_logits()

    rows = []
    with tqdm(
        total=flags.trials * sum(target.lengths),
        unit="token",
        unit_scale=True,
        desc=target.name,
        disable=None,
    ) as bar:
        for length, questions in prompts.items():
            answers = list(
                passkey.answers(
                    lambda tokens, last: logits(tokens.to(device()), last),
                    questions,
                    flags.batch_tokens,
                    bar.update,
                )
            )
            found = sum(answer.found for answer in answers)
            low, high = passkey.interval(found, flags.trials)
            rows.append(
                {
                    "name": target.name,
                    "metric": "passkey",
                    "context_length": length,
                    "passkey": found / flags.trials,
                    "low": low,
                    "high": high,
                    "loss": sum(answer.loss for answer in answers) / flags.trials,
                    "trials": flags.trials,
                    "needles": flags.needles,
                    "seed": flags.seed,
                    "data_path": flags.data_path,
                    "tokenizer_model": flags.tokenizer_model,
                    "prepend_bos": flags.prepend_bos,
                    **target.row,
                    "answers": [[a.depth, a.found, round(a.loss, 4)] for a in answers],
                }
            )
    for row in rows:
        print(
            f"{target.name}: context {row['context_length']:>7,}  found {row['passkey']:6.1%}  "
            f"(95 % interval {row['low']:.0%} to {row['high']:.0%})  "
            f"loss per token of the answer {row['loss']:.3f}"
        )
    results.append(flags.output, rows)
