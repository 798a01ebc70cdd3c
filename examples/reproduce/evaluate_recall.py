"""How many pairs of a key and a value a model recalls, at several context lengths.

The results are those of passkeys, with a pair for a needle (recall.py).
"""

import argparse

import recall

from pose_megatron.commands.haystack_flags import add_haystack_flags, open_haystack, open_record
from pose_megatron.commands.target_flags import add_target_flags
from pose_megatron.runtime.cli import command
from pose_megatron.runtime.ranges import whole
from pose_megatron.runtime.startup import prepare_megatron


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_target_flags(parser)
    most = len(recall.KEYS)
    parser.add_argument("--needles", type=whole(1, most), default=most, help=f"pairs [{most}]")
    add_haystack_flags(parser, "pairs")
    return parser.parse_args()


@command
def main() -> None:
    flags = parse()
    prepare_megatron(flags.device)

    from pose_megatron.evaluation import passkey
    from pose_megatron.evaluation.progress import Progress

    target, tokenizer, hay, _ = open_haystack(flags)
    reader = target.open_reader(flags.batch_tokens)
    record = open_record(flags, target, "passkey", needles=flags.needles, needle="a pair")
    asked = {
        length: recall.haystacks(
            tokenizer.tokenize, hay, length, flags.trials, flags.needles, flags.seed
        )
        for length in target.lengths
    }
    with Progress(target.name, sum(h.cost for some in asked.values() for h in some)) as bar:
        bar.follow(reader, record)
        pairs = passkey.Passkeys(reader, tokenizer.detokenize, record)
        for length, some in asked.items():
            row = passkey.summary(pairs.answers(some, length), flags.needles)
            bar.say(f"{target.name}: context {length:>7,}  recalled {row['passkey']:6.1%}")
            record.finish({"context_length": length, **row})


if __name__ == "__main__":
    main()
