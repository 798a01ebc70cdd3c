"""Passkey retrieval of a model at several context lengths."""

import argparse

from pose_megatron.commands.haystack_flags import add_haystack_flags, open_haystack, open_record
from pose_megatron.commands.target_flags import add_target_flags
from pose_megatron.runtime.cli import command
from pose_megatron.runtime.ranges import whole
from pose_megatron.runtime.startup import prepare_megatron


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="How often the model finds a number that the text, anywhere in the window,\n"
        "gives to a name. Prompts have exactly the context length, the place moves from the\n"
        "front to the back, and greedy decoding must give the whole number. A text is read\n"
        "once and asked for all of its names.",
        epilog="example:\n  python tools/evaluate_passkey.py --load checkpoints/pose --bf16 \\\n"
        "      --context-lengths 4096 16384 65536 --needles 8 --data-path books_text_document \\\n"
        "      --output results.jsonl\n"
        "  python tools/plot_results.py results.jsonl --metric passkey --output passkey.png",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_target_flags(parser)
    parser.add_argument(
        "--needles",
        type=whole(1, 32),  # as many names as passkey.NAMES has
        default=1,
        help="names with numbers in each text; it is asked for all of them [1]",
    )
    add_haystack_flags(parser, "names, numbers and places")
    return parser.parse_args()


@command
def main() -> None:
    flags = parse()
    prepare_megatron(flags.device)

    from pose_megatron.evaluation import passkey
    from pose_megatron.evaluation.haystack import check_vocabulary
    from pose_megatron.evaluation.progress import Progress
    from pose_megatron.evaluation.shares import effective_length

    target, tokenizer, hay, first = open_haystack(flags)
    asked = {
        length: passkey.haystacks(
            tokenizer.tokenize, hay, length, flags.trials, flags.needles, flags.seed, first
        )
        for length in target.lengths
    }
    for some in asked.values():
        check_vocabulary(some, target.model.vocab_size)
    reader = target.open_reader(flags.batch_tokens)
    record = open_record(flags, target, "passkey", needles=flags.needles)

    found = {}
    tokens = sum(h.cost for some in asked.values() for h in some)
    with Progress(target.name, tokens) as bar:
        bar.follow(reader, record)
        passkeys = passkey.Passkeys(reader, tokenizer.detokenize, record)
        for length, some in asked.items():
            answers = passkeys.answers(some, length)
            row = passkey.summary(answers, flags.needles)
            found[length] = row["passkey"]
            bar.say(
                f"{target.name}: context {length:>7,}  found {row['passkey']:6.1%}  "
                f"(95 % interval {row['low']:.0%} to {row['high']:.0%})  "
                f"digits {row['digits']:6.1%}  loss per token of the answer {row['loss']:.3f}"
            )
            record.finish({"context_length": length, **row})
        bar.say(
            f"{target.name}: effective context length "
            f"{effective_length(found, flags.threshold):,} (all lengths up to it have at "
            f"least {flags.threshold:.0%})"
        )
