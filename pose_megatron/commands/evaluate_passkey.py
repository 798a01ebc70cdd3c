"""Passkey retrieval of a model at several context lengths."""

import argparse

from pose_megatron.commands.target_flags import (
    add_target_flags,
    bos_of,
    introduce,
    open_tokenizer,
    target_of,
)
from pose_megatron.runtime.cli import command, positive
from pose_megatron.runtime.ranges import LARGEST_SEED, real, whole
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
    add = parser.add_argument
    add("--trials", type=positive, default=50, help="texts per context length [50]")
    add(
        "--needles",
        type=whole(1, 32),  # as many names as passkey.NAMES has
        default=1,
        help="names with numbers in each text; it is asked for all of them [1]",
    )
    add("--data-path", help="corpus prefix whose text is the haystack [filler]")
    add(
        "--seed",
        type=whole(0, LARGEST_SEED),
        default=1234,
        help="seed of names, numbers and places [1234]",
    )
    add(
        "--threshold",
        type=real(above=0, at_most=1),
        default=0.85,
        help="share of answers up to which a context length counts as effective [0.85]",
    )
    return parser.parse_args()


@command
def main() -> None:
    flags = parse()
    prepare_megatron()

    from pose_megatron.evaluation import corpus_text, passkey
    from pose_megatron.evaluation.haystack import check_vocabulary, filler
    from pose_megatron.evaluation.progress import Progress
    from pose_megatron.evaluation.record import Record
    from pose_megatron.evaluation.replicas import replicas
    from pose_megatron.evaluation.shares import effective_length
    from pose_megatron.evaluation.target import find_target

    target = find_target(**target_of(flags))
    introduce(target)
    tokenizer = open_tokenizer(flags, target)
    first = [bos_of(tokenizer)] if flags.prepend_bos else []
    hay = filler(tokenizer.tokenize)
    if flags.data_path:
        hay = corpus_text.haystack(flags.data_path, target.lengths[-1])
    asked = {
        length: passkey.haystacks(
            tokenizer.tokenize, hay, length, flags.trials, flags.needles, flags.seed, first
        )
        for length in target.lengths
    }
    for some in asked.values():
        check_vocabulary(some, target.model.vocab_size)
    conditions = {
        "name": target.name,
        "metric": "passkey",
        "trials": flags.trials,
        "needles": flags.needles,
        "seed": flags.seed,
        "data_path": flags.data_path,
        "tokenizer_model": flags.tokenizer_model,
        "prepend_bos": flags.prepend_bos,
        **target.row,
    }
    reader = target.open_reader(flags.batch_tokens)
    files = [*target.files, *corpus_text.files_of(flags.data_path)]
    record = Record(flags.output, conditions, files)

    found = {}
    tokens = sum(h.cost for some in asked.values() for h in some)
    with Progress(target.name, tokens) as bar:
        reader.progress = lambda tokens: bar.update(tokens * replicas())
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
